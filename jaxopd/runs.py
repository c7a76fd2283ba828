"""A run's folder: configuration, versions, pieces and records, all through tensorstore.

    RUN/config.json, env.json
    RUN/pieces/<stage>/<name>/<attempt>/<array>/   zarr3 arrays;  .../done.json is written last and commits an attempt
    RUN/records/<table>.parquet                    the merged records

A killed run loses the piece in flight: an attempt without the marker is not read and swept away later. Attempts have
names of their own and the first commit stands, so that two jobs that do the same piece cannot mix their arrays.
Everything goes through tensorstore's key-value stores, so a path may also be an URL that tensorstore knows (gs://,
s3://, memory://). Of several processes the first one writes, and all of them wait until it has.
"""

import io
import json
import platform
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from importlib.metadata import version
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import tensorstore as ts

from jaxopd import distributed
from jaxopd.errors import InputError, first_line

PACKAGES = ("jaxopd", "jax", "jaxlib", "flax", "transformers", "numpy", "tensorstore", "orbax-checkpoint")
MARKS = {"objective": "train", "allocation": "diagnose"}  # fields by which runs are told apart; screen is as diagnose
PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0)  # seconds before a storage that failed for a moment is asked again
FLEETING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "INTERNAL", "UNKNOWN")

T = TypeVar("T")


