"""Checkpoints of everything through orbax: a resumed run goes on as if it had never stopped.

A checkpoint holds the arrays of parameters and optimizer by name, and facts: the step, the data position and what the
monitor remembers. Draws depend on (seed, step) alone, so there is no other random state. A checkpoint killed half
written is not one: orbax renames it into place.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxopd.errors import InputError
from jaxopd.models.checkpoints import readable


class Checkpoints:
    """The checkpoints of one run, newest `keep` of them."""

    def __init__(self, folder: str | Path, keep: int = 2):
        self.folder = Path(folder).absolute()
        policy = ocp.checkpoint_managers.preservation_policy.LatestN(keep)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, enable_async_checkpointing=False, cleanup_tmp_directories=True, create=True
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)
        # It would ask JAX's preemption service under step numbers, and hide the signal from `stop_if_preempted`.
        self.manager.reached_preemption = lambda step: False

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, or None."""
        return self.manager.latest_step()

    def check_unchanged(self) -> None:
        """Raises InputError where another job saved since this one looked."""
        stored = max((int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()), default=None)
        if stored != self.latest:
            found, expected = (f"{step} as the newest step" for step in (stored, self.latest))
            raise InputError(f"{self.folder}: found {found}, expected {expected}, which this job began with")

    def save(self, step: int, arrays: Any, facts: dict[str, Any]) -> None:
        """Saves a tree of arrays and JSON facts under a step."""
        arguments = ocp.args.Composite(arrays=ocp.args.StandardSave(_named(arrays)), facts=ocp.args.JsonSave(facts))
        self.manager.save(step, args=arguments)

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Restores the newest checkpoint into the structure, types and places of `like`, and its facts."""
        step, named = self.latest, _named(like)
        abstract = {k: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for k, x in named.items()}
        arguments = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract), facts=ocp.args.JsonRestore())
        older = max((other for other in self.manager.all_steps() if other != step), default=None)
        instead = "" if older is None else f"; without this folder the run goes on from step {older}"
        with readable(self.folder / str(step), instead):
            found = self.manager.restore(step, args=arguments)
            if not {"step", "first"} <= dict(found.facts).keys():
                raise ValueError("its facts name no step")
        return jax.tree.unflatten(jax.tree.structure(like), [found.arrays[name] for name in named]), dict(found.facts)

    def close(self) -> None:
        """Waits for what is being written."""
        self.manager.close()


def _named(tree: Any) -> dict[str, jax.Array]:
    """Names every array by its path, so that a checkpoint can be read without this program."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): x
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
