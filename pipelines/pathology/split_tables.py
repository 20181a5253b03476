"""Tables that say which slides or patients train, select and test: ours, CLAM's and others'.

    ours         slide_id and/or patient_id, split (train, val, test, external); a file per fold
    CLAM         splits_K.csv: columns train, val, test of ids, of unequal length; or, as
                 splits_K_bool.csv, ids in the first column and True or False in the others
    STAMP        splits.json: {"splits": [{"train_patients": [...], "test_patients": [...]}]}
    Patho-Bench  case_id and/or slide_id, and columns fold_0, fold_1, ... of train and test

Where a table has no validation rows, they are cut out of train by whoever uses it. Where it names
the patient of each slide, its own patients must be whole, whatever the labels say of them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipelines.pathology.manifest import strip_ending
from pipelines.shared.errors import InputError
from pipelines.shared.splits import EXTERNAL, SPLITS, require_no_leak
from pipelines.shared.tables import read_table

_WORDS = (*SPLITS, EXTERNAL)
_FOLD_FILE = re.compile(r"^splits_(\d+)\.csv$")
_FOLD_COLUMN = re.compile(r"^fold_(\d+)$")
_PATIENTS = ("patient_id", "case_id", "PATIENT", "pat_id")
_TRUTH = {"true": True, "1": True, "false": False, "0": False, "": False}


@dataclass(frozen=True, slots=True)
class SplitTable:
    """One fold: the split of each id, and whose ids these are where the table says so."""

    source: Path
    splits: Mapping[str, str]
    of: str | None  # slide_id, patient_id, or not known from the table

    def split_rows(self, slide_ids: Sequence[str], patient_ids: Sequence[str]) -> list[str | None]:
        """Return the split of each row, None where the table does not name it.

        Where the table does not say, its ids are slides if any of them is one, else patients.
        Raises InputError when no row is named.
        """
        named = {"slide_id": list(slide_ids), "patient_id": list(patient_ids)}
        kinds = [self.of] if self.of else ["slide_id", "patient_id"]
        for kind in kinds:
            found = [self.splits.get(name) for name in named[kind]]
            if any(found):
                return found
        raise InputError(
            f"{self.source} names none of the slides: it has {_some(list(self.splits))}, "
            f"the labels {_some(named['slide_id'])} of {_some(named['patient_id'])}"
        )


def read_split_tables(path: Path) -> list[SplitTable]:
    """Read all folds of a table, a JSON file, or a folder with splits_0.csv, splits_1.csv, ...

    Raises InputError for a table of another kind, ids or patients that stand in two splits of one
    fold, and words that are no split.
    """
    if path.is_dir():
        numbered = {
            int(match[1]): file for file in path.iterdir() if (match := _FOLD_FILE.match(file.name))
        }
        if not numbered:
            raise InputError(f"{path} holds no splits_0.csv, splits_1.csv, ...")
        return [read_fold(numbered[number]) for number in sorted(numbered)]
    if path.suffix.lower() == ".json":
        return _read_stamp(path)
    table = read_table(path)
    columns = [name for name in table.columns if _FOLD_COLUMN.match(name)]
    return _read_fold_columns(path, table, columns) if columns else [_read_fold(path, table)]


def read_fold(path: Path) -> SplitTable:
    """Read a table of one fold."""
    return _read_fold(path, read_table(path))


def _read_fold(path: Path, table: pd.DataFrame) -> SplitTable:
    if "split" in table:
        return _collect_column(path, table, "split")
    sides = [name for name in SPLITS if name in table]
    if not {"train", "test"} <= set(sides):
        raise InputError(
            f"{path} is no table of splits: it needs slide_id or patient_id and split, or columns "
            f"train, val, test of ids; it has {', '.join(map(repr, table.columns))}"
        )
    values = {cell.lower() for name in sides for cell in table[name]}
    if values <= set(_TRUTH):
        return _collect(path, _bool_pairs(path, table, sides), None)
    pairs = [(cell, name) for name in sides for cell in table[name] if cell]
    return _collect(path, pairs, None)


def _bool_pairs(path: Path, table: pd.DataFrame, sides: list[str]) -> list[tuple[str, str]]:
    ids = table.columns[0]
    if ids in sides:
        raise InputError(f"{path} holds True and False, and no column of ids before them")
    pairs = []
    for row, record in zip(table.index, table.to_dict("records"), strict=True):
        chosen = [name for name in sides if _TRUTH[record[name].lower()]]
        if len(chosen) > 1:
            raise InputError(f"{path}, row {row}: {record[ids]} is in {' and in '.join(chosen)}")
        pairs += [(record[ids], name) for name in chosen]
    return pairs


def _read_fold_columns(path: Path, table: pd.DataFrame, columns: list[str]) -> list[SplitTable]:
    numbered = sorted(columns, key=lambda name: int(name.removeprefix("fold_")))
    return [_collect_column(path, table[table[name] != ""], name) for name in numbered]


def _collect_column(path: Path, table: pd.DataFrame, column: str) -> SplitTable:
    kind, ids = _ids_of(path, table)
    found = _collect(path, list(zip(table[ids], table[column], strict=True)), kind)
    patients = next((name for name in _PATIENTS if name in table), None)
    if kind == "slide_id" and patients is not None:
        known = table[(table[patients] != "") & ~table[ids].duplicated()]
        try:
            require_no_leak(list(known[ids]), list(known[patients]), list(known[column]))
        except InputError as leak:
            raise InputError(f"{path}: by its own column {patients}, {leak}") from None
    return found


def _read_stamp(path: Path) -> list[SplitTable]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        folds = [
            [(str(name), side) for side in SPLITS for name in fold.get(f"{side}_patients", [])]
            for fold in content["splits"]
        ]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{path} is not as STAMP writes it: {{"splits": [{{"train_patients": [...], '
            f'"test_patients": [...]}}]}} ({error})'
        ) from error
    return [_collect(path, fold, "patient_id") for fold in folds]


def _ids_of(path: Path, table: pd.DataFrame) -> tuple[str, str]:
    if "slide_id" in table:
        return "slide_id", "slide_id"
    for name in _PATIENTS:
        if name in table:
            return "patient_id", name
    raise InputError(
        f"{path} has no column slide_id or patient_id; it has {', '.join(map(repr, table.columns))}"
    )


def _collect(path: Path, pairs: Sequence[tuple[str, str]], kind: str | None) -> SplitTable:
    splits: dict[str, str] = {}
    torn: dict[str, set[str]] = {}
    for name, word in pairs:
        if word not in _WORDS:
            raise InputError(f"{path}: split of {name!r} is {word!r}; use {', '.join(_WORDS)}")
        key = name if kind == "patient_id" else strip_ending(name)
        if splits.setdefault(key, word) != word:
            torn.setdefault(key, {splits[key]}).add(word)
    if torn:
        listed = "; ".join(f"{name}: {', '.join(sorted(words))}" for name, words in torn.items())
        raise InputError(f"{path}: {len(torn)} ids stand in more than one split: {listed}")
    for needed in ("train", "test"):
        if needed not in splits.values():
            raise InputError(f"{path}: no id is in {needed}")
    return SplitTable(path, splits, kind)


def _some(names: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(names))
    return ", ".join(map(repr, distinct[:3])) + (", ..." if len(distinct) > 3 else "")
