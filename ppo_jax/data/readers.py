"""Rows of data, whatever holds them: JSON lines, gzipped or not, Parquet, a data set of a hub.

A row is a dictionary, and has a place by which every mistake in it is told: "texts.jsonl:3",
"texts.parquet: row 3", "hub:owner/name:train: row 3". Lines and rows are counted from 1.
"""

import contextlib
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

HUB = "hub:"  # "hub:owner/name" or "hub:owner/name:split", through the `datasets` library
INSTALL = "pip install 'ppo_jax[data]'"

Row = dict[str, Any]
Forms = Sequence[tuple[str, ...]]  # the sets of keys that a row may have, the plainest first


class Table(NamedTuple):
    """Rows that all have the same columns."""

    columns: list[str]
    rows: Callable[[Sequence[str]], Iterable[Row]]  # the rows, with these columns alone


def read_rows(path: str | os.PathLike, forms: Forms) -> Iterator[tuple[str, Row]]:
    """Yields (place, row), each row with the keys of one of the forms.

    A JSON line has exactly these keys. A table may have other columns: it is read in the last of
    the forms whose columns it has, see `unread_columns`.

    Args:
        path: a .parquet file, "hub:owner/name[:split]", or else JSON lines, with .gz gzipped.
        forms: the sets of keys that a row may have, the plainest first.

    Raises:
        ValueError: "place: what is wrong", or what the path lacks as a whole.
    """
    if is_table(path):
        yield from table_rows(path, forms)
        return
    for place, row in json_lines(path):
        if not any(row.keys() == set(form) for form in forms):
            raise ValueError(f"{place}: the keys must be {listed(forms)}, got {list(row)}")
        yield place, row


def unread_columns(path: str | os.PathLike, forms: Forms) -> list[str]:
    """The columns of a table that its form does not have; of JSON lines there are none.

    Args:
        path: as for `read_rows`.
        forms: those that it is read with.
    """
    if not is_table(path):
        return []
    columns = open_table(path).columns
    return [name for name in columns if name not in form_of(path, columns, forms)]


class NothingUsable(ValueError):
    """No record of a data set is left.

    Args:
        message: why.
        too_long: whether some of them are too long, and a higher limit would help.
    """

    def __init__(self, message: str, too_long: bool):
        super().__init__(message)
        self.too_long = too_long


@contextlib.contextmanager
def naming_data(field: str, path: str | os.PathLike, limit: str) -> Iterator[None]:
    """Errors about a data set as a whole begin with its field and file.

    Args:
        field: of the config, "sft.data" for instance.
        path: what the field holds.
        limit: what sets the most tokens; named where records are too long.
    """
    try:
        yield
    except ValueError as error:
        too_long = isinstance(error, NothingUsable) and error.too_long
        see = f"; see {limit}" if too_long else ""
        raise ValueError(f"{field}: {path}: {error}{see}") from error


def is_hub(path: str | os.PathLike) -> bool:
    """Whether a path is the name of a data set on a hub."""
    return str(path).startswith(HUB)


def is_table(path: str | os.PathLike) -> bool:
    return is_hub(path) or Path(path).suffix == ".parquet"


def check_packages(path: str | os.PathLike):
    """Refuse what needs a package that is not there, or a hub's name that is none.

    Raises:
        ValueError: with the command that installs the package.
    """
    if is_hub(path):
        hub_name(path)
        import_datasets(path)
    elif is_table(path):
        import_parquet(path)


def string(row: Row, key: str, place: str) -> str:
    """The text under a key.

    Raises:
        ValueError: it is no text, or none that can be encoded.
    """
    value = row[key]
    if not isinstance(value, str):
        raise ValueError(f"{place}: {key} must be a string, got {shown(value)}")
    # JSON can spell half a surrogate pair, which no tokenizer can encode.
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{place}: {key} must be valid Unicode, got {shown(value)}")
    return value


