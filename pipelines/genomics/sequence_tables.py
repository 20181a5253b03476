"""Tables with a sequence in each row: CSV, TSV, workbooks and Parquet, read row by row."""

import csv
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count

from pipelines.genomics.formats import Format, delimiter_of, seekable
from pipelines.genomics.opening import Source, as_text
from pipelines.shared.errors import InputError

ROLES = ("id", "sequence", "label", "group", "split")
"""What the columns are for; they have these names unless others are given."""

SPLIT_NAMES = {
    "train": "train",
    "test": "test",
    "val": "val",
    "dev": "val",
    "valid": "val",
    "validation": "val",
}
"""What splits are called by others, and here."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Under which names, or at which places from 1 in a table without header, the columns stand."""

    names: Mapping[str, str] = field(default_factory=dict)
    where: Mapping[str, object] = field(default_factory=dict)
    """Only rows with this value in this column count."""

    def name(self, role: str) -> str:
        """The name of a column."""
        return str(self.names.get(role, role))

    @property
    def without_header(self) -> bool:
        """Whether columns are named by place."""
        return self.name("sequence").isdigit()


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `number` is its line in the file, the header being line 1."""

    number: int
    id: str
    sequence: str
    label: str | None
    group: str | None
    split: str | None


def read_rows(source: Source, kind: Format, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a table of sequences.

    A row without an id column is called `row` and its line: `row2` is the first below the header.
    Raises InputError, naming file and row, for ragged rows, missing columns and words in a split
    column that name none.
    """
    lines = _LINES[kind](source)
    try:
        number, header = next(lines)
    except StopIteration:
        raise InputError(f"{source.name} holds no rows; give a table with a header") from None
    if columns.without_header:
        lines = _chain((number, header), lines)
        header = [str(place) for place in range(1, len(header) + 1)]
    places = _find_columns(source.name, header, columns)
    wanted = [(header.index(name), str(value)) for name, value in columns.where.items()]
    for number, cells in lines:
        if len(cells) != len(header):
            raise InputError(
                f"{source.name}, row {number}: {len(cells)} fields where the header has "
                f"{len(header)}; quote values that hold the separator"
            )
        if all(cells[place] == value for place, value in wanted):
            yield _row(source.name, number, cells, places)


def normal_split(word: str) -> str | None:
    """Translate what others call a split; None for a word that names none."""
    return SPLIT_NAMES.get(word.strip().lower())


def _row(name: str, number: int, cells: list[str], places: Mapping[str, int]) -> Row:
    values = {role: cells[place].strip() for role, place in places.items()}
    split = values.get("split")
    if split and normal_split(split) is None:
        raise InputError(
            f"{name}, row {number}: {split!r} is no split; use {', '.join(SPLIT_NAMES)}"
        )
    return Row(
        number=number,
        id=values.get("id", f"row{number}"),
        sequence=values["sequence"],
        label=values.get("label") or None,
        group=values.get("group") or None,
        split=normal_split(split) if split else None,
    )


def _find_columns(name: str, header: list[str], columns: Columns) -> dict[str, int]:
    repeated = {title for title in header if header.count(title) > 1}
    required = ["sequence", *(role for role in ROLES if columns.name(role) != role)]
    missing = [columns.name(role) for role in required if columns.name(role) not in header]
    missing += [title for title in columns.where if title not in header]
    if missing:
        shown = ", ".join(repr(title[:40]) for title in header[:12])
        raise InputError(
            f"{name} has no column {missing[0]!r}; it has {shown}; say which it is with "
            "columns.sequence=NAME (columns.sequence=3, the place from 1, where there is no "
            "header); a table of labels alone goes to labels="
        )
    places = {
        role: header.index(columns.name(role)) for role in ROLES if columns.name(role) in header
    }
    if twice := repeated.intersection(header[place] for place in places.values()):
        raise InputError(f"{name}: the header names {min(twice)!r} more than once")
    return places


def _text_lines(source: Source) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # the default stops at 131,072 letters
    start = source.start.decode("utf-8-sig", errors="replace").splitlines()
    header = next((line for line in start if line.strip()), "")
    with as_text(source.stream, newline="") as text:
        reader = csv.reader(text, delimiter=delimiter_of(header), skipinitialspace=True)
        try:
            for cells in reader:
                if any(cells):
                    yield reader.line_num, [cell.strip() for cell in cells]
        except csv.Error as error:
            row = reader.line_num
            raise InputError(f"{source.name}, row {row}: no text table ({error})") from error


def _workbook_lines(source: Source) -> Iterator[tuple[int, list[str]]]:
    from openpyxl import load_workbook

    workbook = load_workbook(seekable(source), read_only=True, data_only=True)
    try:
        for number, values in enumerate(workbook.worksheets[0].iter_rows(values_only=True), 1):
            cells = ["" if value is None else str(value).strip() for value in values]
            if any(cells):
                yield number, cells
    finally:
        workbook.close()


def _parquet_lines(source: Source) -> Iterator[tuple[int, list[str]]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(seekable(source)) as table:
            yield 1, list(table.schema_arrow.names)
            numbers = count(2)
            for batch in table.iter_batches():
                columns = [column.to_pylist() for column in batch.columns]
                for values in zip(*columns, strict=True):
                    cells = ["" if value is None else str(value).strip() for value in values]
                    yield next(numbers), cells
    except (ArrowException, OSError) as error:
        raise InputError(f"{source.name}: damaged Parquet ({error}); copy it again") from error


def _chain(
    first: tuple[int, list[str]], rest: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[int, list[str]]]:
    yield first
    yield from rest


_LINES: dict[str, Callable[[Source], Iterator[tuple[int, list[str]]]]] = {
    "table": _text_lines,
    "workbook": _workbook_lines,
    "parquet": _parquet_lines,
}
