"""Reads JSONL, JSON, CSV and Parquet files into rows that know their place, one at a time."""

from __future__ import annotations

import codecs
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.records import RowError

READ_BATCH = 1000
EXCERPT = 60
CSV_JSON_COLUMNS = ("messages", "responses", "ranks", "scores", "margin", "score_chosen", "score_rejected")
"""CSV cells of these columns hold JSON; every other cell is text."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its place and its columns."""

    where: str
    values: dict[str, Any]


@dataclass(slots=True)
class ReadTally:
    """What a reader passed over without an error, and which revision of a hub data set it read."""

    empty_lines: int = 0
    hub: dict[str, str] = field(default_factory=dict)


Rows = Iterator[Row | RowError]


def excerpt(value: object) -> str:
    """The value as one short line for an error message."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return f"'{text[:EXCERPT]}...'" if len(text) > EXCERPT else f"'{text}'"


def _read_jsonl(path: Path, tally: ReadTally) -> Rows:
    with path.open("rb") as file:
        yield from _jsonl_rows(path, file, tally)


def _read_gzipped_jsonl(path: Path, tally: ReadTally) -> Rows:
    try:
        with gzip.open(path) as file:
            yield from _jsonl_rows(path, file, tally)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file ({error}).", mend="Make or copy the file again.") from error


def _jsonl_rows(path: Path, lines: Iterable[bytes], tally: ReadTally) -> Rows:
    for number, line in enumerate(lines, 1):
        content = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not content.strip():
            tally.empty_lines += 1
            continue
        try:
            yield _json_row(f"{path}:{number}", content)
        except RowError as error:
            yield error


def _json_row(where: str, line: bytes) -> Row:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        near = line[max(0, error.start - 20) : error.start + 20].decode("utf-8", "replace")
        raise RowError(
            where,
            f"byte {error.start + 1} is not UTF-8, near {excerpt(near)}.",
            "Save the file as UTF-8.",
        ) from error
    except json.JSONDecodeError as error:
        tail = excerpt(line.decode("utf-8")[-EXCERPT:])
        if not line.endswith(b"\n"):
            raise RowError(
                where,
                f"the last line stops in the middle of a row, after {tail}: the file is truncated.",
                "Make or copy the file again, or delete its last line.",
            ) from error
        near = excerpt(error.doc[max(0, error.pos - 20) :])
        raise RowError(
            where,
            f"not JSON at column {error.colno} ({error.msg}), near {near}.",
            "Write one JSON object per line.",
        ) from error
    return _object_row(where, values)


def _object_row(where: str, values: object) -> Row:
    if isinstance(values, dict):
        return Row(where, values)
    raise RowError(
        where,
        f"a row must be an object of columns, not {excerpt(values)}.",
        'Write it as {"column": value, ...}.',
    )


def _read_json(path: Path, tally: ReadTally) -> Rows:
    """A list of rows or `{"data": [rows]}`; JSONL under the wrong suffix is read as such."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start + 1} is not UTF-8.", mend="Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.doc.lstrip().startswith("{"):
            yield from _read_jsonl(path, tally)
            return
        raise UserError(
            f"{path}:{error.lineno}: not JSON at column {error.colno} ({error.msg}), "
            f"near {excerpt(error.doc[max(0, error.pos - 20) :])}.",
            mend="The file must hold one JSON list of rows; perhaps it was cut off in writing.",
        ) from error
    rows = content["data"] if isinstance(content, dict) and "data" in content else content
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: must hold a list of rows, not {excerpt(rows)}.",
            mend='Write it as [{...}, ...] or {"data": [{...}, ...]}.',
        )
    for index, values in enumerate(rows, 1):
        try:
            yield _object_row(f"{path}:row {index}", values)
        except RowError as error:
            yield error


def _read_csv(path: Path, tally: ReadTally) -> Rows:
    """Comma-separated with a header line; a row's place is the line it begins on."""
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            raise UserError(
                f"{path}:1: the header line must name every column once, not {excerpt(header)}.",
                mend="Put the column names on the first line.",
            )
        while True:
            where = f"{path}:{reader.line_num + 1}"
            try:
                cells = next(reader, None)
                if cells is None:
                    return
                if not cells:
                    tally.empty_lines += 1
                    continue
                yield _csv_row(where, header, cells)
            except csv.Error as error:
                yield RowError(
                    where,
                    f"not CSV ({error}).",
                    "Close every quoted cell and double the quotes inside it.",
                )
            except RowError as error:
                yield error


def _csv_row(where: str, header: list[str], cells: list[str]) -> Row:
    if len(cells) != len(header):
        raise RowError(
            where,
            f"has {len(cells)} cells, but the header names {len(header)} columns; the row begins {excerpt(cells[0])}.",
            "Quote cells that hold commas or line breaks.",
        )
    values: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=True):
        if any("\udc80" <= character <= "\udcff" for character in cell):
            shown = excerpt(cell.encode("utf-8", "replace").decode())
            raise RowError(where, f"`{column}` is not UTF-8: {shown}.", "Save the file as UTF-8.")
        values[column] = _csv_value(where, column, cell)
    return Row(where, values)


def _csv_value(where: str, column: str, cell: str) -> Any:
    if column not in CSV_JSON_COLUMNS:
        return cell
    if not cell.strip():
        return None
    try:
        return json.loads(cell)
    except json.JSONDecodeError as error:
        raise RowError(
            where,
            f"`{column}` must hold JSON in a CSV file, not {excerpt(cell)}.",
            'Write lists as ["a", "b"] and numbers plainly.',
        ) from error


def _read_parquet(path: Path, tally: ReadTally) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from arrow_rows(file.iter_batches(batch_size=READ_BATCH), str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} is not a whole Parquet file ({str(error).splitlines()[0]}).",
            mend="Make or copy the file again.",
        ) from error


def arrow_rows(batches: Iterable[Any], path: str) -> Rows:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield Row(f"{path}:row {number}", values)


READERS: dict[str, Callable[[Path, ReadTally], Rows]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl.gz": _read_gzipped_jsonl,
}


def is_data_file(path: Path) -> bool:
    """Whether the end of its name says that `read_file` reads it."""
    return path.name.endswith(tuple(READERS))


def read_file(path: Path, tally: ReadTally) -> Rows:
    """The rows of a data file in order; an unreadable one comes as the RowError it causes."""
    return next(reader for suffix, reader in READERS.items() if path.name.endswith(suffix))(path, tally)