def finite(value: Any, what: str, place: str) -> float:
    """A finite number, as a float.

    Args:
        value: what the row holds.
        what: its name in the message.
        place: of the row.

    Raises:
        ValueError: it is none.
    """
    # In JSON true is no number, though Python takes it for 1. The limit is for float32.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= 1e30:
        raise ValueError(f"{place}: {what} must be a finite number up to 1e30, got {shown(value)}")
    return float(value)


def shown(value: Any) -> str:
    """A value in a message: all of it, or how it begins."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def listed(forms: Forms) -> str:
    return " or ".join(str(list(form)) for form in forms)


# --- JSON lines -----------------------------------------------------------------------------------


def json_lines(path: str | os.PathLike) -> Iterator[tuple[str, Row]]:
    """Yields ("file:line", object) for each line that is not blank.

    Raises:
        ValueError: no such file, no object in it, or "file:line: what is wrong".
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    number, empty = 0, True
    opened = gzip.open(path) if Path(path).suffix == ".gz" else open(path, "rb")
    try:
        # As bytes, because some characters inside a JSON string end a line of text for Python.
        with opened as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    empty = False
                    yield f"{path}:{number}", json_object(line, f"{path}:{number}")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: the gzip file is damaged: {error}") from error
    if empty:
        raise ValueError(f"{path}: the file is empty, at least one line is needed")


def json_object(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip("\r\n"), object_pairs_hook=without_repeats)
    except json.JSONDecodeError as error:  # which would name a line of this line
        why = f"{error.msg} at column {error.colno}"
        raise ValueError(f"{place}: not a JSON object on one line: {why}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not a JSON object on one line: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a line must be a JSON object {{...}}, got {shown(row)}")
    return row


def without_repeats(items: list[tuple[str, Any]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        raise ValueError(f"a key stands twice in {[key for key, _ in items]}")
    return row


# --- tables ---------------------------------------------------------------------------------------


def table_rows(path: str | os.PathLike, forms: Forms) -> Iterator[tuple[str, Row]]:
    table = open_table(path)
    number = 0
    for number, row in enumerate(table.rows(form_of(path, table.columns, forms)), start=1):
        yield f"{path}: row {number}", row
    if not number:
        raise ValueError(f"{path}: the table is empty, at least one row is needed")


def form_of(path: str | os.PathLike, columns: Sequence[str], forms: Forms) -> tuple[str, ...]:
    """The last, the richest, of the forms whose columns a table has."""
    for form in reversed(forms):
        if set(form) <= set(columns):
            return form
    raise ValueError(f"{path}: the columns must include {listed(forms)}, got {list(columns)}")


def open_table(path: str | os.PathLike) -> Table:
    return open_hub(path) if is_hub(path) else open_parquet(path)


def open_parquet(path: str | os.PathLike) -> Table:
    """A Parquet file, read a batch of rows at a time."""
    parquet = import_parquet(path)
    if not Path(path).is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error

    def rows(columns: Sequence[str]) -> Iterator[Row]:
        try:
            for batch in file.iter_batches(columns=list(columns)):
                yield from batch.to_pylist()
        except OSError as error:
            raise ValueError(f"{path}: the Parquet file is damaged: {error}") from error

    return Table(file.schema_arrow.names, rows)


def open_hub(path: str | os.PathLike) -> Table:
    """One split of a data set, which `datasets` fetches once and keeps in its cache."""
    name, split = hub_name(path)
    datasets = import_datasets(path)
    try:
        data = datasets.load_dataset(name, split=split)
    # Whatever fails in there: the name, the split, the network, the format of the files.
    except Exception as error:
        raise ValueError(f"{path}: datasets could not load it: {error}") from error
    return Table(data.column_names, lambda columns: data.select_columns(list(columns)))


def hub_name(path: str | os.PathLike) -> tuple[str, str]:
    """(name, split) of "hub:owner/name[:split]"; the split is "train" where none is given."""
    name, _, split = str(path).removeprefix(HUB).partition(":")
    if len(name.split("/")) != 2 or not all(name.split("/")):
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
