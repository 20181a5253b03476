"""What a network is trained for: the loss of its numbers, their score, their columns in a table."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor
from torch.nn.functional import cross_entropy, huber_loss, mse_loss

from pipelines.shared.batch import Target
from pipelines.shared.errors import InputError
from pipelines.shared.metrics import (
    ClassPredictions,
    Predictions,
    ValuePredictions,
    auroc,
    measure,
)

DECIMALS = 6
"""Of saved and scored probabilities, well above rounding noise: what ties stays tied."""

Outputs = NDArray[np.float64]
"""A network's numbers, one row per sequence."""


class Objective(Protocol):
    """What a network is trained for; a value of plain fields, so that a model file can hold it.

    `num_outputs` numbers are wanted of each sequence. `score` names the validation score that a
    run may select by; more of it is better.
    """

    @property
    def num_outputs(self) -> int:
        """Numbers that the network gives of each sequence."""

    @property
    def score(self) -> str:
        """Name of the validation score."""

    @property
    def joint(self) -> bool:
        """Whether the loss is one of several sequences together, and not a mean over them."""

    def suffices(self, targets: Sequence[Target]) -> bool:
        """Tell whether a loss can be computed of these examples; asked where it is joint."""

    def loss(self, outputs: Float[Tensor, "S C"], targets: Shaped[Tensor, "S ..."]) -> Tensor:
        """Mean loss over the sequences."""

    def evaluate(self, outputs: Outputs, targets: NDArray[np.generic]) -> float | None:
        """Return `score` of validation outputs; None where it is undefined."""

    def predictions(self, outputs: Outputs, targets: Sequence[Target]) -> Predictions:
        """Put outputs and what is known side by side, to be scored."""

    def truth(self, targets: Sequence[Target]) -> pd.DataFrame:
        """Columns of a table of predictions that say what is known."""

    def read(self, outputs: Outputs) -> pd.DataFrame:
        """Columns of a table of predictions that say what the network says."""

    def plain(self) -> dict[str, object]:
        """Return the fields, and which objective this is, for a model file."""


@dataclass(frozen=True, slots=True)
class Classification:
    """One of several classes: cross-entropy, with a weight per class if given; AUROC.

    `threshold` is the probability of the second of two classes from which it is predicted; among
    more classes the most probable is.
    """

    classes: tuple[str, ...]
    class_weights: tuple[float, ...] | None = None
    threshold: float = 0.5

    @property
    def num_outputs(self) -> int:
        """One for each class."""
        return len(self.classes)

    @property
    def score(self) -> str:
        """The area under the ROC curve."""
        return "auroc"

    @property
    def joint(self) -> bool:
        """No."""
        return False

    def suffices(self, targets: Sequence[Target]) -> bool:
        """One example does."""
        return len(targets) > 0

    def loss(self, outputs: Float[Tensor, "S C"], targets: Shaped[Tensor, "S"]) -> Tensor:
        """Cross-entropy; with weights, their weighted mean."""
        weights = None if self.class_weights is None else outputs.new_tensor(self.class_weights)
        return cross_entropy(outputs, targets, weight=weights)

    def evaluate(self, outputs: Outputs, targets: NDArray[np.generic]) -> float | None:
        """AUROC, of more than two classes the mean of each against the rest."""
        return auroc(targets.astype(np.int64), outputs)

    def predictions(self, outputs: Outputs, targets: Sequence[Target]) -> ClassPredictions:
        """Classes and probabilities, rounded as they are saved."""
        rounded = np.asarray(softmax(outputs, axis=1)).round(DECIMALS)
        labels = np.array([_number(target) for target in targets], dtype=np.int64)
        return ClassPredictions(self.classes, labels, rounded, self.threshold)

    def truth(self, targets: Sequence[Target]) -> pd.DataFrame:
        """`label`, a class by its name."""
        return pd.DataFrame({"label": [self.classes[int(_number(target))] for target in targets]})

    def read(self, outputs: Outputs) -> pd.DataFrame:
        """`prediction`, and `probability_CLASS` of each class."""
        found = self.predictions(outputs, [0] * len(outputs))
        table = pd.DataFrame({"prediction": [self.classes[index] for index in found.chosen]})
        for column, name in enumerate(self.classes):
            table[f"probability_{name}"] = found.probabilities[:, column]
        return table

    def plain(self) -> dict[str, object]:
        """Return the fields."""
        weights = None if self.class_weights is None else list(self.class_weights)
        fields = {"classes": list(self.classes), "class_weights": weights}
        return {"name": "classification", **asdict(self), **fields}


