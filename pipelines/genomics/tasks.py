"""What is learnt of each item: a class, labels, a number, or numbers along its bases."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from torch import Tensor

from pipelines.genomics.attribution import log_odds
from pipelines.genomics.multilabel import MultiLabel, read_multilabel
from pipelines.genomics.track_files import MISSING, name_tracks
from pipelines.genomics.track_task import Tracks, read_tracks
from pipelines.shared.calibration import choose_threshold
from pipelines.shared.errors import InputError
from pipelines.shared.objective import (
    Classification,
    Outputs,
    Regression,
    balanced_weights,
    read_objective,
)

TASKS = ("classification", "multilabel", "regression", "tracks")
SHOWN = {
    "classification": ("auroc", "accuracy", "balanced_accuracy", "mcc"),
    "multilabel": ("auroc", "auprc", "f1", "mcc", "exact_match"),
    "regression": ("r2", "pearson", "spearman", "mae"),
    "tracks": ("r2", "pearson", "spearman"),
}
"""Scores that a terminal has room for; `metrics.json` has all."""

DnaObjective: TypeAlias = Classification | MultiLabel | Regression | Tracks

_NUM_SHOWN = 8


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """What is known of each item: class numbers [N], numbers [N], or labels [N, L]."""

    values: Shaped[ndarray, "N ..."]
    names: tuple[str, ...] = ()
    """Classes, or labels."""

    def of(self, rows: Shaped[ndarray, " K"]) -> list[Any]:
        """Targets of some items, as objectives take them."""
        found: list[Any] = self.values[rows].tolist()
        return [tuple(item) if isinstance(item, list) else item for item in found]


def check_task(config: Mapping[str, Any]) -> None:
    """Raise InputError for a task that DNA does not have, and for settings without sense."""
    task = config["task"]
    if task["name"] not in TASKS:
        raise InputError(
            f"task={task['name']}: DNA has {', '.join(f'task={name}' for name in TASKS)}"
        )
    for key in ("class_weights", "sampling", "weights"):
        if task.get(key) not in (None, "balanced"):
            raise InputError(f"task.{key}: null or balanced; got {task[key]!r}")
    if task.get("loss", "mse") not in ("mse", "huber"):
        raise InputError(f"task.loss must be mse or huber; got {task['loss']!r}")
    if task.get("missing", "skip") not in MISSING:
        raise InputError(f"task.missing is {' or '.join(MISSING)}; got {task['missing']!r}")
    if task["name"] == "multilabel":
        _check_multilabel(config)
    if task["name"] == "tracks":
        name_tracks(task["files"])


def is_stratified(config: Mapping[str, Any]) -> bool:
    """Tell whether items have classes, which splits shall hold alike."""
    return bool(config["task"]["name"] == "classification")


def read_targets(table: pd.DataFrame, config: Mapping[str, Any], source: str) -> Targets:
    """Read the column `label` of the items; raises InputError, with the id, for what is none."""
    task, labels = config["task"], table["label"].tolist()
    if task["name"] == "classification":
        classes = sorted(set(labels))
        place = {name: number for number, name in enumerate(classes)}
        return Targets(np.array([place[label] for label in labels]), tuple(classes))
    ids = table["id"].tolist()
    if task["name"] == "regression":
        return Targets(_read_numbers(labels, ids, source))
    return _read_label_sets(labels, ids, task, source)


def make_objective(
    config: Mapping[str, Any], targets: Targets, train: Shaped[ndarray, " K"]
) -> Classification | MultiLabel | Regression:
    """Make the task's objective, with what it takes from the training items.

    Raises InputError for numbers that are all equal and for labels on all or none of these.
    """
    task = config["task"]
    known = targets.of(train)
    if task["name"] == "regression":
        return Regression.of(known, kind=task["loss"])
    if task["name"] == "multilabel":
        table = targets.values[train]
        counts = table.sum(axis=0)
        for name, count in zip(targets.names, counts.tolist(), strict=True):
            if count in (0, len(table)):
                raise InputError(
                    f"label {name!r} is on {count:,.0f} of {len(table):,} training items: nothing "
                    "can be learnt of it; leave it out, or split otherwise"
                )
        return MultiLabel.of(targets.names, table, balanced=task["weights"] == "balanced")
    weights = None
    if task["class_weights"] == "balanced":
        weights = tuple(balanced_weights(known, num_classes=len(targets.names)))
    return Classification(targets.names, weights)


def settle(objective: DnaObjective, outputs: Outputs, known: Sequence[Any]) -> DnaObjective:
    """Choose on validation what is chosen there: thresholds of two classes, or of labels."""
    if not known:
        return objective
    if isinstance(objective, MultiLabel):
        return objective.settle(outputs, known)
    if isinstance(objective, Classification) and len(objective.classes) == 2:
        found = objective.predictions(outputs, known)
        return replace(
            objective, threshold=choose_threshold(found.targets, found.probabilities[:, 1])
        )
    return objective


def load_objective(plain: Mapping[str, object]) -> DnaObjective:
    """Make an objective again from a model file's metadata."""
    if plain["name"] == "multilabel":
        return read_multilabel(plain)
    return read_tracks(plain) if plain["name"] == "tracks" else read_objective(plain)


