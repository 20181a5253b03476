"""Tables in and out: labels with their rows checked, results written aside and renamed."""

import csv
import gzip
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TextIO, cast

import numpy as np
import pandas as pd

from pipelines.shared.asides import aside_of
from pipelines.shared.errors import InputError

_GZIP_MAGIC = b"\x1f\x8b"
_NUM_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Failure:
    """One item of a batch that could not be processed: a row of `failures.csv`."""

    id: str
    path: str
    status: str
    reason: str
    remedy: str


def read_labels(
    path: Path,
    *,
    id_column: str,
    label_column: str | None = "label",
    numbers: Sequence[str] = (),
    group_column: str | None = None,
    split_column: str | None = "split",
    required: Sequence[str] = (),
    where: Mapping[str, object] | None = None,
    remedy: str = "rename yours, or add it",
) -> pd.DataFrame:
    """Read a label table; its index (`row`) is the line in the file, for messages.

    All values are stripped strings. `group_column` (patients) is filled with the ids where the
    table has none; `split_column` is kept where there is one; `required` columns must be there too.
    Only rows with the values that `where` gives for some columns count. `remedy` ends the message
    about a missing column. Columns of `numbers` are kept as well and turned into floats; without a
    `label_column` there are no classes. Raises InputError for a
    missing or unreadable file, missing columns, no row left by `where`, empty or duplicate ids,
    empty labels, what is no finite number among `numbers`, and a single class.
    """
    table = read_table(path)
    labels = [] if label_column is None else [label_column]
    _require_columns(path, table, [id_column, *labels, *numbers, *required], remedy)
    table = keep_rows(path, table, where or {})
    if group_column is not None and group_column not in table.columns:
        table[group_column] = table[id_column]
    _require_values(path, table, id_column)
    require_unique(path, table, id_column)
    for column in [*labels, *numbers]:
        _require_values(path, table, column)
    if group_column is not None:
        _require_values(path, table, group_column)
    if label_column is not None and table[label_column].nunique() < 2:
        raise InputError(
            f"{path}: all {len(table)} rows have the label {table[label_column].iloc[0]!r}; "
            "a classifier needs at least two classes"
        )
    kept = dict.fromkeys([id_column, *labels, *numbers, group_column, split_column])
    table = table[[column for column in kept if column is not None and column in table.columns]]
    return table.assign(**{column: _numbers(path, table[column]) for column in numbers})


def _numbers(path: Path, column: "pd.Series[str]") -> "pd.Series[float]":
    found = pd.to_numeric(column, errors="coerce").astype("float64")
    wrong = column.index[~np.isfinite(found)].tolist()
    if wrong:
        raise InputError(
            f"{path}, row {wrong[0]}: {column.name} must be a number; got {column[wrong[0]]!r}"
        )
    return found


def keep_rows(
    path: Path, table: pd.DataFrame, where: Mapping[str, object], *, key: str = "where"
) -> pd.DataFrame:
    """Keep the rows of a table, read from `path`, that have the given value in each given column.

    Raises InputError for a column that the table does not have, and when no row is left; `key` is
    the setting that named them.
    """
    for number, (column, wanted) in enumerate(where.items()):
        if column not in table.columns:
            raise InputError(
                f"{path} has no column {column!r} for {key}.{column}={wanted}; "
                f"it has {', '.join(map(repr, table.columns))}"
            )
        kept = table[table[column] == str(wanted)]
        if kept.empty:
            earlier = [f"{key}.{name}={value}" for name, value in list(where.items())[:number]]
            among = f" of the {len(table):,} rows left by {' '.join(earlier)}" if earlier else ""
            raise InputError(
                f"{path}: no row{among} has {str(wanted)!r} in column {column!r}"
                f"{_closest(str(wanted), table[column])}; it holds {_present(table[column])}"
            )
        table = kept
    return table.copy()


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of strings: a workbook's first sheet when it is named .xlsx, else text.

    Text is plain or gzip, by tabs when it is named .tsv, else by commas. The index (`row`) is the
    line in the file. Raises InputError for a missing file, one that is neither a workbook nor UTF-8
    text, and ragged or missing rows.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; a table (.csv, .tsv or .xlsx) is needed")
    if not path.is_file():
        raise InputError(f"{path} does not exist; a table (.csv, .tsv or .xlsx) is needed")
    if path.suffix.lower() == ".xlsx":
        return _frame(path, _sheet_rows(path))
    try:
        with _open_text(path) as file:
            reader = csv.reader(file, delimiter=_delimiter(path))
            lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} is not a text table; save it as CSV in UTF-8 ({error})"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(
            f"{path}: gzip data cut short or damaged; copy or compress it again ({error})"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    return _frame(path, [(number, row) for number, row in lines if any(row)])