@dataclass(frozen=True, slots=True)
class Regression:
    """A number: mean squared or Huber loss of the number in units of the training set's spread.

    The network's output is (number - `mean`) / `spread`. Huber's loss (1964) is squared up to one
    such unit and linear beyond.
    """

    mean: float
    spread: float
    kind: Literal["mse", "huber"] = "mse"

    def __post_init__(self) -> None:
        if self.kind not in ("mse", "huber"):
            raise InputError(f"task.loss must be mse or huber; got {self.kind!r}")

    @classmethod
    def of(cls, targets: Sequence[Target], *, kind: Literal["mse", "huber"]) -> "Regression":
        """Take mean and spread from training targets; raises InputError if all are equal."""
        values = np.array([_number(target) for target in targets], dtype=np.float64)
        spread = float(values.std())
        if spread == 0:
            raise InputError(f"all {len(values)} training targets are {values[0]:g}")
        return cls(float(values.mean()), spread, kind)

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    @property
    def score(self) -> str:
        """The share of the variance that is explained."""
        return "r2"

    @property
    def joint(self) -> bool:
        """No."""
        return False

    def suffices(self, targets: Sequence[Target]) -> bool:
        """One example does."""
        return len(targets) > 0

    def loss(self, outputs: Float[Tensor, "S 1"], targets: Shaped[Tensor, "S"]) -> Tensor:
        """Mean loss in units of `spread`, squared for mse."""
        wanted = (targets.to(outputs.dtype) - self.mean) / self.spread
        measure = mse_loss if self.kind == "mse" else huber_loss
        return measure(outputs[:, 0], wanted)

    def evaluate(self, outputs: Outputs, targets: NDArray[np.generic]) -> float | None:
        """R2; undefined for fewer than two different targets."""
        return measure(self.predictions(outputs, targets.tolist()))["r2"].value

    def predictions(self, outputs: Outputs, targets: Sequence[Target]) -> ValuePredictions:
        """Known and predicted numbers."""
        known = np.array([_number(target) for target in targets], dtype=np.float64)
        return ValuePredictions(known, self.numbers(outputs))

    def truth(self, targets: Sequence[Target]) -> pd.DataFrame:
        """`target`."""
        return pd.DataFrame({"target": [_number(target) for target in targets]})

    def read(self, outputs: Outputs) -> pd.DataFrame:
        """`prediction`, in the targets' unit."""
        return pd.DataFrame({"prediction": self.numbers(outputs)})

    def numbers(self, outputs: Outputs) -> Outputs:
        """Predictions [N] in the targets' unit."""
        return outputs[:, 0] * self.spread + self.mean

    def plain(self) -> dict[str, object]:
        """Return the fields."""
        return {"name": "regression", **asdict(self)}


def balanced_weights(targets: Sequence[int], *, num_classes: int) -> list[float]:
    """Return a weight per class, inverse to its frequency, with mean 1 over the examples."""
    counts = Counter(targets)
    return [len(targets) / (num_classes * max(1, counts[label])) for label in range(num_classes)]


def read_objective(plain: Mapping[str, object]) -> Classification | Regression:
    """Make an objective again from what `plain` returned."""
    fields = {key: value for key, value in plain.items() if key != "name"}
    if plain["name"] == "regression":
        return Regression(**fields)  # type: ignore[arg-type]
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return Classification(**fields | lists)  # type: ignore[arg-type]


def concatenate(outputs: Sequence[Tensor]) -> Tensor:
    """Join the outputs of several batches; one is left as it is."""
    return outputs[0] if len(outputs) == 1 else torch.cat(list(outputs))


def _number(target: Target) -> float:
    if isinstance(target, tuple):
        raise TypeError(f"a single number is needed; got {target}")
    return float(target)
