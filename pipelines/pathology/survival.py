"""Survival: times until an event, some of them cut short (censored).

A target is (time, event): the event was seen at that time (1), or not until then (0). Every model
gives a risk, of which more means sooner; its sign is the model's and never chosen by the data. Once
trained it gives a curve too: the chance of no event until each of some times.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipelines.shared.batch import Target
from pipelines.shared.errors import InputError
from pipelines.shared.metrics import RiskPredictions, measure
from pipelines.shared.objective import DECIMALS, Outputs

Targets = Float[Tensor, "S 2"]
"""Time and event of each sequence."""

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Times [K], rising, and the chance of each row of no event until then [N, K]."""


@dataclass(frozen=True, slots=True)
class DiscreteSurvival:
    """The hazard of each of K bins of time: negative log-likelihood of a discrete-time model.

    The chance that the event falls into bin k, given that it did not before, is the logistic
    function of output k (Gensheimer and Narasimhan, PeerJ 2019, equations 3 to 6). `edges` are the
    bins' upper ends [K]: quantiles of the training set's times of events, the last one the longest
    training time, beyond which everything counts as in the last bin. Who is lost in a bin counts
    as having survived it if that was in its second half (there, section "discrete time").

    The risk is minus the sum of the survival at the edges (Zadeh and Schmid, TPAMI 2021).
    `cut` is the median risk of the training set, which parts the groups high and low.
    """

    edges: tuple[float, ...]
    cut: float = 0.0

    @classmethod
    def of(cls, targets: Sequence[Target], *, bins: int) -> "DiscreteSurvival":
        """Choose the edges by the training targets; equal quantiles become one edge.

        Raises InputError where there is no event.
        """
        times, events = _columns(targets)
        if not events.any():
            raise InputError("no event among the training rows; survival cannot be learned")
        if bins < 2:
            raise InputError(f"task.bins must be at least 2; got {bins}")
        inner = np.quantile(times[events], np.arange(1, bins) / bins)
        inner = inner[inner < times.max()]
        return cls(tuple(float(edge) for edge in np.unique([*inner, times.max()])))

    @property
    def num_outputs(self) -> int:
        """One for each bin."""
        return len(self.edges)

    @property
    def score(self) -> str:
        """The concordance of risks and times."""
        return "c_index"

    @property
    def joint(self) -> bool:
        """No: every patient has a likelihood of their own."""
        return False

    def suffices(self, targets: Sequence[Target]) -> bool:
        """One example does."""
        return len(targets) > 0

    def loss(self, outputs: Float[Tensor, "S K"], targets: Targets) -> Tensor:
        """Negative log-likelihood, averaged over the sequences."""
        edges = outputs.new_tensor(self.edges)
        start = torch.cat([edges.new_zeros(1), edges[:-1]])
        time, event = targets[:, 0].to(outputs.dtype).contiguous(), targets[:, 1] > 0.5
        number = torch.arange(len(edges), device=outputs.device)
        bin_of = torch.bucketize(time, edges[:-1])[:, None]  # an event at an edge ends its bin
        past_middle = time[:, None] >= (start + edges) / 2
        survived = (number < bin_of) | ((number == bin_of) & ~event[:, None] & past_middle)
        died = (number == bin_of) & event[:, None]
        likelihood = logsigmoid(-outputs) * survived + logsigmoid(outputs) * died
        return -likelihood.sum(1).mean()

    def survival(self, outputs: Outputs) -> Outputs:
        """Chance of no event until each edge [N, K]."""
        return np.cumprod(1 / (1 + np.exp(outputs)), axis=1)

    def risk(self, outputs: Outputs) -> NDArray[np.float64]:
        """Risk of each row [N]."""
        return -self.survival(outputs).sum(1)

    def settle(self, outputs: Outputs, targets: Sequence[Target]) -> "DiscreteSurvival":
        """Part the groups at the median risk of these (training) outputs."""
        return replace(self, cut=_median(self.risk(outputs)))

    def curve(self, outputs: Outputs) -> Curve:
        """Survival at the edges."""
        return np.array(self.edges), self.survival(outputs)

    def evaluate(self, outputs: Outputs, targets: NDArray[np.generic]) -> float | None:
        """Harrell's c-index."""
        return measure(self.predictions(outputs, targets.tolist()))["c_index"].value

    def predictions(self, outputs: Outputs, targets: Sequence[Target]) -> RiskPredictions:
        """Times, events and risks."""
        return _risk_predictions(self.risk(outputs), targets, self.cut)

    def truth(self, targets: Sequence[Target]) -> pd.DataFrame:
        """`time` and `event`."""
        return _truth(targets)

    def read(self, outputs: Outputs) -> pd.DataFrame:
        """`risk`, `group`, and `survival_T` at each edge T."""
        table = _read(self.risk(outputs), self.cut)
        for edge, column in zip(self.edges, self.survival(outputs).T, strict=True):
            table[f"survival_{edge:g}"] = column.round(DECIMALS)
        return table

    def plain(self) -> dict[str, object]:
        """Return the fields."""
        return {"name": "survival_discrete", **asdict(self), "edges": list(self.edges)}