def name_outputs(objective: DnaObjective) -> tuple[str, ...]:
    """Name what a model says: its classes, labels or tracks, or the one number."""
    if isinstance(objective, Classification):
        return objective.classes
    if isinstance(objective, MultiLabel):
        return objective.labels
    return objective.names if isinstance(objective, Tracks) else ("prediction",)


def read_values(objective: DnaObjective, outputs: Outputs) -> Outputs:
    """What a model says in its own terms [N, K]: probabilities, or numbers in the targets' unit."""
    if isinstance(objective, Classification):
        known = objective.predictions(outputs, [0] * len(outputs))
        return known.probabilities
    if isinstance(objective, MultiLabel):
        return objective.probabilities(outputs)
    if isinstance(objective, Tracks):
        return objective.numbers(outputs)
    return objective.numbers(outputs)[:, None]


def score_of(objective: DnaObjective, column: int) -> Callable[[Float[Tensor, "... C"]], Tensor]:
    """What is mapped and compared of one output: the log odds of a class or label, or a number."""
    if isinstance(objective, Classification):
        return lambda logits: log_odds(logits, column)
    if isinstance(objective, MultiLabel):
        return lambda logits: logits[..., column]
    if isinstance(objective, Tracks):
        mean, spread = objective.means[column], objective.spreads[column]
        return lambda logits: logits[..., column] * spread + mean
    return lambda logits: logits[..., 0] * objective.spread + objective.mean


def is_odds(objective: DnaObjective) -> bool:
    """Tell whether `score_of` is log odds."""
    return isinstance(objective, Classification | MultiLabel)


def score_outputs(objective: DnaObjective, outputs: Outputs) -> Outputs:
    """`score_of` every output [..., K]."""
    logits = torch.from_numpy(np.ascontiguousarray(outputs, dtype=np.float64))
    columns = range(len(name_outputs(objective)))
    return np.stack([score_of(objective, column)(logits).numpy() for column in columns], axis=-1)


def _check_multilabel(config: Mapping[str, Any]) -> None:
    task = config["task"]
    if not task["separator"] or not isinstance(task["separator"], str):
        raise InputError(f"task.separator is a sign between labels; got {task['separator']!r}")
    if task["columns"] and not config["labels"]:
        raise InputError("task.columns names columns of 1 and 0 of labels=TABLE: give that too")


def _read_numbers(labels: Sequence[str], ids: Sequence[str], source: str) -> Float[ndarray, " N"]:
    found = pd.to_numeric(pd.Series(labels), errors="coerce").to_numpy(np.float64)
    wrong = np.flatnonzero(~np.isfinite(found))
    if len(wrong):
        raise InputError(
            f"{source}: the label of {ids[wrong[0]]!r} is {labels[wrong[0]]!r}, and "
            f"task=regression needs numbers ({len(wrong):,} are none); correct it, or use "
            "task=classification"
        )
    return found.astype(np.float32)


def _read_label_sets(
    labels: Sequence[str], ids: Sequence[str], task: Mapping[str, Any], source: str
) -> Targets:
    sets = [
        [] if text == task["none"] else [name.strip() for name in text.split(task["separator"])]
        for text in labels
    ]
    for item, names, text in zip(ids, sets, labels, strict=True):
        if "" in names or len(set(names)) < len(names):
            raise InputError(
                f"{source}: the labels of {item!r} are {text!r}: names between "
                f"{task['separator']!r}, each once, or {task['none']!r} for none"
            )
    known = sorted({name for names in sets for name in names})
    if not known:
        raise InputError(f"{source}: no item has a label other than {task['none']!r}")
    place = {name: column for column, name in enumerate(known)}
    table = np.zeros((len(sets), len(known)), dtype=np.float32)
    for row, names in enumerate(sets):
        table[row, [place[name] for name in names]] = 1
    return Targets(table, tuple(known))
