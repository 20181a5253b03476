"""Slides, or patients with their slides, as what a model learns from: targets and splits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.pathology.baseline import CLASSES_ONLY
from pipelines.pathology.split_tables import read_fold
from pipelines.pathology.survival import CoxSurvival, DiscreteSurvival, read_survival
from pipelines.shared.batch import Target
from pipelines.shared.errors import InputError
from pipelines.shared.objective import (
    Classification,
    Objective,
    Regression,
    balanced_weights,
    read_objective,
)
from pipelines.shared.splits import EXTERNAL, SPLITS, assign_splits, require_no_leak

TRUTH = {
    "classification": ("label",),
    "regression": ("label",),
    "survival_discrete": ("time", "event"),
    "survival_cox": ("time", "event"),
}
"""Roles of the columns that each task learns."""

UNITS = ("slide", "patient")


@dataclass(frozen=True, slots=True)
class Case:
    """A slide, or a patient with several: one sequence, one target."""

    slides: tuple[str, ...]
    patient: str
    target: Target
    split: str

    @property
    def id(self) -> str:
        """The slide's id, or those of all slides."""
        return ";".join(self.slides)


@dataclass(frozen=True, slots=True)
class Cohort:
    """Cases of every split, in the order of the table, and the classes if they have any."""

    unit: str
    cases: list[Case]
    classes: tuple[str, ...]

    def of(self, split: str) -> list[Case]:
        """Cases of one split."""
        return [case for case in self.cases if case.split == split]

    @property
    def held_out(self) -> list[str]:
        """Splits besides train that have cases."""
        return [name for name in (*SPLITS[1:], EXTERNAL) if self.of(name)]

    def __str__(self) -> str:
        """Say what there is."""
        counts = ", ".join(
            f"{name} {len(self.of(name)):,}" for name in (*SPLITS[:1], *self.held_out)
        )
        what = f"{len(self.classes)} classes ({', '.join(self.classes)}); " if self.classes else ""
        return f"{what}{self.unit}s: {counts}"


def check_task(config: dict[str, Any]) -> None:
    """Raise InputError for a unit that there is not, and a model that does not fit the task."""
    if config["unit"] not in UNITS:
        raise InputError(f"unit must be slide or patient; got {config['unit']!r}")
    task, kind = config["task"], config["model"].get("kind")
    if task["name"] not in TRUTH:
        raise InputError(f"task={task['name']} is one of DNA; slides have {', '.join(TRUTH)}")
    if task["name"] != "classification":
        if kind in CLASSES_ONLY:
            raise InputError(f"{kind} knows classes only; it does not fit task={task['name']}")
    elif task["class_weights"] not in (None, "balanced"):
        raise InputError(f"task.class_weights: null or balanced; got {task['class_weights']!r}")
    elif task["sampling"] not in (None, "balanced"):
        raise InputError(f"task.sampling: null or balanced; got {task['sampling']!r}")


def read_cohort(config: dict[str, Any], table: pd.DataFrame, source: Path) -> Cohort:
    """Make cases of a label table (`read_slide_labels`): group patients, assign splits.

    Raises InputError for times that are not above 0, events other than 0 and 1, patients whose
    slides differ in what is known of them (unit=patient), and splits that tear a patient.
    """
    task, unit = config["task"]["name"], config["unit"]
    roles = TRUTH[task]
    if "time" in roles:
        _check_times(source, table)
    if config["splits"]:
        table = _apply_splits(Path(config["splits"]), table)
    if unit == "patient":
        table = _by_patient(source, table, [*roles, *(["split"] if "split" in table else [])])
    else:
        table = table.assign(slides=[(name,) for name in table["slide_id"]])
    classes = tuple(sorted(table["label"].unique())) if task == "classification" else ()
    splits = _split(config, table, roles)
    rows = table[["slides", "patient_id", *roles]].itertuples(index=False, name=None)
    cases = [
        Case(slides, patient, _target(values, classes), split)
        for (slides, patient, *values), split in zip(rows, splits, strict=True)
    ]
    return Cohort(unit, cases, classes)


def require_no_copies(cohort: Cohort, contents: Mapping[str, str]) -> None:
    """Raise InputError where slides of equal content stand in two splits; `contents` are by id."""
    rows = [(slide, case.patient, case.split) for case in cohort.cases for slide in case.slides]
    slides, patients, splits = zip(*rows, strict=True)
    require_no_leak(slides, patients, splits, contents=contents)


