"""`split`: whole patients into the folds of a cross-validation, as tables that train takes."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.pathology.manifest import map_columns, read_slide_table, strip_ending
from pipelines.pathology.split_tables import SplitTable, read_split_tables
from pipelines.pathology.stored_features import read_contents
from pipelines.shared.errors import InputError
from pipelines.shared.record import RunState, finish_run, open_run
from pipelines.shared.splits import (
    EXTERNAL,
    SCHEMES,
    SPLITS,
    Rows,
    Scheme,
    assign_splits,
    draw_folds,
    require_no_leak,
)
from pipelines.shared.tables import align, keep_rows, read_table, require_unique, write_table

_MOST_CLASSES = 20  # of numbers; more of them are a quantity
_QUANTILES = 4


@dataclass(frozen=True, slots=True)
class Roster:
    """Slides or, where there are no slide ids, patients: a row each, in the table's order.

    `table` has patient_id, and slide_id unless rows are patients, and every column of the label
    table; `strata` is what folds shall hold alike, `stratum` how that is called.
    """

    path: Path
    table: pd.DataFrame
    strata: list[str]
    stratum: str

    @property
    def ids(self) -> list[str]:
        """Slide ids, or patient ids where rows are patients."""
        return list(self.table["slide_id" if "slide_id" in self.table else "patient_id"])

    @property
    def patients(self) -> list[str]:
        """Patient of each row."""
        return list(self.table["patient_id"])


def split(config: dict[str, Any]) -> int:
    """Write splits_0.csv, splits_1.csv, ... and what they hold; with dry_run, only say it."""
    roster = read_roster(
        Path(config["labels"]),
        slides=config["slides"],
        columns=config["columns"],
        where=config["where"],
        stratify=config["stratify"],
    )
    folds = make_folds(roster, config)
    print(f"{describe(roster)}\n\n{format_folds(roster, folds)}")
    out = Path(config["out"])
    if config["dry_run"]:
        print("dry run: nothing is written")
        return 0
    if open_run(out, config) is RunState.FINISHED:
        print(f"{out} holds these splits already")
        return 0
    paths = write_folds(out, roster, folds)
    write_table(out / "summary.csv", summarise_folds(roster, folds))
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    finish_run(out, {"folds": len(folds), "rows": len(roster.ids), "sha256": digests})
    print(f"\n{paths[0]}{f' ... {paths[-1].name}' if len(paths) > 1 else ''}")
    return 0


def read_roster(
    path: Path,
    *,
    slides: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
    stratify: str | None = None,
) -> Roster:
    """Read who is to be split, and what by: `stratify`, else the label, else the event.

    A column of more than 20 different numbers is cut at its quartiles. Raises InputError for
    a table without ids, ids that stand twice or are empty, and a missing column.
    """
    table = read_table(path)
    names = map_columns(path, table.columns, columns)
    table = keep_rows(path, table, where or {})
    for role, name in {"time": "time", "event": "event", **(columns or {}), **names}.items():
        if name in table:
            table[role] = table[name]
    if "slide_id" not in names and "patient_id" in names and slides is not None:
        listed = read_slide_table(Path(slides))
        if "patient_id" not in listed:
            raise InputError(f"{path} labels patients, and {slides} does not say whose slides are")
        index = table.index.name
        table = table.reset_index().merge(listed[["slide_id", "patient_id"]], on="patient_id")
        table = table.set_index(index)
    if "slide_id" in table:
        table["slide_id"] = table["slide_id"].map(strip_ending)
        table["patient_id"] = table.get("patient_id", table["slide_id"])
    if "patient_id" not in table:
        raise InputError(
            f"{path} has no column slide_id or patient_id; it has "
            f"{', '.join(map(repr, table.columns))}; give columns.slide_id=NAME"
        )
    for column in [name for name in ("slide_id", "patient_id") if name in table]:
        _require_filled(path, table, column)
    require_unique(path, table, "slide_id" if "slide_id" in table else "patient_id")
    column = stratify or next((name for name in ("label", "event") if name in table), None)
    if column is None or column not in table:
        raise InputError(
            f"{path} has no column {column or 'label'!r} to stratify by; it has "
            f"{', '.join(map(repr, table.columns))}; give stratify=NAME"
        )
    _require_filled(path, table, column)
    strata, how = _strata(table[column])
    return Roster(path, table, strata, f"{column}{how}")


def make_folds(roster: Roster, config: Mapping[str, Any]) -> list[list[str | None]]:
    """Split of each row in each fold, drawn as `scheme` says, or as `splits` has them.

    None for rows that given tables do not name. Raises InputError for leaks, ids listed.
    """
    contents = read_contents(Path(config["features"])) if config["features"] else {}
    if config["splits"]:
        tables = read_split_tables(Path(config["splits"]))
        folds = [_complete(roster, table, config) for table in tables]
    else:
        folds = [list(splits) for splits in draw_folds(_rows(roster, config), **_scheme(config))]
    for splits in folds:
        named = [row for row, word in enumerate(splits) if word is not None]
        require_no_leak(
            [roster.ids[row] for row in named],
            [roster.patients[row] for row in named],
            [str(splits[row]) for row in named],
            contents=contents,
        )
    return folds


def write_folds(out: Path, roster: Roster, folds: Sequence[Sequence[str | None]]) -> list[Path]:
    """Write splits_0.csv, splits_1.csv, ...: slide_id, patient_id, split."""
    ids = [name for name in ("slide_id", "patient_id") if name in roster.table]
    paths = []
    for number, splits in enumerate(folds):
        table = roster.table[ids].assign(split=list(splits))
        paths.append(out / f"splits_{number}.csv")
        write_table(paths[-1], table[table["split"].notna()])
    return paths


def summarise_folds(roster: Roster, folds: Sequence[Sequence[str | None]]) -> pd.DataFrame:
    """Count rows and patients of each stratum: fold, split, stratum, rows, patients."""
    rows = []
    for number, splits in enumerate(folds):
        counts = Counter(zip(splits, roster.strata, strict=True))
        patients = Counter(
            (word, stratum)
            for word, stratum, _ in set(zip(splits, roster.strata, roster.patients, strict=True))
        )
        for word in (*SPLITS, EXTERNAL):
            for stratum in sorted(set(roster.strata)):
                if any(word == held for held, _ in counts):
                    key = (word, stratum)
                    rows.append((number, word, stratum, counts[key], patients[key]))
    return pd.DataFrame(rows, columns=["fold", "split", roster.stratum, "rows", "patients"])


def format_folds(roster: Roster, folds: Sequence[Sequence[str | None]]) -> str:
    """Return a line per fold and split, a column per stratum: patients."""
    summary = summarise_folds(roster, folds)
    wide = summary.pivot_table(
        index=["fold", "split"], columns=summary.columns[2], values="patients", sort=False
    )
    lines = [["fold", "split", *(f"{name}" for name in wide.columns), "patients"]]
    for key, row in zip(wide.index, wide.to_numpy(), strict=True):
        lines.append([str(key[0]), str(key[1]), *(f"{n:.0f}" for n in row), f"{row.sum():.0f}"])
    return align(lines)


def describe(roster: Roster) -> str:
    """Say how many there are of whom."""
    kind = "slides" if "slide_id" in roster.table else "patients"
    patients = f" of {len(set(roster.patients)):,} patients" if kind == "slides" else ""
    return f"{len(roster.ids):,} {kind}{patients}, stratified by {roster.stratum}"


def _scheme(config: Mapping[str, Any]) -> dict[str, Any]:
    scheme: Scheme = config["scheme"]
    if scheme not in SCHEMES:
        raise InputError(f"scheme is one of {', '.join(SCHEMES)}; got {scheme!r}")
    names = ("folds", "val_fraction", "test_fraction", "seed")
    return {"scheme": scheme, **{name: config[name] for name in names}}


def _rows(roster: Roster, config: Mapping[str, Any]) -> Rows:
    table, sites = roster.table, None
    if config["scheme"] == "site":
        if not config["site"] or config["site"] not in table:
            raise InputError(
                f"scheme=site needs site=COLUMN of {roster.path}; it has "
                f"{', '.join(map(repr, table.columns))}"
            )
        _require_filled(roster.path, table, config["site"])
        sites = list(table[config["site"]])
    external = None
    if config["external"]:
        inside = keep_rows(roster.path, table, config["external"], key="external").index
        external = [row in set(inside) for row in table.index]
    return Rows(roster.ids, roster.strata, roster.patients, sites, external)


def _complete(roster: Roster, table: SplitTable, config: Mapping[str, Any]) -> list[str | None]:
    """Splits that a given table names, with validation cut out of train where it has none."""
    slides = roster.ids if "slide_id" in roster.table else [""] * len(roster.ids)
    splits = table.split_rows(slides, roster.patients)
    if "val" in splits:
        return splits
    rows = [row for row, word in enumerate(splits) if word in ("train", "test")]
    drawn = assign_splits(
        ids=[roster.ids[row] for row in rows],
        labels=[roster.strata[row] for row in rows],
        groups=[roster.patients[row] for row in rows],
        given=[str(splits[row]) for row in rows],
        val_fraction=config["val_fraction"],
        seed=config["seed"],
    )
    for row, word in zip(rows, drawn, strict=True):
        splits[row] = word
    return splits


def _strata(values: "pd.Series[str]") -> tuple[list[str], str]:
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.notna().all() and numbers.nunique() > _MOST_CLASSES:
        cut = pd.qcut(numbers, _QUANTILES, labels=False, duplicates="drop")
        return [f"quarter {int(part) + 1}" for part in cut], ", cut at its quartiles"
    return list(values), ""


def _require_filled(path: Path, table: pd.DataFrame, column: str) -> None:
    empty = table.index[table[column] == ""].tolist()
    if empty:
        raise InputError(f"{path}, row {empty[0]}: {column} is empty; fill it or drop the row")