@dataclass(frozen=True, slots=True)
class CoxSurvival:
    """The logarithm of a relative hazard: Cox's partial likelihood (1972), ties after Breslow.

    For each event, the softmax of the outputs over all who were still at risk. A lone patient says
    nothing, so that at least `patients` are taken together, with an event among them that another
    patient outlived or was lost with. `cut` is as in `DiscreteSurvival`.

    `times` are those of the training set's events and `hazards` the cumulative baseline hazard at
    them, after Breslow (1972): at each time, events over the sum of exp(risk - cut) of all who were
    still at risk. They give a patient's survival, exp(-hazard exp(risk - cut)), which is constant
    between events. Tables tell it at `shown`, by default the quartiles of `times` over the events
    and the last of them.
    """

    patients: int = 32
    cut: float = 0.0
    shown: tuple[float, ...] = ()
    times: tuple[float, ...] = ()
    hazards: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.patients < 2:
            raise InputError(f"task.patients must be at least 2; got {self.patients}")
        if any(time <= 0 for time in self.shown):
            raise InputError(f"task.times must lie above 0; got {list(self.shown)}")

    @property
    def num_outputs(self) -> int:
        """One."""
        return 1

    @property
    def score(self) -> str:
        """The concordance of risks and times."""
        return "c_index"

    @property
    def joint(self) -> bool:
        """Yes: an event is compared with all who were at risk."""
        return True

    def suffices(self, targets: Sequence[Target]) -> bool:
        """Enough patients, and an event that another one was at risk at."""
        if len(targets) < self.patients:
            return False
        times, events = _columns(targets)
        if not events.any():
            return False
        return bool((times >= times[events].min()).sum() > 1)

    def loss(self, outputs: Float[Tensor, "S 1"], targets: Targets) -> Tensor:
        """Negative log partial likelihood, averaged over the events; 0 without any."""
        order = torch.argsort(targets[:, 0], descending=True, stable=True)
        risk, time, event = outputs[order, 0], targets[order, 0], targets[order, 1] > 0.5
        total = torch.logcumsumexp(risk, 0)
        at_risk = total[_last_of_ties(time)]
        events = event.to(risk.dtype)
        return ((at_risk - risk) * events).sum() / events.sum().clamp(min=1)

    def risk(self, outputs: Outputs) -> NDArray[np.float64]:
        """Risk of each row [N]: its log relative hazard."""
        return outputs[:, 0]

    def settle(self, outputs: Outputs, targets: Sequence[Target]) -> "CoxSurvival":
        """Take the cut and the baseline hazard from these (training) outputs."""
        cut = _median(self.risk(outputs))
        known, events = _columns(targets)
        times, counts = np.unique(known[events], return_counts=True)
        at_risk = known >= times[:, None]
        hazards = np.cumsum(counts / (at_risk @ np.exp(self.risk(outputs) - cut)))
        shown = np.unique(np.quantile(known[events], (0.25, 0.5, 0.75, 1.0), method="nearest"))
        return replace(
            self,
            cut=cut,
            shown=self.shown or tuple(shown.tolist()),
            times=tuple(times.tolist()),
            hazards=tuple(hazards.tolist()),
        )

    def curve(self, outputs: Outputs) -> Curve:
        """Survival at the times of the training set's events."""
        return np.array(self.times), self.survival(outputs, self.times)

    def survival(self, outputs: Outputs, times: Sequence[float]) -> Outputs:
        """Chance of no event until each of some times [N, K]; after the last event it stays."""
        last = np.searchsorted(self.times, times, side="right")
        hazards = np.concatenate([[0.0], self.hazards])[last]
        return np.exp(-hazards * np.exp(self.risk(outputs) - self.cut)[:, None])

    def evaluate(self, outputs: Outputs, targets: NDArray[np.generic]) -> float | None:
        """Harrell's c-index."""
        return measure(self.predictions(outputs, targets.tolist()))["c_index"].value

    def predictions(self, outputs: Outputs, targets: Sequence[Target]) -> RiskPredictions:
        """Times, events and risks."""
        return _risk_predictions(self.risk(outputs), targets, self.cut)

    def truth(self, targets: Sequence[Target]) -> pd.DataFrame:
        """`time` and `event`."""
        return _truth(targets)

    def read(self, outputs: Outputs) -> pd.DataFrame:
        """`risk`, `group`, and `survival_T` at each shown time T."""
        table = _read(self.risk(outputs), self.cut)
        if self.times:
            for time, column in zip(self.shown, self.survival(outputs, self.shown).T, strict=True):
                table[f"survival_{time:g}"] = column.round(DECIMALS)
        return table

    def plain(self) -> dict[str, object]:
        """Return the fields."""
        lists = {key: list(getattr(self, key)) for key in ("shown", "times", "hazards")}
        return {"name": "survival_cox", **asdict(self), **lists}


