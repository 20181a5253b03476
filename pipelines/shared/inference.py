"""Predictions of a network for examples, whatever their order and batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.shared.batch import Examples, TokenBudgetBatches, pack


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a network says of one example: float32 on the CPU."""

    id: str
    record: int
    logits: Float[Tensor, " C"]
    probabilities: Float[Tensor, " C"]
    attention: Float[Tensor, " T"]


def predict(
    network: nn.Module,
    examples: Examples,
    *,
    max_tokens: int,
    device: torch.device | str = "cpu",
) -> Iterator[Prediction]:
    """Yield a prediction for each example, in their order, reading one batch at a time.

    The network is moved to `device` and set to evaluation. Packed sequences do not see each other,
    so a result depends on its batch by rounding noise alone.
    """
    network.to(device).eval()
    for indices in TokenBudgetBatches(examples.lengths, max_tokens):
        members = [examples[index] for index in indices]
        batch = pack(members)
        with torch.inference_mode():
            output = network(batch.to(device))
        logits = output.logits.float().cpu()
        parts = output.attention.float().cpu().split(batch.lengths.tolist())
        for row, (example, attention) in enumerate(zip(members, parts, strict=True)):
            yield Prediction(
                id=example.id,
                record=example.record,
                logits=logits[row],
                probabilities=logits[row].softmax(dim=0),
                attention=attention,
            )
