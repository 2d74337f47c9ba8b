"""Rows of data from JSON lines, gzipped or not, from Parquet, or from a data set of a hub.

A row is a dictionary with a place, which every error about it names: "texts.jsonl:3",
"texts.parquet: row 3", "hub:owner/name:train: row 3". Lines and rows are counted from 1.
"""

import collections
import contextlib
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HUB = "hub:"  # "hub:owner/name" or "hub:owner/name:split", through the `datasets` library
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # "../x" would be a local folder
INSTALL = "pip install 'ppo_jax[data]'"

CONVERSATION = {"messages", "prompt", "chosen"}  # a row that has one may have OPTIONAL as well
OPTIONAL = ("tools",)  # the functions that the assistant may call
MESSAGES = {*CONVERSATION, "completion", "rejected", "responses", *OPTIONAL}  # may hold objects

Row = dict[str, Any]
Schemas = Sequence[tuple[str, ...]]  # the sets of keys that a row may have, the simplest first


class Table(NamedTuple):
    """Rows that all have the same columns."""

    columns: list[str]
    rows: Callable[[Sequence[str]], Iterable[Row]]  # the rows, with only these columns


def read_rows(path: str | os.PathLike, schemas: Schemas) -> Iterator[tuple[str, Row]]:
    """Yields (place, row), each row with the keys of one of the schemas, and no others.

    A row may have more than that: it is read by the last of the schemas whose keys it has, see
    `other_columns`.

    Args:
        path: a .parquet file, "hub:owner/name[:split]", or else JSON lines, with .gz gzipped.
        schemas: the keys that a row may have.

    Raises:
        ValueError: "place: what is wrong", or "path: what is wrong with all of it".
    """
    for place, row, schema in whole_rows(path, schemas, only_schema=True):
        yield place, {key: row[key] for key in schema}


def whole_rows(
    path: str | os.PathLike, schemas: Schemas, *, only_schema: bool = False
) -> Iterator[tuple[str, Row, tuple[str, ...]]]:
    """Yields (place, row, schema): `read_rows` with all other keys and columns in the row.

    `only_schema` reads no other column of a table, which may be large.
    """
    if is_table(path):
        table = open_table(path)
        schema = schema_of(f"{path}: the columns must include", table.columns, schemas)
        columns = schema if only_schema else table.columns
        for place, row in table_rows(path, table, columns):
            yield place, row, schema
        return
    counts, total = collections.Counter(), 0
    for place, row in json_lines(path):
        schema = schema_of(f"{place}: the keys must be", row, schemas)
        counts.update(key for key in row if key not in schema)
        total += 1
        yield place, row, schema
    some = "in {:,} of {:,} rows".format
    found = {name: "" if x == total else some(x, total) for name, x in counts.items()}
    _others[_version(path), schemas] = found


_others: dict[tuple, dict[str, str]] = {}  # of files of JSON lines, as last read


def _version(path: str | os.PathLike) -> tuple[str, int, int]:
    status = os.stat(path)
    return str(path), status.st_mtime_ns, status.st_size


def other_columns(path: str | os.PathLike, schemas: Schemas) -> dict[str, str]:
    """{column: "" or "in N of M rows"} of all columns that `read_rows` does not read."""
    if is_table(path):
        columns = open_table(path).columns
        schema = schema_of(f"{path}: the columns must include", columns, schemas)
        return {name: "" for name in columns if name not in schema}
    key = _version(path), schemas
    if key not in _others:
        collections.deque(whole_rows(path, schemas), maxlen=0)
    return _others[key]


class NoRecordsLeft(ValueError):
    """All records of a data set were dropped; `too_long`: some of them for their length."""

    def __init__(self, message: str, too_long: bool):
        super().__init__(message)
        self.too_long = too_long


@contextlib.contextmanager
def naming_data(field: str, path: str | os.PathLike, limit: str) -> Iterator[None]:
    """Errors about a data set as a whole begin with its config field and file.

    `limit` names what sets the maximum of tokens, for records that are too long.
    """
    try:
        yield
    except ValueError as error:
        too_long = isinstance(error, NoRecordsLeft) and error.too_long
        see = f"; see {limit}" if too_long else ""
        raise ValueError(f"{field}: {path}: {error}{see}") from error


def is_hub(path: str | os.PathLike) -> bool:
    return str(path).startswith(HUB)


def is_table(path: str | os.PathLike) -> bool:
    return is_hub(path) or Path(path).suffix == ".parquet"


def check_packages(path: str | os.PathLike):
    """Refuse a path that needs a package that is missing, or a malformed name of a hub.

    Raises:
        ValueError: with the command that installs the package.
    """
    if is_hub(path):
        hub_name(path)
        import_datasets(path)
    elif Path(path).suffix == ".parquet":
        import_parquet(path)


def read_string(row: Row, key: str, place: str) -> str:
    """The text under a key; ValueError where it is none, or cannot be encoded."""
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key} must be a string, got {short_repr(value)}")
    # JSON can spell half a surrogate pair, which no tokenizer can encode.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{place}: {key} must be valid Unicode, got {short_repr(value)}")
    return value


def read_number(value: Any, what: str, place: str) -> float:
    """A finite number of a row, as a float; ValueError, with `what` it is, where it is none."""
    # In JSON true is no number, though Python takes it for 1. The limit is for float32.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= 1e30:
        raise ValueError(
            f"{place}: {what} must be a finite number up to 1e30, got {short_repr(value)}"
        )
    return float(value)


