"""Tables of predictions as training writes them, read back as folds to score.

One row per item of validation and test: an id, maybe a group (patient), `split`, and
classes: `label`, `prediction`, `probability_CLASS` of each class; several labels:
`label_LABEL` (1 or 0) and `probability_LABEL` of each; numbers: `target`, `prediction`; tracks, a
row for each stretch of a sequence: the columns of `table_of_track`, each as `TRACK.COLUMN`;
survival: `time`, `event`, `risk`, and maybe `group`, high or low against the training median.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines.shared.errors import InputError
from pipelines.shared.evaluation import Fold
from pipelines.shared.metrics import (
    ClassPredictions,
    JointPredictions,
    OneTarget,
    Predictions,
    RiskPredictions,
    ValuePredictions,
)
from pipelines.shared.splits import EXTERNAL
from pipelines.shared.stretches import Moments, StretchPredictions
from pipelines.shared.tables import read_table

TABLE = "predictions.csv"
MODEL = "model"
_PREFIX = "probability_"
_LABEL = "label_"
_COUNTS = ".bases"
_MOMENTS = tuple(item.name for item in fields(Moments))
_SPLITS = ("val", "test", EXTERNAL)

Parts = dict[str, Fold]
"""Rows of one trained model by split: val, test, external; those that there are."""


def find_tables(run: Path) -> dict[str, list[Path]]:
    """Tables of each model of a run, one per fold; of a table itself, that one.

    A run's folder holds `predictions.csv` and `models/NAME/predictions.csv`, or folders fold_0,
    fold_1, ... that do. Raises InputError where there is none, and where a fold lacks a model.
    """
    if run.is_file():
        return {run.stem: [run]}
    if not run.is_dir():
        raise InputError(f"{run} does not exist; give a run's folder or a table of predictions")
    folds = sorted(run.glob("fold_[0-9]*"), key=lambda path: int(path.name.split("_")[1]))
    held = [_tables_of(folder) for folder in folds or [run]]
    for folder, tables in zip(folds or [run], held, strict=True):
        if MODEL not in tables:
            raise InputError(f"{folder} holds no {TABLE}; let its run finish first")
        lacking = sorted(set().union(*held) - set(tables))
        if lacking:
            raise InputError(f"{folder} has no predictions of {', '.join(lacking)}, other folds do")
    return {name: [tables[name] for tables in held] for name in held[0]}


def read_parts(
    path: Path,
    *,
    group_column: str | None = None,
    by_group: bool = False,
    order: Sequence[str] | None = None,
) -> Parts:
    """Read a table of predictions; its first column is the id, all rows are test without `split`.

    `by_group` makes one row of all rows of a group: probabilities, numbers and risks are averaged,
    and what is known must be the same for all of them. `order` names the classes from low to high.
    Raises InputError for other tables, values that are no numbers, and ids that stand twice.
    """
    table = read_table(path)
    ids = table.iloc[:, 0]
    groups = ids if group_column is None else table.get(group_column, ids)
    splits = table["split"] if "split" in table else pd.Series("test", index=table.index)
    unknown = sorted(set(splits) - set(_SPLITS) - {"train"})
    if unknown:
        raise InputError(f"{path}: split {unknown[0]!r} is none of {', '.join(_SPLITS)}")
    predictions = _predictions(path, table, tuple(order) if order else None)
    parts: Parts = {}
    for split in _SPLITS:
        rows = np.flatnonzero((splits == split).to_numpy())
        if len(rows) == 0:
            continue
        part = Fold(tuple(ids.iloc[rows]), tuple(groups.iloc[rows]), predictions.take(rows))
        repeated = pd.Series(part.ids).loc[lambda names: names.duplicated()]
        if len(repeated):
            raise InputError(f"{path}: {repeated.iloc[0]!r} stands twice in {split}")
        parts[split] = merge_groups(path, part) if by_group else part
    if "test" not in parts:
        raise InputError(f"{path} holds no test row")
    return parts


def table_of_track(name: str, given: StretchPredictions) -> pd.DataFrame:
    """Columns of a table of stretches for one track: `NAME.bases` and what `sum_up` found."""
    table = {"bases": given.counts.astype(np.int64)}
    table |= {item: getattr(given.of_values, item) for item in _MOMENTS}
    table |= {f"rank_{item}": getattr(given.of_ranks, item) for item in _MOMENTS}
    return pd.DataFrame({f"{name}.{key}": values for key, values in table.items()}).assign(
        **{f"{name}.absolute_error": given.errors}
    )


def merge_groups(path: Path, part: Fold) -> Fold:
    """Make one row of each group, in the order in which they first stand."""
    names, first, inverse = np.unique(part.groups, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    of = place[inverse]
    merged = tuple(str(name) for name in names[order])
    given = part.predictions
    known = _known(given)
    for row, at in enumerate(of):
        if known[row] != known[first[order][at]]:
            raise InputError(
                f"{path}: rows of {merged[at]!r} differ in what is known of them "
                f"({known[first[order][at]]} and {known[row]}); score the rows instead"
            )
    kept = given.take(first[order])
    return Fold(merged, merged, _averaged(given, kept, of))


def _tables_of(folder: Path) -> dict[str, Path]:
    own = {MODEL: folder / TABLE} if (folder / TABLE).is_file() else {}
    others = sorted((folder / "models").glob(f"*/{TABLE}"))
    return own | {path.parent.name: path for path in others if path.parent.name not in own}


def _predictions(path: Path, table: pd.DataFrame, order: tuple[str, ...] | None) -> Predictions:
    named = [str(name) for name in table.columns]
    classes = [name.removeprefix(_PREFIX) for name in named if name.startswith(_PREFIX)]
    if classes and "label" in table:
        return _classes(path, table, classes, order)
    if classes and {f"{_LABEL}{name}" for name in classes} <= set(table):
        return JointPredictions({name: _label(path, table, name) for name in classes})
    tracks = [name.removesuffix(_COUNTS) for name in named if name.endswith(_COUNTS)]
    if tracks:
        return JointPredictions({name: _track(path, table, name) for name in tracks})
    if {"time", "event", "risk"} <= set(table):
        events = _numbers(path, table, "event")
        high = (table["group"] == "high").to_numpy() if "group" in table else None
        return RiskPredictions(
            _numbers(path, table, "time"), events == 1, _numbers(path, table, "risk"), high
        )
    if {"target", "prediction"} <= set(table):
        return ValuePredictions(
            _numbers(path, table, "target"), _numbers(path, table, "prediction")
        )
    raise InputError(
        f"{path} is no table of predictions: it needs label and probability_CLASS of each class, "
        "label_LABEL and probability_LABEL of each label, target and prediction, or time, event "
        "and risk; "
        f"it has {', '.join(map(repr, table.columns))}"
    )


def _classes(
    path: Path, table: pd.DataFrame, classes: list[str], order: tuple[str, ...] | None
) -> ClassPredictions:
    if order is not None and sorted(order) != sorted(classes):
        raise InputError(
            f"class_order must name each of {', '.join(classes)} once; got {', '.join(order)}"
        )
    unknown = sorted(set(table["label"]) - set(classes))
    if unknown:
        raise InputError(f"{path}: label {unknown[0]!r} has no column {_PREFIX}{unknown[0]}")
    labels = np.array([classes.index(label) for label in table["label"]], dtype=np.int64)
    shares = np.stack([_numbers(path, table, f"{_PREFIX}{name}") for name in classes], axis=1)
    wrong = np.flatnonzero(np.abs(shares.sum(axis=1) - 1) > 1e-3)
    if len(wrong):
        raise InputError(
            f"{path}, row {table.index[wrong[0]]}: probabilities add up to "
            f"{shares[wrong[0]].sum():.4f}"
        )
    return ClassPredictions(tuple(classes), labels, shares, order=order)


def _track(path: Path, table: pd.DataFrame, name: str) -> StretchPredictions:
    missing = [f"{name}.{item}" for item in _track_columns() if f"{name}.{item}" not in table]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; predictions of tracks need it")
    values, ranks = (
        Moments(*(_numbers(path, table, f"{name}.{before}{item}") for item in _MOMENTS))
        for before in ("", "rank_")
    )
    counts = _numbers(path, table, f"{name}{_COUNTS}")
    return StretchPredictions(
        counts, values, ranks, _numbers(path, table, f"{name}.absolute_error")
    )


def _track_columns() -> list[str]:
    return [*_MOMENTS, *(f"rank_{item}" for item in _MOMENTS), "absolute_error"]


def _label(path: Path, table: pd.DataFrame, name: str) -> ClassPredictions:
    there, share = (_numbers(path, table, f"{prefix}{name}") for prefix in (_LABEL, _PREFIX))
    wrong = np.flatnonzero(~np.isin(there, (0, 1)))
    if len(wrong):
        raise InputError(
            f"{path}, row {table.index[wrong[0]]}: {_LABEL}{name} is 1 or 0; got "
            f"{table[_LABEL + name].iloc[wrong[0]]!r}"
        )
    return ClassPredictions(("0", "1"), there.astype(np.int64), np.stack([1 - share, share], 1))


def _numbers(path: Path, table: pd.DataFrame, column: str) -> NDArray[np.float64]:
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        raise InputError(
            f"{path}, row {table.index[wrong[0]]}: {column} must be a number; "
            f"got {table[column].iloc[wrong[0]]!r}"
        )
    return values


def _known(given: Predictions) -> list[object]:
    if isinstance(given, ClassPredictions):
        return [given.classes[label] for label in given.targets]
    if isinstance(given, ValuePredictions):
        return list(given.targets)
    if isinstance(given, StretchPredictions):
        raise ValueError("stretches of tracks are rows of their own")
    if isinstance(given, JointPredictions):
        return list(zip(*(part.targets.tolist() for part in given.parts.values()), strict=True))
    return list(zip(given.times.tolist(), given.events.tolist(), strict=True))


def _averaged(given: Predictions, kept: Predictions, of: NDArray[np.int64]) -> Predictions:
    """Put means over the rows of each group in place of the first row's values."""
    counts = np.bincount(of).astype(np.float64)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.bincount(of, values) / counts

    if isinstance(given, ClassPredictions):
        assert isinstance(kept, ClassPredictions)
        return replace(kept, probabilities=np.stack([mean(p) for p in given.probabilities.T], 1))
    if isinstance(given, ValuePredictions):
        assert isinstance(kept, ValuePredictions)
        return replace(kept, values=mean(given.values))
    if isinstance(given, JointPredictions):
        assert isinstance(kept, JointPredictions)
        pairs = zip(given.parts.items(), kept.parts.values(), strict=True)
        means = {name: _averaged(one, two, of) for (name, one), two in pairs}
        return JointPredictions(cast(dict[str, OneTarget], means))
    assert isinstance(kept, RiskPredictions)
    assert isinstance(given, RiskPredictions)
    high = None if given.high is None else mean(given.high.astype(np.float64)) >= 0.5
    return replace(kept, risks=mean(given.risks), high=high)
