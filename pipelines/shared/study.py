"""A model and what it is measured against: trained alike, scored on the same test items."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import nn

from pipelines.shared.batch import Examples
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitReport, FitSettings, fit, seed_everything
from pipelines.shared.inference import Prediction, predict
from pipelines.shared.objective import Objective, balanced_weights
from pipelines.shared.record import RunState, open_run
from sparse_core.ops import engines_used

DECIMALS = 6
"""Of saved and scored probabilities."""

Weights = list[float] | None

Probabilities = NDArray[np.float64]
"""One row per test item, one column per class."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A network and the examples that it is trained, selected and scored on."""

    build: Callable[[], nn.Module]
    train: Examples
    val: Examples
    test: Examples


def check_baselines(chosen: Sequence[str], known: Mapping[str, str]) -> None:
    """Raise InputError for a baseline that the pipeline does not have."""
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        raise InputError(f"baselines must be of {', '.join(known)}; got {', '.join(unknown)}")


def architecture_of(config: dict[str, Any], *, num_classes: int) -> dict[str, Any]:
    """Take the arguments of an encoder from the configuration.

    Raises InputError for a pooling model.
    """
    if "kind" in config["model"]:
        raise InputError(f"model={config['model']['kind']} pools the tiles of slides, nothing else")
    expression = config["pattern"]["expression"]
    return {**config["model"], "pattern": expression, "num_classes": num_classes}


def check_network(build: Callable[[], nn.Module]) -> None:
    """Raise InputError for sizes and patterns that make no network, before any work is done."""
    try:
        with torch.device("meta"):
            build()
    except ValueError as error:
        raise InputError(f"model and pattern do not fit: {error}") from None


def begin_run(out: Path, config: Mapping[str, object]) -> bool:
    """Begin or go on with a run; False if it is finished, after showing its summary again."""
    if open_run(out, config) is not RunState.FINISHED:
        return True
    print((out / "summary.txt").read_text(encoding="utf-8"))
    print(f"{out} holds this finished run; give another out= to train again")
    return False


def choose_class_weights(choice: str | None, targets: Sequence[int], num_classes: int) -> Weights:
    """Weights of the classes in the loss: none, or `balanced` by their number in training."""
    return balanced_weights(targets, num_classes=num_classes) if choice == "balanced" else None


@dataclass(frozen=True, slots=True)
class Trained:
    """A trained contender, what it says of examples by split, and who served it."""

    network: nn.Module
    report: FitReport
    predictions: dict[str, list[Prediction]]
    engine_calls: Counter[str]


def train_contender(
    name: str,
    contender: Contender,
    *,
    out: Path,
    settings: FitSettings,
    objective: Objective,
    sample_weights: Sequence[float] | None = None,
    also: Mapping[str, Examples] | None = None,
) -> Trained:
    """Train one contender in `out/models/NAME`, select its epoch on validation, and predict.

    What is predicted is `also`, by default the test examples. On the CPU predictions are computed
    in float64, so that items which the network cannot tell apart tie exactly.
    """
    seed_everything(settings.seed)
    network, report = fit(
        contender.build(),
        contender.train,
        contender.val,
        objective=objective,
        out=out / "models" / name,
        settings=settings,
        name=name,
        sample_weights=sample_weights,
    )
    device = "cuda" if settings.accelerator in ("gpu", "cuda") else "cpu"
    if device == "cpu":
        network.double()
    served = Counter(engines_used())
    predictions = {
        split: list(predict(network, data, max_tokens=settings.max_tokens, device=device))
        for split, data in (also or {"test": contender.test}).items()
    }
    network.float()
    calls = Counter(report.engine_calls) + (Counter(engines_used()) - served)
    return Trained(network, report, predictions, calls)


def probability_table(
    ids: list[str], probabilities: Probabilities, classes: list[str], *, id_column: str
) -> pd.DataFrame:
    """One row per item: id, predicted class, and a probability per class.

    Probabilities are rounded to six decimals, well above rounding noise, so that items which the
    network cannot tell apart stay tied and an AUROC of exactly 0.5 stays 0.5.
    """
    rounded = probabilities.round(DECIMALS)
    table = pd.DataFrame({id_column: ids})
    table["prediction"] = [classes[best] for best in rounded.argmax(1)]
    for column, name in enumerate(classes):
        table[f"probability_{name}"] = rounded[:, column]
    return table


def name_engines(calls: Mapping[str, int]) -> dict[str, object]:
    """Say how many attention calls each engine served, and which one if it served them all."""
    return {"engine": next(iter(calls)) if len(calls) == 1 else None, "engine_calls": dict(calls)}
