"""The network of both pipelines: stem, sparse encoder with registers, pooling, head."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from pipelines.shared.batch import PackedBatch
from pipelines.shared.errors import InputError
from sparse_core.layout import BlockLayout
from sparse_core.nn import SparseEncoder
from sparse_core.ops import Backend
from sparse_core.patterns import GlobalTokens, Pattern

Pooling = Literal["attention", "mean", "max"]


@dataclass(frozen=True, slots=True)
class NetworkOutput:
    """Class scores of each sequence, and how much each input token counted (sums to 1 in each)."""

    logits: Float[Tensor, "S C"]
    attention: Float[Tensor, " T"]


class SequenceClassifier(nn.Module):
    """Classify packed sequences.

    The stem turns inputs into tokens. Registers (Darcet et al. 2024) go in front of each sequence:
    as many as the pattern's `GlobalTokens(first=...)` asks for, at coordinate 0. After the encoder
    the head reads the pooled tokens plus the mean of the registers. With `depth=0` and attention
    pooling this is ABMIL (Ilse et al. 2018, equation 9, the gated form).

    `pattern` is a pattern's text, or a list with one for each layer; None leaves attention out.
    """

    def __init__(
        self,
        stem: nn.Module,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        pattern: str | list[str] | None,
        coord_dims: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        pooling: Pooling = "attention",
        rotary_base: float = 10_000.0,
        checkpointing: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        patterns = read_patterns(pattern, depth)
        for known in patterns:
            if known is not None:
                known.terms(coord_dims)  # raises if it asks for axes that are not there
        self.stem = stem
        self.encoder = SparseEncoder(
            dim,
            depth,
            num_heads,
            patterns,
            coord_dims=coord_dims,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            rotary_base=rotary_base,
            checkpointing=checkpointing,
            backend=backend,
        )
        self.num_registers = max((leading_globals(p) for p in patterns if p), default=0)
        self.registers = nn.Parameter(torch.randn(self.num_registers, dim) * 0.02)
        self.pool = SequencePooling(dim, pooling)
        self.head = nn.Sequential(
            nn.LayerNorm(dim), nn.Dropout(dropout), nn.Linear(dim, num_classes)
        )

    def forward(self, batch: PackedBatch) -> NetworkOutput:
        """Score every sequence of the batch."""
        x = self.stem(batch.inputs, batch.lengths)
        lengths = batch.lengths.to(x.device)
        segment, place = self._places(batch.coords, lengths)
        joined = self._with_registers(x, place, lengths)
        encoded = self.encoder(joined[None], self.build_layouts(batch))[0]
        pooled, attention = self.pool(encoded[place], segment, lengths.numel())
        if self.num_registers:
            pooled = pooled + encoded[self._register_places(lengths)].mean(1)
        return NetworkOutput(self.head(pooled), attention)

    def build_layouts(self, batch: PackedBatch) -> tuple[BlockLayout, ...]:
        """Build the layouts of a batch, registers included; none if no layer attends."""
        if not self.encoder.patterns:
            return ()
        lengths = batch.lengths.to(batch.coords.device)
        _, place = self._places(batch.coords, lengths)
        total = batch.coords.shape[0] + lengths.numel() * self.num_registers
        coords = batch.coords.new_zeros(total, batch.coords.shape[1])
        coords[place] = batch.coords
        return self.encoder.build_layouts(coords, segments=lengths + self.num_registers)

    def _places(
        self, coords: Int64[Tensor, "T P"], lengths: Int64[Tensor, " S"]
    ) -> tuple[Int64[Tensor, " T"], Int64[Tensor, " T"]]:
        """Each token's sequence, and its place behind the registers.

        In one dimension tokens are put in the order of their coordinates, so that windows touch few
        blocks whatever the order they come in.
        """
        sequence = torch.arange(lengths.numel(), device=lengths.device)
        segment = sequence.repeat_interleave(lengths, output_size=coords.shape[0])
        place = torch.arange(coords.shape[0], device=lengths.device)
        if coords.shape[1] == 1:
            place[torch.argsort((segment << 32) + coords[:, 0], stable=True)] = place.clone()
        return segment, place + (segment + 1) * self.num_registers

    def _with_registers(
        self, x: Float[Tensor, "T E"], place: Int64[Tensor, " T"], lengths: Int64[Tensor, " S"]
    ) -> Float[Tensor, "T+S*R E"]:
        if not self.num_registers:
            return x
        total = x.shape[0] + lengths.numel() * self.num_registers
        joined = x.new_zeros(total, x.shape[1]).index_copy(0, place, x)
        registers = self.registers.to(x.dtype).repeat(lengths.numel(), 1)
        return joined.index_copy(0, self._register_places(lengths).flatten(), registers)

    def _register_places(self, lengths: Int64[Tensor, " S"]) -> Int64[Tensor, "S R"]:
        width = lengths + self.num_registers
        first = width.cumsum(0) - width
        return first[:, None] + torch.arange(self.num_registers, device=lengths.device)


class SequencePooling(nn.Module):
    """Reduce each sequence to one vector, and say how much each token counted.

    "attention" is gated attention; "mean" counts all alike; "max" takes the largest value of each
    channel, and a token counts by the share of channels it gave.
    """

    def __init__(self, dim: int, kind: Pooling = "attention") -> None:
        super().__init__()
        if kind not in ("attention", "mean", "max"):
            raise ValueError(f"pooling is attention, mean or max; got {kind!r}")
        self.kind = kind
        if kind == "attention":
            self.content, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.score = nn.Linear(dim, 1)

    def forward(
        self, x: Float[Tensor, "T E"], segment: Int64[Tensor, " T"], num_sequences: int
    ) -> tuple[Float[Tensor, "S E"], Float[Tensor, " T"]]:
        """Pool the tokens of each sequence."""
        if self.kind == "max":
            return self._largest(x, segment, num_sequences)
        scores = x.new_zeros(x.shape[0])
        if self.kind == "attention":
            scores = self.score(self.content(x).tanh() * self.gate(x).sigmoid())[:, 0]
        weights = segment_softmax(scores, segment, num_sequences)
        pooled = x.new_zeros(num_sequences, x.shape[1])
        return pooled.index_add(0, segment, weights[:, None].to(x.dtype) * x), weights

    def _largest(
        self, x: Float[Tensor, "T E"], segment: Int64[Tensor, " T"], num_sequences: int
    ) -> tuple[Float[Tensor, "S E"], Float[Tensor, " T"]]:
        index = segment[:, None].expand_as(x)
        pooled = x.new_zeros(num_sequences, x.shape[1])
        pooled = pooled.scatter_reduce(0, index, x, "amax", include_self=False)
        given = (x == pooled[segment]).to(x.dtype)
        count = torch.zeros_like(pooled).index_add(0, segment, given)
        return pooled, (given / count[segment]).mean(1)


def segment_softmax(
    scores: Float[Tensor, " T"], segment: Int64[Tensor, " T"], num_sequences: int
) -> Float[Tensor, " T"]:
    """Softmax within each sequence."""
    largest = scores.new_full((num_sequences,), -torch.inf)
    largest = largest.scatter_reduce(0, segment, scores.detach(), "amax")
    weights = (scores - largest[segment]).exp()
    total = weights.new_zeros(num_sequences).index_add(0, segment, weights)
    return weights / total[segment]


class FeatureStem(nn.Module):
    """Standardise features by the training set's mean and spread, and project them."""

    mean: Float[Tensor, " F"]
    spread: Float[Tensor, " F"]

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("spread", torch.ones(num_features))
        self.project = nn.Sequential(nn.Linear(num_features, dim), nn.GELU(), nn.Linear(dim, dim))

    def standardise(self, features: Float[Tensor, "N F"]) -> None:
        """Take mean and spread from these features; constant ones keep their scale."""
        mean, spread = features.double().mean(0), features.double().std(0)
        self.mean.copy_(mean)
        self.spread.copy_(torch.where(spread > 1e-6, spread, 1.0))

    def forward(
        self, inputs: Float[Tensor, "T F"], lengths: Int64[Tensor, " S"]
    ) -> Float[Tensor, "T E"]:
        """Turn features into tokens."""
        x = (inputs.to(self.mean.dtype) - self.mean) / self.spread
        return self.project(x.clamp(-8.0, 8.0))


