"""Where a batch's lines come from: JSONL, and a column of a CSV or parquet file. Nothing is read ahead."""

import csv
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxengine.errors import ConfigError, RequestError

Line = Mapping[str, Any] | RequestError  # a line that is no object says so when its turn comes
TABLES = (".csv", ".parquet")
COMPLETIONS = "/v1/completions"  # what a table's prompts are for, unless the caller says otherwise


@dataclass(frozen=True)
class Source:
    """Lines, how many (None: not known yet), and the columns of the table that they are from."""

    lines: Iterator[Any]
    total: int | None = None
    table: Mapping[str, Any] | None = None


def open_source(
    source: str | os.PathLike | Iterable[Any], column: str | None, id_column: str | None, url: str | None
) -> Source:
    """Raises ConfigError as `read_lines` does, and for columns of an iterable."""
    if isinstance(source, str | os.PathLike):
        lines = read_lines(source, column, id_column, url)
        table = {"column": column, "id_column": id_column, "url": url or COMPLETIONS} if column else None
        return Source(lines, count_lines(source), table)
    if column or id_column or url:
        raise ConfigError("column, id_column and url are for tables; the lines of an iterable say these themselves")
    return Source(iter(source))


def read_lines(path: str | os.PathLike, column: str | None, id_column: str | None, url: str | None) -> Iterator[Line]:
    """The lines of a batch. Of a table, each row's `column` is a prompt (or, for chat completions, a user's message).

    id_column: the custom_id; None: row-0, row-1 ... Raises ConfigError for a column that is not there, and for a
    format whose reader is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file")
    if path.suffix not in TABLES:
        if column or id_column or url:
            raise ConfigError(f"{path}: columns and url are of {' and '.join(TABLES)} files, this is read as JSONL")
        return _jsonl(path)
    if column is None:
        raise ConfigError(f"{path}: name the column with the prompts (column=, or --column)")
    return _table(path, column, id_column, url or COMPLETIONS)


def count_lines(path: str | os.PathLike) -> int | None:
    """How many requests a file holds; None: that takes reading it all."""
    path = Path(path)
    if path.suffix == ".parquet":
        with _parquet(path) as file:
            return file.metadata.num_rows
    if path.suffix == ".csv" or not path.is_file():  # a quoted text may hold line ends; a pipe is read once
        return None
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")


def _jsonl(path: Path) -> Iterator[Line]:
    with open(path, "rb") as file:
        for text in file:
            yield parse(text)


def parse(text: bytes) -> Line:
    """An empty line is an empty object, for the numbers of the others to stay."""
    if not text.strip():
        return {}
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:  # bad UTF-8 too
        return RequestError(f"not valid JSON: {error}")
    return line if isinstance(line, dict) else RequestError(f"{text[:80]!r} is not an object")


def _table(path: Path, column: str, id_column: str | None, url: str) -> Iterator[Line]:
    columns = [column] if id_column is None else [column, id_column]
    for i, row in enumerate(_csv_rows(path, columns) if path.suffix == ".csv" else _parquet_rows(path, columns)):
        value, custom_id = row[column], f"row-{i}" if id_column is None else row[id_column]
        body = {"messages": [{"role": "user", "content": value}]} if "chat" in url else {"prompt": value}
        yield {"custom_id": custom_id if custom_id is None else str(custom_id), "url": url, "body": body}


def _csv_rows(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # a prompt may be longer than the 128 KiB that hold otherwise
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        try:
            _check_columns(path, columns, reader.fieldnames or ())
            yield from reader
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: line {reader.line_num + 1} cannot be read: {error}") from error


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    with _parquet(path) as file:
        _check_columns(path, columns, file.schema_arrow.names)
        for batch in file.iter_batches(columns=columns):
            yield from batch.to_pylist()


def _check_columns(path: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    if missing := [column for column in columns if column not in names]:
        raise ConfigError(f"{path} has no column {missing[0]!r}; it has {list(names)}")


def _parquet(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(f"{path}: parquet files need pyarrow: pip install pyarrow") from error
    return ParquetFile(path)
