"""Rows of JSONL, JSON and parquet files, with errors that name the file, the line and the field."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxopd.confined import Confined
from jaxopd.errors import InputError, first_line

MISSING = object()
SURROGATE = re.compile("[\ud800-\udfff]")
# A few bytes of parquet can stand for any number of values; what is read takes under 2 GB in all.
LARGEST_VALUES = 1 << 24
LARGEST_TABLE = 1 << 29  # bytes of a table's columns
PARQUET_ROWS = 64  # decoded at a time
COUNTER = Confined(Path(__file__).with_name("parquet_worker.py"))


@dataclass(frozen=True)
class Row:
    """One record and where it stands: its 1-based line (JSONL) or row (JSON, parquet)."""

    path: Path
    line: int
    values: dict[str, Any]
    unit: str = "line"
    name: str = ""

    def fail(self, field: str, found: str, expected: str) -> InputError:
        """Build the error that names this row and a field."""
        return InputError(f"{self.path}: {self.unit} {self.line}: {field}: found {found}, expected {expected}")

    def typed(self, field: str, kind: type, expected: str, default: Any = MISSING) -> Any:
        """Return a field of a type (a missing or null field is the default, where there is one)."""
        value = self.values.get(field)
        if value is None and default is not MISSING:
            return default
        if not isinstance(value, kind):
            raise self.fail(field, "null" if field in self.values and value is None else _shown(value), expected)
        return self.encodable(field, value)

    def encodable(self, field: str, value: Any) -> Any:
        """Return a value unless it is text that holds half of a surrogate pair, which JSON can escape."""
        if isinstance(value, str) and SURROGATE.search(value):
            raise self.fail(field, "half of a surrogate pair", "text that UTF-8 can hold")
        return value

    def text(self, field: str, default: Any = MISSING) -> str:
        """Return a field that holds non-blank text."""
        value = self.typed(field, str, "text", default)
        if not value.strip() and default is MISSING:
            raise self.fail(field, "blank text", "text")
        return value


def read_rows(path: str | Path) -> list[Row]:
    """Read the records of a .parquet, .json (a list of objects) or JSONL file, each with a name of its own.

    The name is the record's id, else its extra_info.index, else the file's stem and the row's place. A repeated
    name gets a suffix, because data sets repeat questions and run records are keyed by name.

    Raises:
        InputError: the file is missing, empty or malformed; names the line.
    """
    path = check_file(Path(path), "a JSONL, JSON or parquet file")
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif path.suffix == ".json":
        rows = _json_rows(path)
    else:
        rows = _jsonl_rows(path)
    return nonempty(_named(rows), path)


def check_file(path: Path, expected: str) -> Path:
    """Return the path of an existing file; InputError otherwise."""
    try:
        kind = "a folder" if path.is_dir() else "" if path.is_file() else "no such file"
    except OSError as error:  # a name that is too long
        kind = f"no such file ({error.strerror})"
    if kind:
        raise InputError(f"{path}: found {kind}, expected {expected}")
    return path


def decode(path: Path) -> str:
    """Return the UTF-8 text of a file; InputError names the line of a wrong byte."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: found bytes that are not UTF-8, expected UTF-8 text") from None


def nonempty(rows: list, path: Path) -> list:
    """Return the rows; InputError where there is none."""
    if not rows:
        raise InputError(f"{path}: found nothing in it, expected at least one record")
    return rows


def _jsonl_rows(path: Path) -> list[Row]:
    rows = []
    # not splitlines(): JSON text may hold U+2028 and form feeds, which only str.splitlines takes for line ends
    for line, content in enumerate(decode(path).split("\n"), start=1):
        if content.strip():
            rows.append(_row(path, line, _parse(path, content, line), "line"))
    return rows


def _json_rows(path: Path) -> list[Row]:
    content = decode(path)
    values = _parse(path, content, 1) if content.strip() else []
    if not isinstance(values, list):
        raise InputError(f"{path}: found {_shown(values)}, expected a list of objects")
    return [_row(path, place, value, "record") for place, value in enumerate(values, start=1)]


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow

    try:
        values = _parquet_values(path)
    except InputError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path}: found no readable parquet table ({first_line(error)})") from None
    return [_row(path, place, value, "row") for place, value in enumerate(values, start=1)]


def _parquet_values(path: Path) -> list[dict[str, Any]]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        claimed = COUNTER.ask(str(path.absolute()))
        if claimed is None:
            raise ValueError("its metadata contradicts itself")
        if claimed > LARGEST_VALUES:
            raise InputError(f"{path}: found {claimed} values in its columns, expected at most {LARGEST_VALUES}")
        values, size = [], 0
        for batch in file.iter_batches(PARQUET_ROWS):
            size += batch.nbytes
            if size > LARGEST_TABLE:
                raise InputError(f"{path}: found over {LARGEST_TABLE} bytes in its columns, expected less")
            values += batch.to_pylist()
    return values


def _parse(path: Path, content: str, line: int) -> Any:
    try:
        return json.loads(content, strict=False)  # real files hold raw control characters inside strings
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits is a plain ValueError
        at = f"line {line + getattr(error, 'lineno', 1) - 1}"
        raise InputError(f"{path}: {at}: found malformed JSON ({str(error).split(':')[0]})") from None


def _row(path: Path, line: int, values: Any, unit: str) -> Row:
    if not isinstance(values, dict):
        raise InputError(f"{path}: {unit} {line}: found {_shown(values)}, expected an object with fields")
    return Row(path, line, values, unit)


def _named(rows: list[Row]) -> list[Row]:
    seen: Counter[str] = Counter()
    named = []
    for row in rows:
        extra = row.values.get("extra_info")
        known = [row.values.get("id"), extra.get("index") if isinstance(extra, dict) else None]
        name = next((str(value) for value in known if isinstance(value, str | int) and str(value)), None)
        name = name or f"{row.path.stem}-{row.line}"
        seen[name] += 1
        name = name if seen[name] == 1 else f"{name}#{seen[name]}"
        named.append(Row(row.path, row.line, row.values, row.unit, row.encodable("id", name)))
    return named


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    try:
        written = json.dumps(value, default=str)[:40]
    except (RecursionError, ValueError):  # nested deeper than it can be written
        written = "..."
    return f"{type(value).__name__} {written}"
