"""A small network and examples that only its training tells apart."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pipelines.shared.batch import Example, ExampleList, PackedBatch


@dataclass
class Output:
    logits: Tensor
    attention: Tensor


class MeanNetwork(nn.Module):
    """Pool tokens by a learned attention; a stand-in for the sparse network."""

    def __init__(self, dim: int = 3, num_classes: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.config: dict[str, object] = {
            "dim": dim,
            "num_classes": num_classes,
            "dropout": dropout,
        }
        self.key = nn.Linear(dim, 1)
        self.value = nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(16, num_classes)

    def forward(self, batch: PackedBatch) -> Output:
        parts = self.key(batch.inputs).squeeze(-1).split(batch.lengths.tolist())
        attention = torch.cat([part.softmax(dim=0) for part in parts])
        weighted = (attention[:, None] * self.value(batch.inputs)).split(batch.lengths.tolist())
        pooled = torch.stack([part.sum(dim=0) for part in weighted])
        return Output(self.head(pooled), attention)


@pytest.fixture
def make_network() -> Callable[..., MeanNetwork]:
    def make(seed: int = 0, **settings: float) -> MeanNetwork:
        torch.manual_seed(seed)
        return MeanNetwork(**settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_examples() -> Callable[..., ExampleList]:
    return draw_examples


def draw_examples(count: int, *, seed: int = 0, shift: float = 0.7) -> ExampleList:
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        length = 3 + index % 5
        inputs = torch.randn(length, 3, generator=generator) + shift * (index % 2)
        coords = torch.arange(length)[:, None]
        examples.append(Example(inputs, coords, index % 2, f"e{index}", f"p{index // 2}", index))
    return ExampleList(examples)
