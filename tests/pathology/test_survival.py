"""Losses against their definitions, and linear models against lifelines on its own data sets."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from lifelines import CoxPHFitter, KaplanMeierFitter
from lifelines.datasets import load_gbsg2, load_rossi
from lifelines.utils import concordance_index
from torch import nn

from pipelines.pathology.survival import CoxSurvival, DiscreteSurvival, read_survival
from pipelines.shared.batch import Example, ExampleList, PackedBatch, pack_within
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitSettings, fit
from pipelines.shared.network import NetworkOutput
from pipelines.shared.optim import OptimSettings
from pipelines.shared.task import SequenceTask


class Linear(nn.Module):
    """A linear model of bags of one tile."""

    def __init__(self, num_features: int, num_outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, num_outputs))
        nn.init.zeros_(self.layer[1].weight)

    def forward(self, batch: PackedBatch) -> NetworkOutput:
        logits = self.layer(batch.inputs)
        return NetworkOutput(logits, torch.ones(len(logits)), batch.inputs)


def one_tile_bags(covariates: np.ndarray, targets: list[tuple[float, float]]) -> ExampleList:
    rows = torch.tensor(covariates, dtype=torch.float32)
    return ExampleList(
        [
            Example(row[None], torch.zeros(1, 2, dtype=torch.int64), target, f"p{i}", f"p{i}", i)
            for i, (row, target) in enumerate(zip(rows, targets, strict=True))
        ]
    )


def rossi() -> tuple[pd.DataFrame, str, str]:
    return load_rossi(), "week", "arrest"


def gbsg2() -> tuple[pd.DataFrame, str, str]:
    table = pd.get_dummies(load_gbsg2(), drop_first=True, dtype=float)
    return table, "time", "cens"


@pytest.mark.filterwarnings("ignore:.*keyword-only")  # of pandas, from within lifelines
@pytest.mark.parametrize("load", [rossi, gbsg2])
@pytest.mark.parametrize("kind", ["cox", "discrete"])
def test_a_linear_model_reaches_lifelines_c_index(kind: str, load, tmp_path: Path) -> None:
    table, time, event = load()
    reference = CoxPHFitter().fit(table, time, event).concordance_index_
    covariates = table.drop(columns=[time, event]).to_numpy(dtype=np.float64)
    covariates = (covariates - covariates.mean(0)) / covariates.std(0)
    targets = [(float(t), float(e)) for t, e in zip(table[time], table[event], strict=True)]
    bags = one_tile_bags(covariates, targets)
    objective = CoxSurvival(64) if kind == "cox" else DiscreteSurvival.of(targets, bins=8)
    torch.manual_seed(0)
    settings = FitSettings(
        epochs=30, max_tokens=64, select="last", save_last=False, progress=False,
        optim=OptimSettings(lr=0.03, weight_decay=0.0),
    )  # fmt: skip
    network = Linear(covariates.shape[1], objective.num_outputs)
    network, report = fit(network, bags, bags, objective=objective, out=tmp_path, settings=settings)
    outputs = network.layer.eval()(torch.cat([bag.inputs for bag in bags])).detach().double()
    found = concordance_index(table[time], -objective.risk(outputs.numpy()), table[event])
    assert abs(found - reference) < 0.01
    assert report.scores["val_c_index"] == pytest.approx(found, abs=1e-4)


def test_the_c_index_is_never_turned_round() -> None:
    targets = [(1.0, 1.0), (2.0, 1.0), (3.0, 0.0)]
    right = np.array([[3.0], [2.0], [1.0]])
    assert CoxSurvival().evaluate(right, np.array(targets)) == 1.0
    assert CoxSurvival().evaluate(-right, np.array(targets)) == 0.0


def test_cox_equals_its_definition_with_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    risk = torch.randn(60, 1, generator=generator, dtype=torch.float64).requires_grad_()
    time = torch.randint(1, 12, (60,), generator=generator).double()
    event = torch.rand(60, generator=generator) < 0.6
    loss = CoxSurvival().loss(risk, torch.stack([time, event.double()], 1))
    terms = [risk[time >= time[i], 0].logsumexp(0) - risk[i, 0] for i in range(60) if event[i]]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    first, second = (torch.autograd.grad(value, risk)[0] for value in (loss, expected))
    torch.testing.assert_close(first, second)


def test_cox_without_events_is_zero_and_has_a_gradient() -> None:
    risk = torch.randn(5, 1).requires_grad_()
    loss = CoxSurvival().loss(risk, torch.tensor([[1.0, 0.0]] * 5))
    loss.backward()
    assert loss.item() == 0
    assert risk.grad is not None
    assert not risk.grad.any()


def test_discrete_time_equals_its_definition() -> None:
    objective = DiscreteSurvival((1.0, 2.0, 4.0))
    outputs = torch.randn(6, 3, dtype=torch.float64)
    targets = [(0.5, 1), (1.0, 1), (2.5, 0), (3.5, 0), (9.0, 1), (0.2, 0)]
    hazard = outputs.sigmoid()
    wanted = torch.stack([
        hazard[0, 0],
        hazard[1, 0],  # at an edge: the bin that it ends
        (1 - hazard[2, :2]).prod(),  # lost in the first half of the last bin
        (1 - hazard[3, :3]).prod(),  # in its second half
        (1 - hazard[4, :2]).prod() * hazard[4, 2],  # beyond the last edge
        torch.tensor(1.0, dtype=torch.float64),
    ])  # fmt: skip
    loss = objective.loss(outputs, torch.tensor(targets, dtype=torch.float64))
    torch.testing.assert_close(loss, -wanted.log().mean())
    survival = objective.survival(outputs.numpy())
    np.testing.assert_allclose(survival[:, 1], ((1 - hazard[:, 0]) * (1 - hazard[:, 1])).numpy())


def test_bins_hold_equal_numbers_of_training_events() -> None:
    times = np.arange(1.0, 101.0)
    targets = [(t, float(t % 2)) for t in times]
    objective = DiscreteSurvival.of(targets, bins=5)
    odd = times[times % 2 == 1]
    counts, _ = np.histogram(odd, bins=[0, *objective.edges])
    assert counts.tolist() == [10] * 5
    assert objective.edges[-1] == 100
    with pytest.raises(InputError, match="no event"):
        DiscreteSurvival.of([(1.0, 0.0)] * 5, bins=4)


def test_gradients_over_packs_are_those_of_all_patients_at_once() -> None:
    rng = np.random.default_rng(0)
    targets = [
        (float(time), float(event))
        for time, event in zip(rng.exponential(size=40), rng.integers(0, 2, 40), strict=True)
    ]
    bags = one_tile_bags(rng.normal(size=(40, 7)), targets)
    found = []
    for max_tokens in (1_000, 3):
        torch.manual_seed(1)
        network = Linear(7, 1)
        torch.nn.init.normal_(network.layer[1].weight)
        task = SequenceTask(
            network, CoxSurvival(), optim=OptimSettings(), count_steps=lambda: 1, seed=0
        )
        packs = pack_within(list(bags), max_tokens)
        task.training_step(packs, 0).backward()
        found.append((len(packs), network.layer[1].weight.grad))
    assert found[0][0] == 1
    assert found[1][0] == 14
    torch.testing.assert_close(found[0][1], found[1][1])
    assert found[1][1].abs().sum() > 0


def test_recomputed_packs_drop_what_they_dropped_before() -> None:
    """With dropout, backward must see the very masks of the pass that gave the risks."""
    bags = one_tile_bags(np.ones((4, 3)), [(1.0, 1.0), (2.0, 1.0), (3.0, 0.0), (4.0, 1.0)])
    masks: list[torch.Tensor] = []
    network = Linear(3, 1, 0.5)
    network.layer[0].register_forward_hook(lambda _, __, out: masks.append(out.detach().clone()))
    task = SequenceTask(
        network, CoxSurvival(2), optim=OptimSettings(), count_steps=lambda: 1, seed=0
    )
    task.training_step(pack_within(list(bags), 1), 0).backward()
    assert len(masks) == 8
    again = masks[4:]  # backward comes to the last pack first
    for first, second in zip(masks[:4], again[::-1], strict=True):
        torch.testing.assert_close(first, second)


def test_batches_for_cox_hold_enough_patients_and_an_event() -> None:
    objective = CoxSurvival(4)
    lost = (5.0, 0.0)
    assert not objective.suffices([(1.0, 1.0)] * 3)
    assert not objective.suffices([lost] * 10)
    assert not objective.suffices([(9.0, 1.0), *[lost] * 9])  # nobody else is at risk at 9
    assert objective.suffices([(1.0, 1.0), *[lost] * 3])


@pytest.mark.filterwarnings("ignore:.*keyword-only")  # of pandas, from within lifelines
@pytest.mark.parametrize("load", [rossi, gbsg2])
def test_curves_after_cox_equal_lifelines(load) -> None:
    table, time, event = load()
    reference = CoxPHFitter().fit(table, time, event)
    outputs = reference.predict_log_partial_hazard(table).to_numpy()[:, None]
    targets = list(zip(table[time].astype(float), table[event].astype(float), strict=True))
    objective = read_survival(CoxSurvival().settle(outputs, targets).plain())
    times, survival = objective.curve(outputs)
    expected = reference.predict_survival_function(table, times).to_numpy().T
    assert set(times) == {t for t, seen in targets if seen}
    np.testing.assert_allclose(survival, expected, atol=1e-9)
    between = [times[0] / 2, times[3] + 1e-3, times[-1] + 100]
    held = objective.survival(outputs, between)
    np.testing.assert_allclose(held, np.column_stack([0 * held[:, 0] + 1, survival[:, [3, -1]]]))


def test_the_curve_does_not_depend_on_where_risks_are_counted_from() -> None:
    outputs, targets = np.array([[0.2], [1.4], [-0.3]]), [(1.0, 1.0), (2.0, 1.0), (3.0, 0.0)]
    one, two = (CoxSurvival(2).settle(o, targets).curve(o)[1] for o in (outputs, outputs + 30))
    np.testing.assert_allclose(one, two, atol=1e-12)


def test_discrete_curves_follow_those_who_are_left() -> None:
    """A model of everyone alike has the life table as its curve (checked by Kaplan and Meier)."""
    table, time, event = rossi()
    targets = list(zip(table[time].astype(float), table[event].astype(float), strict=True))
    objective = DiscreteSurvival.of(targets, bins=4)
    found, survival = objective.curve(hazards_of(objective, targets))
    known = KaplanMeierFitter().fit(table[time], table[event])
    assert found.tolist() == list(objective.edges)
    np.testing.assert_allclose(survival[0], known.survival_function_at_times(found), atol=1e-9)


def hazards_of(objective: DiscreteSurvival, targets: list[tuple[float, float]]) -> np.ndarray:
    """Log odds of the events of each bin among those at its start; none is lost within one."""
    known = np.array(targets)
    start = np.array([0.0, *objective.edges[:-1]])
    in_bin = (known[:, :1] > start) & (known[:, :1] <= np.array(objective.edges))
    died = (in_bin & (known[:, 1:] > 0)).sum(0)
    left = (known[:, :1] > start).sum(0)
    return np.log(died / (left - died))[None]


def test_times_that_are_asked_for_are_shown() -> None:
    outputs, targets = np.array([[0.2], [1.4], [-0.3]]), [(1.0, 1.0), (2.0, 1.0), (3.0, 0.0)]
    table = CoxSurvival(2, shown=(1.5, 10.0)).settle(outputs, targets).read(outputs)
    assert list(table) == ["risk", "group", "survival_1.5", "survival_10"]
    assert (table["survival_10"] < table["survival_1.5"]).all()
    quartiles = CoxSurvival(2).settle(outputs, targets).read(outputs)
    assert list(quartiles) == ["risk", "group", "survival_1", "survival_2"]
    with pytest.raises(InputError, match="above 0"):
        CoxSurvival(2, shown=(0.0, 1.0))


@pytest.mark.parametrize("objective", [CoxSurvival(40, 0.5), DiscreteSurvival((1.0, 2.5), -1.0)])
def test_objectives_come_back_from_plain_values(objective) -> None:
    assert read_survival(objective.plain()) == objective
    outputs = np.linspace(-2, 2, 10).reshape(5, 2)[:, : objective.num_outputs]
    targets = [(float(time), 1.0) for time in range(1, 6)]
    settled = objective.settle(outputs, targets)
    assert read_survival(settled.plain()) == settled
    table = settled.read(outputs)
    assert (table["group"] == "high").sum() == 2  # the median itself is low
    assert {"risk", "group"} <= set(table)