def make_objective(config: dict[str, Any], cohort: Cohort) -> Objective:
    """Make the task's objective, with what it takes from the training cases."""
    task = config["task"]
    targets = [case.target for case in cohort.of("train")]
    if task["name"] == "regression":
        return Regression.of(targets, kind=task["loss"])
    if task["name"] == "survival_discrete":
        return DiscreteSurvival.of(targets, bins=task["bins"])
    if task["name"] == "survival_cox":
        objective = CoxSurvival(task["patients"], shown=tuple(sorted(task["times"])))
        if not objective.suffices(targets):
            raise InputError(
                f"task=survival_cox compares patients: {task['patients']} or more with an event "
                f"among them are needed for training; there are {len(targets)}: give more rows, or "
                "task.patients=NUMBER"
            )
        return objective
    weights = None
    if task["class_weights"] == "balanced":
        weights = tuple(_class_weights(cohort))
    return Classification(cohort.classes, weights)


def load_objective(plain: dict[str, Any]) -> Objective:
    """Make an objective again from a model file's metadata."""
    return read_survival(plain) if "survival" in plain["name"] else read_objective(plain)


def sample_weights(config: dict[str, Any], cohort: Cohort) -> list[float] | None:
    """Weight of each training case in an epoch's draw; None where each comes once."""
    if config["task"].get("sampling") != "balanced":
        return None
    weights = _class_weights(cohort)
    return [weights[int(case.target)] for case in cohort.of("train")]  # type: ignore[arg-type]


def _class_weights(cohort: Cohort) -> list[float]:
    labels = [int(case.target) for case in cohort.of("train")]  # type: ignore[arg-type]
    return balanced_weights(labels, num_classes=len(cohort.classes))


def _check_times(source: Path, table: pd.DataFrame) -> None:
    for row, time, event in zip(table.index, table["time"], table["event"], strict=True):
        if time <= 0:
            raise InputError(f"{source}, row {row}: time must be above 0; got {time:g}")
        if event not in (0, 1):
            raise InputError(
                f"{source}, row {row}: event is 1 (seen) or 0 (not until then); got {event:g}"
            )


def _apply_splits(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """Put a table's splits in place of any others; slides that it does not name take no part."""
    found = read_fold(path).split_rows(table["slide_id"].tolist(), table["patient_id"].tolist())
    named = [split is not None for split in found]
    if not all(named):
        print(f"note: {named.count(False):,} slides are not in {path} and take no part")
    return table.assign(split=found)[named]


def _by_patient(source: Path, table: pd.DataFrame, same: Sequence[str]) -> pd.DataFrame:
    """One row per patient; the columns in `same` must agree among a patient's slides."""
    for column in same:
        kinds = table.groupby("patient_id")[column].nunique()
        if (kinds > 1).any():
            patient = kinds.index[kinds > 1][0]
            rows = table[table["patient_id"] == patient]
            shown = ", ".join(f"row {row}: {value}" for row, value in rows[column].items())
            raise InputError(
                f"{source}: slides of patient {patient!r} differ in {column} ({shown}); correct "
                "the table, or use unit=slide"
            )
    grouped = table.groupby("patient_id", sort=False)
    slides = grouped["slide_id"].agg(tuple).rename("slides")
    return grouped.first().assign(slides=slides).reset_index()


def _split(config: dict[str, Any], table: pd.DataFrame, roles: Sequence[str]) -> list[str]:
    """Split of each row; strata are classes, or whether the event was seen."""
    column = {"label": "label", "time": "event"}[roles[0]]
    strata = ["all"] * len(table)
    if config["task"]["name"] != "regression":
        strata = [f"{value:g}" if roles[0] == "time" else value for value in table[column]]
    given = table["split"].tolist() if "split" in table else [""] * len(table)
    rows = [row for row, split in enumerate(given) if split != EXTERNAL]
    patients = table["patient_id"].tolist()
    drawn = assign_splits(
        ids=[";".join(table["slides"].iloc[row]) for row in rows],
        labels=[strata[row] for row in rows],
        groups=[patients[row] for row in rows],
        given=[given[row] for row in rows] if "split" in table else None,
        val_fraction=config["val_fraction"],
        test_fraction=config["test_fraction"],
        seed=config["seed"],
    )
    trained = {patients[row] for row in rows}
    torn = sorted({p for p, s in zip(patients, given, strict=True) if s == EXTERNAL} & trained)
    if torn:
        raise InputError(f"patients stand both in {EXTERNAL} and elsewhere: {', '.join(torn)}")
    splits = [EXTERNAL] * len(table)
    for row, split in zip(rows, drawn, strict=True):
        splits[row] = split
    return splits


def _target(values: Sequence[Any], classes: tuple[str, ...]) -> Target:
    if classes:
        return classes.index(values[0])
    numbers = [float(value) for value in values]
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