def require_unique(path: Path, table: pd.DataFrame, column: str) -> None:
    """Raise InputError, with its rows, where a value stands twice in a column."""
    repeated = table[table[column].duplicated(keep=False)]
    if len(repeated):
        name = repeated[column].iloc[0]
        rows = repeated.index[repeated[column] == name].tolist()
        others = repeated[column].nunique() - 1
        more = f" ({others} more ids are repeated)" if others else ""
        raise InputError(
            f"{path}: {column} {name!r} stands in rows {_listed(rows)}{more}; keep one row per id"
        )


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table (separator as in `read_table`) aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    table.to_csv(aside, sep=_delimiter(path), index=False, lineterminator="\n")
    os.replace(aside, path)


def write_failures(path: Path, failures: Iterable[Failure], *, id_column: str) -> None:
    """Write `failures.csv`; without failures it holds the header only, so that none is stale."""
    columns = [id_column, "path", "status", "reason", "remedy"]
    rows = [(item.id, item.path, item.status, item.reason, item.remedy) for item in failures]
    write_table(path, pd.DataFrame(rows, columns=columns))


def align(rows: Sequence[Sequence[str]]) -> str:
    """Pad the cells of each column to one width."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _sheet_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Rows of a workbook's first sheet with their numbers, cells as text, empty rows left out."""
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with path.open("rb") as file:
            workbook = load_workbook(file, read_only=True, data_only=True)
            values = list(workbook.worksheets[0].iter_rows(values_only=True))
            workbook.close()
    except (zipfile.BadZipFile, InvalidFileException, KeyError, IndexError, ValueError) as error:
        raise InputError(
            f"{path} is not a workbook of Excel's .xlsx; save it as one, or as CSV ({error})"
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    rows = [(number, [_cell_text(cell) for cell in row]) for number, row in enumerate(values, 1)]
    rows = [(number, row) for number, row in rows if any(row)]
    width = max((at + 1 for _, row in rows for at, cell in enumerate(row) if cell), default=0)
    return [(number, [*row, *[""] * width][:width]) for number, row in rows]


def _cell_text(cell: object) -> str:
    """Text of a cell; whole numbers lose the point that workbooks store them with."""
    if cell is None:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    return str(cell).strip()


def _open_text(path: Path) -> TextIO:
    """Open a table as text; gzip is told by its first bytes, not by the name."""
    with path.open("rb") as file:
        compressed = file.read(2) == _GZIP_MAGIC
    if compressed:
        return cast(TextIO, gzip.open(path, "rt", newline="", encoding="utf-8-sig"))
    return path.open(newline="", encoding="utf-8-sig")


def _delimiter(path: Path) -> str:
    return "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ","


def _frame(path: Path, lines: list[tuple[int, list[str]]]) -> pd.DataFrame:
    if len(lines) < 2:
        raise InputError(f"{path} holds {'only a header' if lines else 'nothing'}; rows are needed")
    header = lines[0][1]
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise InputError(f"{path}: the header names {repeated[0]!r} more than once")
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise InputError(
                f"{path}, row {number}: {len(row)} fields where the header has {len(header)}; "
                f"quote values that hold {_delimiter(path)!r}"
            )
    index = pd.Index([number for number, _ in lines[1:]], name="row")
    return pd.DataFrame([row for _, row in lines[1:]], columns=header, index=index, dtype=str)


def _require_columns(path: Path, table: pd.DataFrame, columns: Sequence[str], remedy: str) -> None:
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise InputError(
            f"{path} has no column {' and no column '.join(map(repr, missing))}; "
            f"it has {', '.join(map(repr, table.columns))}; {remedy}"
        )


def _require_values(path: Path, table: pd.DataFrame, column: str) -> None:
    rows = table.index[table[column] == ""].tolist()
    if rows:
        raise InputError(f"{path}, row {_listed(rows)}: {column} is empty; fill it or drop the row")


def _closest(word: str, values: "pd.Series[str]") -> str:
    near = get_close_matches(word, values.unique().tolist(), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _present(values: "pd.Series[str]") -> str:
    """Name the most frequent values with their numbers of rows."""
    counts = values.value_counts()
    shown = [f"{value!r} ({count:,} rows)" for value, count in counts[:_NUM_SHOWN].items()]
    more = f" and {len(counts) - _NUM_SHOWN:,} more" if len(counts) > _NUM_SHOWN else ""
    return ", ".join(shown) + more


def _listed(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
