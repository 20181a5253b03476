"""A small encoder, and its training with one pattern."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import log
from statistics import mean

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_core.nn import SparseEncoder
from sparse_core.nn.attention import AnyLayout
from sparse_core.nn.encoder import EncoderLayer
from sparse_core.patterns import GlobalTokens, Pattern
from sparse_core.pooling import PooledLayout
from sparse_core.recall.task import Batch, Task, make_batch
from sparse_core.routing import RoutedLayout


@dataclass(frozen=True)
class Settings:
    """One size of the experiment: the task, the encoder, its training, and the patterns."""

    task: Task
    dim: int
    heads: int
    batch: int
    steps: int
    lr: float
    seeds: int
    depth: int = 2
    eval_batches: int = 16


class Recaller(nn.Module):
    """Tokens, an encoder, and a guess at each question.

    To learn in few steps, all patterns get the same start: channels are parted into what a token
    holds, what it asks for, and the rest (values, blanks); keys are orthogonal; and the first
    queries turn what is asked for as the first keys turn what is held, so sharply that a match
    counts about as much as the square root of all blanks. In pools, tokens that hold or ask for a
    key count more than blanks from the start. Global tokens start as pairs and questions of one key
    each. All of it is trained, and how values travel is learned from nothing.
    """

    def __init__(self, settings: Settings, pattern: Pattern) -> None:
        super().__init__()
        task, dim = settings.task, settings.dim
        self.task, self.part = task, 3 * dim // 8
        self.key = nn.Parameter(torch.zeros(task.num_keys, dim))
        self.value = nn.Parameter(torch.zeros(task.num_values, dim))
        self.blank = nn.Parameter(torch.zeros(dim))
        self.asks = nn.Parameter(torch.zeros(dim))
        self.registers = nn.Parameter(torch.zeros(count_globals(pattern), dim))
        self.encoder = SparseEncoder(
            dim, settings.depth, settings.heads, pattern,
            rotary_axes=0, mlp_ratio=2, pooling="learned",
        )  # fmt: skip
        self.head = nn.Linear(dim, task.num_values)
        self._start(sharpness=1.3 * log(task.length) / (dim // settings.heads) ** 0.5)

    @torch.no_grad()
    def _start(self, sharpness: float) -> None:
        part, dim = self.part, len(self.blank)
        nn.init.orthogonal_(self.key[:, :part])
        rest = torch.empty(len(self.value) + 1, dim - 2 * part)
        nn.init.orthogonal_(rest)
        self.value[:, 2 * part :], self.blank[2 * part :] = rest[:-1], rest[-1]
        for codes in (self.key, self.value, self.blank):
            codes.mul_((dim / 2) ** 0.5)
        chosen = self.key[torch.arange(len(self.registers)) % len(self.key)]
        self.registers.copy_(chosen + chosen.roll(part, 1))
        for layer in self.encoder.layers:
            turn = torch.empty(dim, part)
            nn.init.orthogonal_(turn, gain=sharpness**0.5)
            assert isinstance(layer, EncoderLayer)
            assert layer.attention is not None
            weight = layer.attention.qkv.weight
            weight[:dim, part : 2 * part] = turn
            weight[dim : 2 * dim, :part] = turn
            self._start_pooling(layer, log(self.task.length) / 4)

    def _start_pooling(self, layer: EncoderLayer, scale: float) -> None:
        """Let keys count `scale` in pools, and blanks nothing: in those of keys, and of queries."""
        attention = layer.attention
        assert attention is not None
        assert attention.pool_by is not None
        assert layer.norm_attention is not None
        tokens = layer.norm_attention(torch.cat([self.key, self.blank[None]]))
        _, seen, _ = attention.project(tokens[None])
        counts = torch.full((len(tokens), 1), scale)
        counts[-1] = 0
        attention.pool_by.copy_((torch.linalg.pinv(seen[0].transpose(0, 1)) @ counts)[..., 0])

    def layouts(self, size: int) -> tuple[AnyLayout, ...]:
        """Lay out a batch: its sequences are packed."""
        length = self.task.length + len(self.registers)
        return self.encoder.build_layouts(size * length, segments=[length] * size)

    def forward(self, batch: Batch, layouts: tuple[AnyLayout, ...]) -> Float[Tensor, "B N V"]:
        """Score the values at each question."""
        size, dim = batch.key.shape[0], len(self.blank)
        key = self.key[batch.key]
        tokens = torch.cat([key + self.value[batch.value], key.roll(self.part, 2) + self.asks], 1)
        tokens = torch.where(batch.placed[..., None], tokens, self.blank)
        places = torch.cat([batch.pair_at, batch.question_at], 1)[..., None].expand_as(tokens)
        x = self.blank.expand(size, self.task.length, dim).scatter(1, places, tokens)
        x = torch.cat([self.registers.expand(size, -1, -1), x], 1)
        encoded = self.encoder(x.reshape(1, -1, dim), layouts).view(x.shape)
        at = (batch.question_at + len(self.registers))[..., None].expand(-1, -1, dim)
        scores: Tensor = self.head(encoded.gather(1, at))
        return scores


@dataclass(frozen=True)
class Result:
    """What one run found; `accuracy` goes by distance."""

    pattern: str
    seed: int
    settings: str
    accuracy: dict[str, float]
    keys_per_query: float
    seconds_per_step: float
    loss: float


def train(
    pattern: Pattern,
    settings: Settings,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    report: Callable[[str], None] = print,
) -> Result:
    """Train one encoder on sequences that never come again, and ask it about others."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Recaller(settings, pattern).to(device)
    layouts = model.layouts(settings.batch)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: min(1, 10 * (step + 1) / settings.steps) * (1 - step / settings.steps),
    )

    def guess() -> tuple[Batch, Tensor]:
        drawn = make_batch(settings.task, settings.batch, generator)
        batch = Batch(**{name: x.to(device) for name, x in vars(drawn).items()})
        kind = torch.device(device).type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            return batch, model(batch, layouts).float()

    begin, last = time.perf_counter(), 0.0
    for step in range(settings.steps):
        batch, scores = guess()
        loss = nn.functional.cross_entropy(scores[batch.fair], batch.value[batch.fair])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimiser.step()
        shape.step()
        if (step + 1) % max(1, settings.steps // 4) == 0:
            last = float(loss.detach())
            report(f"step {step + 1}, loss {last:.3f}, {time.perf_counter() - begin:.0f} s")
    seconds = (time.perf_counter() - begin) / settings.steps
    right, asked = torch.zeros(2, len(settings.task.distances), dtype=torch.float64)
    for _ in range(settings.eval_batches):
        with torch.no_grad():
            batch, scores = guess()
        hit = (scores.argmax(-1) == batch.value) & batch.fair
        for total, found in ((right, hit), (asked, batch.fair)):
            total += found.unflatten(1, (-1, settings.task.per_distance)).sum((0, 2)).cpu()
    accuracy = {
        str(distance): float(share)
        for distance, share in zip(settings.task.distances, right / asked, strict=True)
    }
    cost = mean(keys_per_query(layout) for layout in layouts)
    return Result(str(pattern), seed, describe(settings), accuracy, cost, seconds, last)


def describe(settings: Settings) -> str:
    """Write down everything but the number of seeds, so that results of others are not mixed in."""
    return json.dumps(asdict(replace(settings, seeds=1)), sort_keys=True)


def count_globals(pattern: Pattern) -> int:
    """Count the global tokens that a pattern begins with."""
    if isinstance(pattern, GlobalTokens):
        return pattern.first
    return max((count_globals(part) for part in getattr(pattern, "parts", ())), default=0)


def keys_per_query(layout: AnyLayout) -> float:
    """Keys that an engine visits for a query of a head, masked or not."""
    if isinstance(layout, PooledLayout):
        layout = layout.layout
    if isinstance(layout, RoutedLayout):
        chosen = layout.exists.sum() * layout.num_chosen * layout.exists.shape[1]
        return keys_per_query(layout.seen) + float(chosen) / layout.seen.num_queries
    return layout.visited_pairs() / layout.num_groups / layout.num_queries