def without_nulls(value: Any, keep: str = "") -> Any:
    """The value without the fields that are null, in all its objects but those under `keep`."""
    if isinstance(value, dict):
        fields = {k: v for k, v in value.items() if v is not None}
        return {k: v if k == keep else without_nulls(v, keep) for k, v in fields.items()}
    return [without_nulls(x, keep) for x in value] if isinstance(value, list) else value


def short_repr(value: Any) -> str:
    """A value in a message, truncated to 80 characters; one of a user's may have no text."""
    try:
        text = repr(value)
    except Exception as error:
        return f"a {type(value).__name__} that cannot be printed ({type(error).__name__})"
    text = " ".join(line.strip() for line in text.splitlines())  # arrays have several
    return text if len(text) <= 80 else f"{text[:80]}..."


def schema_of(what: str, names: Iterable[str], schemas: Schemas) -> tuple[str, ...]:
    """The last, and so the richest, of the schemas whose names are all there, with OPTIONAL ones.

    Raises:
        ValueError: none is; the message begins with `what`.
    """
    names = list(names)
    for schema in reversed(schemas):
        if set(schema) <= set(names):
            optional = OPTIONAL if CONVERSATION & set(schema) else ()
            return (*schema, *(name for name in optional if name in names))
    allowed = " or ".join(str(list(schema)) for schema in schemas)
    raise ValueError(f"{what} {allowed}, got {names}")


# --- JSON lines -----------------------------------------------------------------------------------


def json_lines(path: str | os.PathLike) -> Iterator[tuple[str, Row]]:
    """Yields ("file:line", object) for each line that is not blank.

    Raises:
        ValueError: no such file, no object in it, or "file:line: what is wrong".
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    number, empty = 0, True
    file = gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb")
    try:
        # As bytes, because some characters inside a JSON string end a line of text for Python.
        with file as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    empty = False
                    yield f"{path}:{number}", parse_object(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: the gzip file is damaged: {error}") from error
    if empty:
        raise ValueError(f"{path}: the file is empty, at least one line is needed")


def parse_object(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:  # which would name a line of this line
        why = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{place}: not a JSON object on one line: {why}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON object on one line: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a line must be a JSON object {{...}}, got {short_repr(row)}")
    return {name: row[key] for name, key in known_names(row).items()}


def known_names(names: Iterable[str]) -> dict[str, str]:
    """{key for the schemas: key of a row}: what ShareGPT calls conversations are messages."""
    known = {name: name for name in names}
    if "conversations" in known and "messages" not in known:
        known["messages"] = known.pop("conversations")
    return known


def unique_keys(items: list[tuple[str, Any]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        raise ValueError(f"a key is repeated in {[key for key, _ in items]}")
    return row


# --- tables ---------------------------------------------------------------------------------------


def table_rows(
    path: str | os.PathLike, table: Table, columns: Sequence[str]
) -> Iterator[tuple[str, Row]]:
    number = 0
    for number, row in enumerate(table.rows(columns), start=1):
        # A table has all fields in every row: those that a message or a call lacks are null.
        filled = {key: without_nulls(row[key]) for key in MESSAGES & row.keys()}
        yield f"{path}: row {number}", {**row, **filled}
    if not number:
        raise ValueError(f"{path}: the table is empty, at least one row is needed")


def open_table(path: str | os.PathLike) -> Table:
    table = open_hub(path) if is_hub(path) else open_parquet(path)
    known = known_names(table.columns)

    def rows(names: Sequence[str]) -> Iterator[Row]:
        for row in table.rows([known[name] for name in names]):
            yield {name: row[known[name]] for name in names}

    return Table(list(known), rows)


def open_parquet(path: str | os.PathLike) -> Table:
    """A Parquet file, read a batch of rows at a time."""
    parquet = import_parquet(path)
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None):  # of the system: the file may be intact
            raise
        raise ValueError(f"{path}: not a Parquet file: {error}") from error

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        try:
            for batch in file.iter_batches(columns=list(columns)):
                yield from batch.to_pylist()
        except OSError as error:
            raise ValueError(f"{path}: the Parquet file is damaged: {error}") from error

    return Table(file.schema_arrow.names, rows)


def open_hub(path: str | os.PathLike) -> Table:
    """One split of a data set, which `datasets` downloads once into its cache."""
    name, split = hub_name(path)
    datasets = import_datasets(path)
    try:
        data = datasets.load_dataset(name, split=split)
    except Exception as error:  # the name, the split, the network, the format of the files
        raise ValueError(f"{path}: datasets could not load it: {error}") from error
    return Table(data.column_names, lambda columns: data.select_columns(list(columns)))


def hub_name(path: str | os.PathLike) -> tuple[str, str]:
    """(name, split) of "hub:owner/name[:split]"; the split is "train" where none is given."""
    name, _, split = str(path).removeprefix(HUB).partition(":")
    if not REPOSITORY.fullmatch(name):
        raise ValueError(
            f"a hub's data set must be {HUB}owner/name or {HUB}owner/name:split, got {str(path)!r}"
        )
    return name, split or "train"


def import_parquet(path: str | os.PathLike) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs the package pyarrow: {INSTALL}") from error
    return pyarrow.parquet


def import_datasets(path: str | os.PathLike) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{path}: a hub needs the package datasets: {INSTALL}") from error
    return datasets
