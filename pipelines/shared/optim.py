"""AdamW or SGD, with a linear warm-up and a cosine decay."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pipelines.shared.errors import InputError

Name = Literal["adamw", "sgd"]


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """What `optim=` chooses; `warmup` and `final_lr` are fractions of all steps and of `lr`.

    `betas` are AdamW's, `momentum` is SGD's (Nesterov's where it is above 0). AdamW takes
    `weight_decay` off the weights, SGD adds it to the gradient.
    """

    name: Name = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    momentum: float = 0.9
    warmup: float = 0.1
    final_lr: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.name not in get_args(Name):
            raise InputError(
                f"optim.name must be one of {', '.join(get_args(Name))}; got {self.name!r}"
            )
        if self.lr <= 0:
            raise InputError(f"optim.lr must be above 0; got {self.lr}")
        if self.weight_decay < 0:
            raise InputError(f"optim.weight_decay must not be negative; got {self.weight_decay}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"optim.momentum must lie in [0, 1); got {self.momentum}")
        if not (0 <= self.warmup < 1 and 0 <= self.final_lr <= 1):
            raise InputError(
                "optim.warmup must lie in [0, 1) and optim.final_lr in [0, 1]; "
                f"got {self.warmup} and {self.final_lr}"
            )


def build_optimizer(
    network: nn.Module, settings: OptimSettings, *, total_steps: int, fused: bool = True
) -> tuple[Optimizer, LambdaLR]:
    """Build the optimiser and its schedule; only matrices decay, not biases, gains and tokens.

    On the CPU a step is one call for all weights, unless `fused` is off: Lightning refuses to clip
    gradients before such a step in mixed precision.
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {
            "params": [parameter for parameter in trained if parameter.ndim >= 2],
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [parameter for parameter in trained if parameter.ndim < 2],
            "weight_decay": 0.0,
        },
    ]
    # on a GPU the default is as fast
    on_cpu = all(parameter.device.type == "cpu" for parameter in trained)
    fused_step = True if fused and on_cpu else None
    optimizer: Optimizer
    if settings.name == "sgd":
        momentum = settings.momentum
        optimizer = SGD(
            groups, lr=settings.lr, momentum=momentum, nesterov=momentum > 0, fused=fused_step
        )
    else:
        optimizer = AdamW(groups, lr=settings.lr, betas=settings.betas, fused=fused_step)
    schedule = LambdaLR(optimizer, lambda step: lr_factor(step, settings, total_steps=total_steps))
    return optimizer, schedule


def lr_factor(step: int, settings: OptimSettings, *, total_steps: int) -> float:
    """Return the fraction of `lr` that holds at a step (0-based)."""
    warmup_steps = round(settings.warmup * total_steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return settings.final_lr + (1.0 - settings.final_lr) * cosine