class ConvolutionStem(nn.Module):
    """Embed symbols and look at `kernel` of them at a time; sequences do not see each other."""

    def __init__(self, num_symbols: int, dim: int, *, kernel: int = 11) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd; got {kernel}")
        self.num_symbols, self.margin = num_symbols, kernel // 2
        self.convolution = nn.Conv1d(num_symbols, dim, kernel, padding=kernel // 2)
        self.project = nn.Sequential(nn.GELU(), nn.Linear(dim, dim))

    def forward(
        self, inputs: Shaped[Tensor, " T"], lengths: Int64[Tensor, " S"]
    ) -> Float[Tensor, "T E"]:
        """Turn symbols into tokens; zeros stand beyond both ends of a sequence."""
        lengths = lengths.to(inputs.device)
        segment = torch.arange(lengths.numel(), device=inputs.device).repeat_interleave(lengths)
        place = torch.arange(inputs.shape[0], device=inputs.device) + segment * self.margin
        total = inputs.shape[0] + lengths.numel() * self.margin
        dtype = self.convolution.weight.dtype
        spread = torch.zeros(self.num_symbols, total, dtype=dtype, device=inputs.device)
        spread[inputs.long(), place] = 1
        return self.project(self.convolution(spread[None])[0, :, place].T)


def read_patterns(pattern: str | list[str] | None, depth: int) -> list[Pattern | None]:
    """Read a pattern's text, or one for each layer; raises InputError for what is no pattern."""
    texts = pattern if isinstance(pattern, list) else [pattern] * depth
    try:
        return [None if text is None else Pattern.parse(text) for text in texts]
    except ValueError as error:
        raise InputError(f"pattern.expression: {error}") from None


def leading_globals(pattern: Pattern) -> int:
    """Count the registers that a pattern asks for: the largest `GlobalTokens(first=...)` in it."""
    if isinstance(pattern, GlobalTokens):
        return pattern.first
    return max((leading_globals(part) for part in getattr(pattern, "parts", ())), default=0)
