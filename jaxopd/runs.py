"""A run's folder: configuration, versions, pieces and records, all through tensorstore.

    RUN/config.json, env.json
    RUN/pieces/<stage>/<name>/<array>/   zarr3 arrays;  .../done.json is written last and commits the piece
    RUN/records/<table>.parquet          the merged records

A killed run loses the piece in flight: a piece without its marker is written again from the start. Everything goes
through tensorstore's key-value stores, so a path may also be an URL that tensorstore knows (gs://, s3://, memory://).
"""

import io
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd
import tensorstore as ts

from jaxopd.errors import InputError

PACKAGES = ("jaxopd", "jax", "jaxlib", "flax", "transformers", "numpy", "tensorstore", "orbax-checkpoint")


class RunFolder:
    """Reads and writes one run; every write is atomic per key."""

    def __init__(self, path: str):
        self.path = str(path)
        self.spec = _kvstore(self.path)
        self.store = ts.KvStore.open(self.spec).result()

    @classmethod
    def create(
        cls, path: str, config: dict[str, Any], defaults: Mapping[str, Any] = MappingProxyType({})
    ) -> "RunFolder":
        """Opens the run of `config` at `path`, new or to be resumed.

        A run begun before a field existed had its default. Raises InputError where the folder holds another run, or
        things that are no run.
        """
        run = cls(path)
        known = run.config()
        if known is None:
            with _storage(path):
                others = run.store.list().result()
            if others:
                raise InputError(f"{path}: found files but no config.json, expected an empty folder or a jaxopd run")
            run.write_json("config.json", config)
        known = {**defaults, **(known or config)}
        if run.read_json("env.json") is None:
            run.write_json("env.json", environment())
        # A digest of the inputs differs wherever a setting that names them does, so it is looked at last.
        for field in sorted(set(known) | set(config), key=lambda name: (name == "input_digest", name)):
            if known.get(field) != config.get(field):
                if field == "input_digest":
                    raise InputError(
                        f"{path}: found questions, demonstrations or models that changed after this run began, "
                        "expected the same contents; choose another folder"
                    )
                raise InputError(
                    f"{path}/config.json: field {field}: found {known.get(field)!r} of another run, expected "
                    f"{config.get(field)!r}; choose another folder or the same settings"
                )
        return run

    @classmethod
    def existing(cls, path: str) -> "RunFolder":
        """Opens a run for reading. Raises InputError where there is none."""
        run = cls(path)
        if run.config() is None:
            raise InputError(f"{path}: found no config.json, expected the folder of a jaxopd run")
        return run

    def config(self) -> dict[str, Any] | None:
        """Gives the settings of the run, or None where none was begun."""
        known = self.read_json("config.json")
        if known is not None and not isinstance(known, dict):
            raise InputError(f"{self.path}/config.json: found a {type(known).__name__}, expected an object")
        return known

    def read_json(self, key: str) -> Any:
        """Gives the value stored at `key`, or None. Raises InputError where it is no JSON."""
        with _storage(self.path):
            found = self.store.read(key).result()
        try:
            return json.loads(found.value) if found.state == "value" else None
        except ValueError as error:  # malformed JSON or text
            raise InputError(f"{self.path}/{key}: found no valid JSON ({error}), expected what was written") from None

    def write_json(self, key: str, value: Any) -> None:
        """Stores a JSON value."""
        self._write(key, json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass"))

    def done(self, piece: str) -> bool:
        """Says whether the piece was committed."""
        return self.store.read(f"pieces/{piece}/done.json").result().state == "value"

    def save(self, piece: str, arrays: dict[str, np.ndarray], facts: dict[str, Any] | None = None) -> None:
        """Writes a piece's arrays, then the marker that commits it, which also holds `facts`."""
        with _storage(self.path):
            writes = []
            for name, array in arrays.items():
                stored = array.astype(np.uint8) if array.dtype == bool else array
                spec = {"driver": "zarr3", "kvstore": _inside(self.spec, f"pieces/{piece}/{name}/")}
                target = ts.open(
                    spec, create=True, delete_existing=True, dtype=stored.dtype, shape=stored.shape
                ).result()
                writes.append(target.write(stored))
            for write in writes:
                write.result()
        marker = {"arrays": {name: str(array.dtype) for name, array in arrays.items()}, "facts": facts or {}}
        self.write_json(f"pieces/{piece}/done.json", marker)

    def load(self, piece: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reads a committed piece: its arrays and its facts."""
        marker = self.read_json(f"pieces/{piece}/done.json")
        if marker is None:
            raise InputError(f"{self.path}/pieces/{piece}: found no done.json, expected a finished piece")
        reads = {}
        for name in marker["arrays"]:
            spec = {"driver": "zarr3", "kvstore": _inside(self.spec, f"pieces/{piece}/{name}/")}
            reads[name] = ts.open(spec, open=True).result().read()
        arrays = {name: read.result().astype(marker["arrays"][name]) for name, read in reads.items()}
        return arrays, marker["facts"]

    def write_table(self, key: str, table: pd.DataFrame) -> None:
        """Stores a table as parquet."""
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        self._write(key, buffer.getvalue())

    def read_table(self, key: str) -> pd.DataFrame:
        """Reads a parquet table. Raises InputError where there is none."""
        found = self.store.read(key).result()
        if found.state != "value":
            raise InputError(f"{self.path}/{key}: found no such table, expected a finished run")
        return pd.read_parquet(io.BytesIO(found.value))

    def _write(self, key: str, value: bytes) -> None:
        with _storage(self.path):
            self.store.write(key, value).result()


def environment() -> dict[str, str]:
    """Gives the versions and the device kind this process runs with."""
    import jax

    devices = jax.local_devices()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }


@contextmanager
def _storage(path: str) -> Iterator[None]:
    """Turns what the storage refuses into one clear sentence."""
    try:
        yield
    except ValueError as error:  # tensorstore's only exception; its text begins with the kind
        kind, _, reason = str(error).partition(": ")
        if "No space left" in reason or "quota" in reason.lower():
            raise InputError(
                f"{path}: found no free disk space, expected room for the run; free some and give the same "
                "command again"
            ) from None
        if kind in ("NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION"):
            reason = reason.partition(" [")[0]
            raise InputError(f"{path}: found no folder that can be used ({reason}), expected one for the run") from None
        raise


def _kvstore(path: str) -> Any:
    if "://" in path:
        return path.rstrip("/") + "/"
    import os

    return {"driver": "file", "path": os.path.abspath(path) + "/"}


def _inside(spec: Any, key: str) -> Any:
    return spec + key if isinstance(spec, str) else {**spec, "path": spec["path"] + key}
