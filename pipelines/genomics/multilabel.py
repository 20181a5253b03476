"""Several labels per sequence, each there or not."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pipelines.shared.batch import Target
from pipelines.shared.calibration import choose_threshold
from pipelines.shared.metrics import ClassPredictions, JointPredictions, auroc
from pipelines.shared.objective import DECIMALS, Outputs


@dataclass(frozen=True, slots=True)
class MultiLabel:
    """Labels that do not exclude each other: binary cross-entropy, the mean over labels; AUROC.

    `weights` multiply the loss of each label's examples that have it. `thresholds` are the
    probabilities from which a label is predicted; 0.5 where none are given.
    """

    labels: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None

    @classmethod
    def of(
        cls, labels: Sequence[str], targets: Float[np.ndarray, "N L"], *, balanced: bool
    ) -> "MultiLabel":
        """Take weights from training targets, if asked: those with a label count as the others."""
        there = np.maximum(targets.sum(axis=0, dtype=np.float64), 1)
        weights = tuple(((len(targets) - there) / there).tolist()) if balanced else None
        return cls(tuple(labels), weights)

    @property
    def num_outputs(self) -> int:
        """One for each label."""
        return len(self.labels)

    @property
    def score(self) -> str:
        """The area under the ROC curve, the mean over labels."""
        return "auroc"

    @property
    def joint(self) -> bool:
        """No."""
        return False

    def suffices(self, targets: Sequence[Target]) -> bool:
        """One example does."""
        return len(targets) > 0

    def loss(self, outputs: Float[Tensor, "S L"], targets: Shaped[Tensor, "S L"]) -> Tensor:
        """Mean over sequences and labels."""
        weights = None if self.weights is None else outputs.new_tensor(self.weights)
        return binary_cross_entropy_with_logits(
            outputs, targets.to(outputs.dtype), pos_weight=weights
        )

    def evaluate(self, outputs: Outputs, targets: NDArray[np.generic]) -> float | None:
        """Mean of the labels that are on some rows and not on all; None where there is none."""
        known = targets.astype(np.int64)
        areas = [
            auroc(known[:, place], np.stack([-logits, logits], axis=1))
            for place, logits in enumerate(outputs.T)
        ]
        found = [area for area in areas if area is not None]
        return float(np.mean(found)) if found else None

    def settle(self, outputs: Outputs, targets: Sequence[Target]) -> "MultiLabel":
        """Choose each label's threshold on validation."""
        parts = self.predictions(outputs, targets).parts.values()
        given = [part for part in parts if isinstance(part, ClassPredictions)]
        cuts = [choose_threshold(part.targets, part.probabilities[:, 1]) for part in given]
        return replace(self, thresholds=tuple(cuts))

    def predictions(self, outputs: Outputs, targets: Sequence[Target]) -> JointPredictions:
        """Each label by itself: there (1) or not (0), and probabilities, rounded as saved."""
        shares, known = self.probabilities(outputs), _table(targets, len(self.labels))
        return JointPredictions(
            {
                name: ClassPredictions(
                    ("0", "1"),
                    known[:, place],
                    np.stack([1 - shares[:, place], shares[:, place]], axis=1),
                    self._threshold(place),
                )
                for place, name in enumerate(self.labels)
            }
        )

    def probabilities(self, outputs: Outputs) -> Outputs:
        """Probabilities of each label [N, L], rounded as they are saved."""
        return np.asarray(expit(outputs)).round(DECIMALS)

    def truth(self, targets: Sequence[Target]) -> pd.DataFrame:
        """`label_LABEL` of each label, 1 or 0."""
        known = _table(targets, len(self.labels))
        return pd.DataFrame(known, columns=[f"label_{name}" for name in self.labels])

    def read(self, outputs: Outputs) -> pd.DataFrame:
        """`prediction_LABEL`, 1 or 0, of each label, and then `probability_LABEL`."""
        shares = self.probabilities(outputs)
        table = pd.DataFrame(
            {
                f"prediction_{name}": (shares[:, place] >= self._threshold(place)).astype(np.int64)
                for place, name in enumerate(self.labels)
            }
        )
        for place, name in enumerate(self.labels):
            table[f"probability_{name}"] = shares[:, place]
        return table

    def plain(self) -> dict[str, object]:
        """Return the fields."""
        lists = {key: value and list(value) for key, value in asdict(self).items()}
        return {"name": "multilabel", **lists}

    def _threshold(self, place: int) -> float:
        return 0.5 if self.thresholds is None else self.thresholds[place]


def read_multilabel(plain: Mapping[str, object]) -> MultiLabel:
    """Make an objective again from what `plain` returned."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "name"}
    return MultiLabel(**fields)  # type: ignore[arg-type]


def _table(targets: Sequence[Target], width: int) -> NDArray[np.int64]:
    return np.asarray(targets, dtype=np.int64).reshape(-1, width)
