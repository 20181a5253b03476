import pytest
import torch
from torch import nn

from pipelines.shared.errors import InputError
from pipelines.shared.optim import OptimSettings, build_optimizer, lr_factor


def test_rate_warms_up_then_falls_to_its_end() -> None:
    settings = OptimSettings(warmup=0.1, final_lr=0.05)

    factors = [lr_factor(step, settings, total_steps=100) for step in range(101)]

    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors == sorted(factors[:10]) + sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.05)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_short_runs_have_a_rate(total_steps: int) -> None:
    settings = OptimSettings()

    assert all(lr_factor(s, settings, total_steps=total_steps) > 0 for s in range(total_steps + 1))


def test_only_matrices_decay() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    network[0].weight.requires_grad_(False)

    optimizer, _ = build_optimizer(network, OptimSettings(), total_steps=10)

    decayed, kept = optimizer.param_groups
    assert (decayed["params"], decayed["weight_decay"]) == ([], 0.01)
    assert [p.shape for p in kept["params"]] == [torch.Size([3])] * 3
    assert kept["weight_decay"] == 0.0


def test_sgd_takes_the_published_step() -> None:
    """Nesterov's momentum with decay added to the gradient (Sutskever et al., ICML 2013)."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, 2.0)
    settings = OptimSettings(
        name="sgd", lr=0.1, weight_decay=0.5, momentum=0.9, warmup=0.0, final_lr=1.0
    )
    optimizer, _ = build_optimizer(network, settings, total_steps=2)
    weight, velocity = 2.0, 0.0
    for _ in range(2):
        network.weight.grad = torch.ones(1, 1)
        optimizer.step()
        gradient = 1.0 + 0.5 * weight
        velocity = 0.9 * velocity + gradient
        weight -= 0.1 * (gradient + 0.9 * velocity)
    assert network.weight.item() == pytest.approx(weight, abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "adam"},
        {"momentum": 1.0},
        {"lr": 0.0},
        {"weight_decay": -1.0},
        {"warmup": 1.0},
        {"final_lr": 2.0},
    ],
)
def test_settings_without_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        OptimSettings(**wrong)  # type: ignore[arg-type]
