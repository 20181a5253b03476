"""Predictions of a network for examples, whatever their order and batches."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipelines.shared.batch import Examples, TokenBudgetBatches, pack


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """What a network says of one example: float32 on the CPU.

    `logits` are the sequence's, or those of each token (a network with `per_token`). `embedding` is
    the sequence's vector that the head reads, `contributions` what each token adds to each number
    (`NetworkOutput`), where they were asked for.
    """

    id: str
    record: int
    logits: Float[Tensor, "... C"]
    probabilities: Float[Tensor, "... C"]
    attention: Float[Tensor, " T"]
    embedding: Float[Tensor, " F"] | None = None
    contributions: Float[Tensor, "T C"] | None = None


def predict(
    network: nn.Module,
    examples: Examples,
    *,
    max_tokens: int,
    device: torch.device | str = "cpu",
    explain: bool = False,
    autocast: torch.dtype | None = None,
) -> Iterator[Prediction]:
    """Yield a prediction for each example, in their order, reading one batch at a time.

    The network is moved to `device` and set to evaluation. Packed sequences do not see each other,
    so a result depends on its batch by rounding noise alone. `explain` adds
    contributions; `autocast` computes products in a lower precision, such as torch.bfloat16.
    """
    network.to(device).eval()
    kind = torch.device(device).type
    for indices in TokenBudgetBatches(examples.lengths, max_tokens):
        members = [examples[index] for index in indices]
        batch = pack(members)
        # explaining takes gradients, which inference mode would forbid
        quiet = torch.no_grad() if explain else torch.inference_mode()
        with quiet, torch.autocast(kind, autocast, enabled=autocast is not None):
            given = batch.to(device)
            output = network(given, explain=True) if explain else network(given)
        logits = output.logits.float().cpu()
        lengths = batch.lengths.tolist()
        if getattr(network, "per_token", False):
            logits = logits.split(lengths)
        parts = output.attention.float().cpu().split(lengths)
        vectors = getattr(output, "embedding", None)
        embeddings = [None] * len(members) if vectors is None else vectors.float().cpu()
        added = [None] * len(members)
        if explain:
            added = output.contributions.float().cpu().split(lengths)
        for row, (example, attention) in enumerate(zip(members, parts, strict=True)):
            yield Prediction(
                id=example.id,
                record=example.record,
                logits=logits[row],
                probabilities=logits[row].softmax(dim=-1),
                attention=attention,
                embedding=embeddings[row],
                contributions=added[row],
            )
