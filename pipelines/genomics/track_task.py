"""Learning numbers per base: windows with their values, and what a network is trained for."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import huber_loss, mse_loss
from torch.utils.data import Dataset

from pipelines.genomics.data import WindowDataset
from pipelines.genomics.progress import track
from pipelines.genomics.track_files import Signals
from pipelines.shared.batch import Example, Target
from pipelines.shared.errors import InputError
from pipelines.shared.metrics import JointPredictions, Predictions
from pipelines.shared.objective import Outputs
from pipelines.shared.stretches import sum_up


class TrackWindows(Dataset[Example]):
    """Windows with the values of their bases as targets [T, K]; a turned window's are turned too.

    `items` says which item of `signals` each record of the store is.
    """

    def __init__(self, windows: WindowDataset, signals: Signals, items: Mapping[int, int]) -> None:
        self.windows, self._signals, self._items = windows, signals, items
        self.lengths = windows.lengths

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on."""
        self.windows.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> Example:
        window, windows = self.windows[index], self.windows
        item = self._items[int(windows.records[index])]
        values = self._signals.read(item, int(windows.starts[index]), int(windows.ends[index]))
        if windows.flips()[index]:
            values = values[::-1].copy()
        return Example(
            window.inputs, window.coords, torch.from_numpy(values), window.id, window.group,
            window.record,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tracks:
    """Numbers of each base: mean squared or Huber loss in units of the training set's spread.

    The network's output is (number - mean) / spread of each track; bases whose number is unknown
    (NaN) count nowhere. A track has the same weight whatever its unit.
    """

    names: tuple[str, ...]
    means: tuple[float, ...]
    spreads: tuple[float, ...]
    kind: Literal["mse", "huber"] = "mse"

    @classmethod
    def of(
        cls, signals: Signals, items: Int64[ndarray, " M"], lengths: Int64[ndarray, " M"],
        *, kind: Literal["mse", "huber"],
    ) -> "Tracks":  # fmt: skip
        """Take means and spreads from training items.

        Raises InputError for a track that says nothing of them, or the same of all bases.
        """
        count, total, square = (np.zeros(len(signals.names)) for _ in range(3))
        pairs = list(zip(items.tolist(), lengths.tolist(), strict=True))
        for item, length in track(pairs, total=len(pairs), label="tracks", unit="items"):
            values = signals.read(item, 0, length).astype(np.float64)
            count += (~np.isnan(values)).sum(axis=0)
            total += np.nansum(values, axis=0)
            square += np.nansum(values**2, axis=0)
        for name, known in zip(signals.names, count.tolist(), strict=True):
            if not known:
                raise InputError(f"track {name!r} says nothing of any training base; leave it out")
        means = total / count
        spreads = np.sqrt(np.maximum(square / count - means**2, 0))
        for name, mean, spread in zip(signals.names, means, spreads, strict=True):
            if spread <= 1e-6 * abs(mean):
                raise InputError(
                    f"track {name!r} is {mean:g} at every training base that it says something of; "
                    "leave it out, or use task.missing=zero where the others are 0"
                )
        return cls(signals.names, tuple(means.tolist()), tuple(spreads.tolist()), kind)

    @property
    def num_outputs(self) -> int:
        """One for each track."""
        return len(self.names)

    @property
    def score(self) -> str:
        """The share of the variance over bases that is explained, the mean over tracks."""
        return "r2"

    @property
    def joint(self) -> bool:
        """No."""
        return False

    def suffices(self, targets: Sequence[Target]) -> bool:
        """One example does."""
        return len(targets) > 0

    def loss(self, outputs: Float[Tensor, "T K"], targets: Float[Tensor, "T K"]) -> Tensor:
        """Mean over the bases and tracks that are known."""
        wanted = (targets - outputs.new_tensor(self.means)) / outputs.new_tensor(self.spreads)
        known = ~targets.isnan()
        measured = (mse_loss if self.kind == "mse" else huber_loss)(
            outputs, torch.where(known, wanted, 0.0), reduction="none"
        )
        return torch.where(known, measured, 0.0).sum() / known.sum().clamp(min=1)

    def evaluate(self, outputs: Outputs, targets: NDArray[np.generic]) -> float | None:
        """Mean R2 of the tracks that vary; None where none does."""
        said, known = self.numbers(outputs), targets.astype(np.float64)
        found = []
        for one, other in zip(said.T, known.T, strict=True):
            seen = ~np.isnan(other)
            spread = other[seen].var() if seen.any() else 0.0
            if spread > 0:
                found.append(1 - ((one[seen] - other[seen]) ** 2).mean() / spread)
        return float(np.mean(found)) if found else None

    def predictions(self, outputs: Outputs, targets: Sequence[Target]) -> Predictions:
        """There are none of single bases: see `sum_up`."""
        raise TypeError("tracks are summed up by stretch")

    def sum_up(
        self, targets: Sequence[Float[ndarray, "T K"]], outputs: Sequence[Float[ndarray, "T K"]]
    ) -> JointPredictions:
        """Known values and outputs of each stretch, to be scored."""
        said = [self.numbers(part.astype(np.float64)) for part in outputs]
        known = [part.astype(np.float64) for part in targets]
        return JointPredictions(
            {
                name: sum_up(
                    [part[:, column] for part in known], [part[:, column] for part in said]
                )
                for column, name in enumerate(self.names)
            }
        )

    def truth(self, targets: Sequence[Target]) -> pd.DataFrame:
        """Nothing of a whole sequence."""
        return pd.DataFrame(index=range(len(targets)))

    def read(self, outputs: Outputs) -> pd.DataFrame:
        """`mean_TRACK` of each sequence, of its mean outputs."""
        return pd.DataFrame(self.numbers(outputs), columns=[f"mean_{name}" for name in self.names])

    def numbers(self, outputs: Float[ndarray, "... K"]) -> Float[ndarray, "... K"]:
        """Predictions in each track's unit."""
        found: Float[ndarray, "... K"] = outputs * np.array(self.spreads) + np.array(self.means)
        return found

    def plain(self) -> dict[str, object]:
        """Return the fields."""
        lists = {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self).items()}
        return {"name": "tracks", **lists}


def read_tracks(plain: Mapping[str, object]) -> Tracks:
    """Make an objective again from what `plain` returned."""
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items() if k != "name"}
    return Tracks(**fields)  # type: ignore[arg-type]