Survival = DiscreteSurvival | CoxSurvival


def read_survival(plain: Mapping[str, object]) -> Survival:
    """Make an objective again from what `plain` returned."""
    fields = {key: value for key, value in plain.items() if key != "name"}
    if plain["name"] == "survival_cox":
        lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
        return CoxSurvival(**fields | lists)  # type: ignore[arg-type]
    edges = tuple(fields.pop("edges"))  # type: ignore[arg-type]
    return DiscreteSurvival(edges, **fields)  # type: ignore[arg-type]


def _median(risks: NDArray[np.float64]) -> float:
    return float(np.median(risks.round(DECIMALS)))


def _last_of_ties(time: Float[Tensor, " S"]) -> Int64[Tensor, " S"]:
    """Place of the last row with each row's time, in descending times."""
    _, counts = torch.unique_consecutive(time, return_counts=True)
    return (counts.cumsum(0) - 1).repeat_interleave(counts)


def _columns(targets: Sequence[Target]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    table = np.array(targets, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1] > 0.5


def _risk_predictions(
    risks: NDArray[np.float64], targets: Sequence[Target], cut: float
) -> RiskPredictions:
    times, events = _columns(targets)
    rounded = risks.round(DECIMALS)
    return RiskPredictions(times, events, rounded, rounded > cut)


def _truth(targets: Sequence[Target]) -> pd.DataFrame:
    times, events = _columns(targets)
    return pd.DataFrame({"time": times, "event": events.astype(np.int64)})


def _read(risks: NDArray[np.float64], cut: float) -> pd.DataFrame:
    rounded = risks.round(DECIMALS)
    return pd.DataFrame({"risk": rounded, "group": np.where(rounded > cut, "high", "low")})
