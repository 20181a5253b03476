"""The task: keys with values, and questions at known distances."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """Sequences of `length` tokens with `per_distance` questions at each distance, in its order.

    No key stands twice in a sequence; a guess is right once in `num_values`.
    """

    length: int
    distances: tuple[int, ...]
    per_distance: int
    num_values: int

    @property
    def num_keys(self) -> int:
        """Different keys: a few more than a sequence holds."""
        return self.per_distance * len(self.distances) + 6


@dataclass(frozen=True)
class Batch:
    """B sequences: N keys and values, and where each pair and each question stands.

    Of tokens that would stand in one place, none does: `placed` tells of the pairs, then of the
    questions, which stand.
    """

    key: Int[Tensor, "B N"]
    value: Int[Tensor, "B N"]
    pair_at: Int[Tensor, "B N"]
    question_at: Int[Tensor, "B N"]
    placed: Bool[Tensor, "B 2*N"]

    @property
    def fair(self) -> Bool[Tensor, "B N"]:
        """Questions that stand, with the pair that they ask for."""
        pairs, questions = self.placed.chunk(2, dim=1)
        return pairs & questions


def make_batch(task: Task, size: int, generator: torch.Generator) -> Batch:
    """Draw sequences; distances are up to an eighth shorter than they are called."""
    furthest = torch.tensor(task.distances).repeat_interleave(task.per_distance)
    number = furthest.numel()
    shuffled = [torch.randperm(task.num_keys, generator=generator) for _ in range(size)]
    value = torch.randint(task.num_values, (size, number), generator=generator)
    uniform = torch.rand(2, size, number, generator=generator, dtype=torch.float64)
    distance = furthest - (uniform[0] * (furthest // 8)).long()
    question_at = distance + (uniform[1] * (task.length - distance)).long()
    pair_at = question_at - distance
    places = torch.cat([pair_at, question_at], 1)
    tokens_at = torch.zeros(size, task.length).scatter_add_(1, places, torch.ones(places.shape))
    placed = tokens_at.gather(1, places) == 1
    return Batch(torch.stack(shuffled)[:, :number], value, pair_at, question_at, placed)