def _difference(field: str, theirs: Any, mine: Any) -> tuple[str, Any, Any]:
    """Names the first place where two settings differ, inside objects too."""
    while isinstance(theirs, dict) and isinstance(mine, dict):
        names = sorted(set(theirs) | set(mine))
        inner = next(name for name in names if theirs.get(name, "nothing") != mine.get(name, "nothing"))
        field, theirs, mine = f"{field}.{inner}", theirs.get(inner, "nothing"), mine.get(inner, "nothing")
    return field, theirs, mine


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
        things that are no run, or is not the same folder in every process.
        """
        run = cls(path)
        distributed.decided(lambda: run._begin(config))
        known = run.config()
        if known is None:
            raise InputError(f"{path}: found no config.json here, expected a folder that all processes share")
        mine, theirs = verb_of(config), verb_of(known)
        if None not in (mine, theirs) and mine != theirs:
            raise InputError(f"{path}: found a run of jaxopd {theirs}, expected a new folder, or one of jaxopd {mine}")
        known = {**defaults, **known}
        # A digest of the inputs differs wherever a setting that names them does, so it is looked at last.
        for field in sorted(set(known) | set(config), key=lambda name: (name == "input_digest", name)):
            if known.get(field) != config.get(field):
                if field == "input_digest":
                    raise InputError(
                        f"{path}: found questions, demonstrations or models that changed after this run began, "
                        "expected the same contents; choose another folder"
                    )
                name, theirs, mine = _difference(field, known.get(field), config.get(field))
                raise InputError(
                    f"{path}/config.json: field {name}: found {theirs!r}, what the run here began with, "
                    f"expected {mine!r}; choose another folder, or that run's settings"
                )
        return run

    def _begin(self, config: dict[str, Any]) -> None:
        known, absent = self.read_version("config.json")
        if known is None:
            others = self._stored(lambda: self.store.list().result())
            if others and self.config() is None:  # no other job made the run just now
                found = "files but no config.json"
                raise InputError(f"{self.path}: found {found}, expected an empty folder or a jaxopd run")
            self.write_if("config.json", config, absent)
        if self.config() is not None and self.read_json("env.json") is None:
            self._write("env.json", _encoded(environment()))

    @classmethod
    def existing(cls, path: str, verb: str | None = None) -> "RunFolder":
        """Opens a run for reading. Raises InputError where there is none, or one of another verb."""
        run = cls(path)
        known = run.config()
        if known is None:
            raise InputError(f"{path}: found no config.json, expected the folder of a jaxopd run")
        if verb and verb_of(known) not in (verb, None):
            raise InputError(f"{path}: found a run of jaxopd {verb_of(known)}, expected one of jaxopd {verb}")
        return run

    def config(self) -> dict[str, Any] | None:
        """Gives the settings of the run, or None where none was begun."""
        known = self.read_json("config.json")
        if known is not None and not isinstance(known, dict):
            raise InputError(f"{self.path}/config.json: found a {type(known).__name__}, expected an object")
        return known

    def read_json(self, key: str) -> Any:
        """Gives the value stored at `key`, or None. Raises InputError where it is no JSON."""
        return self.read_version(key)[0]

    def read_version(self, key: str) -> tuple[Any, bytes]:
        """Gives the JSON value stored at `key`, or None, and the generation that `write_if` takes."""
        found = self._stored(lambda: self.store.read(key).result())
        try:
            return json.loads(found.value) if found.state == "value" else None, found.stamp.generation
        except ValueError as error:  # malformed JSON or text
            raise InputError(f"{self.path}/{key}: found no valid JSON ({error}), expected what was written") from None

    def write_json(self, key: str, value: Any) -> None:
        """Stores a JSON value."""
        distributed.decided(lambda: self._write(key, _encoded(value)))

    def write_if(self, key: str, value: Any, generation: bytes) -> bool:
        """Stores a JSON value unless the key changed since `generation`, and says whether it did. In one process."""
        stamp = self._stored(lambda: self.store.write(key, _encoded(value), if_equal=generation).result())
        return stamp.generation != b""

    def delete(self, key: str, generation: bytes | None = None) -> None:
        """Removes a key, with a generation only if it did not change since. In one process."""
        self._stored(lambda: self.store.write(key, None, if_equal=generation).result())

    def done(self, piece: str) -> bool:
        """Says whether the piece was committed."""
        return distributed.decided(lambda: self.finished(piece))

    def finished(self, piece: str) -> bool:
        """Says in one process whether the piece was committed."""
        return self.has(f"pieces/{piece}/done.json")

    def has(self, key: str) -> bool:
        """Says in one process whether something is stored at `key`."""
        return self._stored(lambda: self.store.read(key).result()).state == "value"

    def save(self, piece: str, arrays: dict[str, np.ndarray], facts: dict[str, Any] | None = None) -> None:
        """Writes a piece's arrays, then the marker that commits them, which also holds `facts`."""
        distributed.decided(lambda: self._save(piece, arrays, facts or {}))

    def _save(self, piece: str, arrays: dict[str, np.ndarray], facts: dict[str, Any]) -> None:
        attempt = uuid.uuid4().hex[:12]
        stored = {name: array.astype(np.uint8) if array.dtype == bool else array for name, array in arrays.items()}
        try:
            self._stored(lambda: self._write_arrays(f"pieces/{piece}/{attempt}", stored))
        except InputError:
            if self.finished(piece):  # another job was faster, and swept this attempt away
                return
            raise
        marker = {
            "attempt": attempt,
            "arrays": {name: str(array.dtype) for name, array in arrays.items()},
            "checksums": {name: _checksum(array) for name, array in stored.items()},
            "facts": facts,
        }
        committed, generation = self.read_version(f"pieces/{piece}/done.json")
        if committed is None:
            self.write_if(f"pieces/{piece}/done.json", marker, generation)
        self._sweep(piece)

    def _write_arrays(self, root: str, arrays: dict[str, np.ndarray]) -> None:
        writes = []
        for name, array in arrays.items():
            spec = {"driver": "zarr3", "kvstore": _inside(self.spec, f"{root}/{name}/")}
            target = ts.open(spec, create=True, delete_existing=True, dtype=array.dtype, shape=array.shape)
            writes.append(target.result().write(array))
        for write in writes:
            write.result()

    def _sweep(self, piece: str) -> None:
        """Removes what jobs that died, or were slower, left of their attempts at a committed piece."""
        root, kept = f"pieces/{piece}/", self.read_json(f"pieces/{piece}/done.json").get("attempt")
        inside = ts.KvStore.KeyRange(root, root[:-1] + chr(ord("/") + 1))
        for key in self._stored(lambda: self.store.list(inside).result()):
            attempt, slash, _ = key.decode().removeprefix(root).partition("/")
            if slash and attempt != kept:
                self.delete(key.decode())

    def load(self, piece: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Reads a committed piece: its arrays and its facts. Raises InputError where they are not what was written."""
        marker = self.read_json(f"pieces/{piece}/done.json")
        if marker is None:
            raise InputError(f"{self.path}/pieces/{piece}: found no done.json, expected a finished piece")
        root = "/".join(filter(None, ("pieces", piece, marker.get("attempt"))))  # runs of old have no attempts
        stored = self._stored(lambda: self._read_arrays(root, marker["arrays"]))
        for name, checksum in marker.get("checksums", {}).items():
            if _checksum(stored[name]) != checksum:
                raise InputError(
                    f"{self.path}/{root}/{name}: found an array that is damaged or incomplete, expected what was "
                    f"written; delete pieces/{piece}/done.json and give the same command again"
                )
        return {name: stored[name].astype(dtype) for name, dtype in marker["arrays"].items()}, marker["facts"]

    def _read_arrays(self, root: str, names: Mapping[str, str]) -> dict[str, np.ndarray]:
        specs = {name: {"driver": "zarr3", "kvstore": _inside(self.spec, f"{root}/{name}/")} for name in names}
        reads = {name: ts.open(spec, open=True).result().read() for name, spec in specs.items()}
        return {name: read.result() for name, read in reads.items()}

    def write_table(self, key: str, table: pd.DataFrame) -> None:
        """Stores a table as parquet."""
        buffer = io.BytesIO()
        table.to_parquet(buffer, index=False)
        distributed.decided(lambda: self._write(key, buffer.getvalue()))

    def read_table(self, key: str) -> pd.DataFrame:
        """Reads a parquet table. Raises InputError where there is none, or half of one."""
        found = self._stored(lambda: self.store.read(key).result())
        if found.state != "value":
            raise InputError(f"{self.path}/{key}: found no such table, expected a finished run")
        try:
            return pd.read_parquet(io.BytesIO(found.value))
        except (ValueError, OSError) as error:  # pyarrow's kinds for a truncated or foreign file
            found = f"no valid parquet ({first_line(error)})"
            raise InputError(f"{self.path}/{key}: found {found}, expected a table") from None

    def _write(self, key: str, value: bytes) -> None:
        self._stored(lambda: self.store.write(key, value).result())

    def _stored(self, operation: Callable[[], T]) -> T:
        """Does something with the storage, again after a pause where it failed for a moment.

        Raises InputError, one sentence, on what the storage refuses.
        """
        for pause in (*PAUSES, None):
            try:
                return operation()
            except ValueError as error:  # tensorstore's only exception; its text begins with the kind
                kind, _, reason = str(error).partition(": ")
                if kind not in FLEETING or pause is None:
                    raise self._refused(kind, reason, error) from None
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _refused(self, kind: str, reason: str, error: ValueError) -> Exception:
        """Gives what to raise where the storage failed for good: a sentence for the user, if there is one."""
        again = "give the same command again"
        if "No space left" in reason or "quota" in reason.lower():
            found, expected = "no free disk space", f"room for the run; free some and {again}"
            return InputError(f"{self.path}: found {found}, expected {expected}")
        reason = reason.partition(" [")[0]
        if kind in ("NOT_FOUND", "PERMISSION_DENIED", "FAILED_PRECONDITION"):
            return InputError(f"{self.path}: found no folder that can be used ({reason}), expected one for the run")
        if kind in FLEETING:
            tries = len(PAUSES) + 1
            found = f"storage that failed {tries} times ({reason})"
            return InputError(f"{self.path}: found {found}, expected one that answers; nothing is lost: {again}")
        return error


def verb_of(config: Mapping[str, Any]) -> str | None:
    """Names the verb that made a run of this configuration, or None."""
    return next((verb for field, verb in MARKS.items() if field in config), None)


def environment() -> dict[str, str]:
    """Gives the versions and the devices this run works with."""
    import jax

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "device": f"{len(devices)} x {devices[0].device_kind}",
    }


def _encoded(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).tobytes())


def _kvstore(path: str) -> Any:
    if "://" in path:
        return path.rstrip("/") + "/"
    import os

    return {"driver": "file", "path": os.path.abspath(path) + "/"}


def _inside(spec: Any, key: str) -> Any:
    return spec + key if isinstance(spec, str) else {**spec, "path": spec["path"] + key}
