"""The network of both pipelines: stem, sparse encoder with registers, pooling, head."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.distributed
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn

from pipelines.shared.batch import PackedBatch
from pipelines.shared.errors import InputError
from sparse_core.nn import SparseEncoder
from sparse_core.nn.attention import AnyLayout
from sparse_core.ops import Backend
from sparse_core.patterns import GlobalTokens, Pattern
from sparse_core.patterns.joined import check_axes

HeadNorm = Literal["layer", "batch"]

POOLINGS = ("attention", "mean", "max")


@dataclass(frozen=True, slots=True)
class NetworkOutput:
    """Numbers of each sequence, and how much each input token counted.

    `logits` are a number per class, or what else the objective asks for, of each sequence, or of
    each input token where `per_token` of the network says so; `attention` sums to 1 in each
    sequence. `embedding` is what the head reads. `contributions`, if asked for, is what each
    input token adds to each number; each network says how. `auxiliary` is a loss that the network
    adds itself.
    """

    logits: Float[Tensor, "S C"] | Float[Tensor, "T C"]
    attention: Float[Tensor, " T"]
    embedding: Float[Tensor, "S F"]
    contributions: Float[Tensor, "T C"] | None = None
    auxiliary: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class _Known:
    """Layouts of tokens that stand at these places; made in inference mode they serve no other."""

    lengths: Int64[Tensor, " S"]
    coords: Int64[Tensor, "T P"]
    inference: bool
    layouts: tuple[AnyLayout, ...]

    @classmethod
    def of(cls, tokens: PackedBatch, layouts: tuple[AnyLayout, ...]) -> "_Known":
        return cls(tokens.lengths, tokens.coords, torch.is_inference_mode_enabled(), layouts)

    def serves(self, tokens: PackedBatch) -> bool:
        return (
            self.inference == torch.is_inference_mode_enabled()
            and self.coords.device == tokens.coords.device
            and torch.equal(self.lengths, tokens.lengths)
            and torch.equal(self.coords, tokens.coords)
        )


class SequenceClassifier(nn.Module):
    """Give numbers to packed sequences: a class each, or whatever an objective asks for.

    The stem turns inputs into tokens. Registers (Darcet et al. 2024) go in front of each sequence:
    as many as the pattern's `GlobalTokens(first=...)` asks for, at coordinate 0. After the encoder
    the head reads the pooled tokens plus the mean of the registers. With `depth=0` and attention
    pooling this is ABMIL (Ilse et al. 2018, equation 9, the gated form).

    `pattern` is a pattern's text, or a list with one for each layer; None leaves attention out.
    `pooling` is attention, mean or max, or several, as in "mean+max": then the head reads them, and
    the mean of the registers, side by side. `head_norm` is "layer" or "batch"; the latter takes
    away what the pooled vectors of all sequences have in common (`SequenceNorm`), which in long
    sequences is nearly all of them. A stem with a `stride` makes one token of so many inputs.
    `num_classes` numbers come out. `rotary_axes` of the leading coordinates turn channels (all, if
    not given); further ones are for patterns alone.
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
        pooling: str = "attention",
        head_norm: HeadNorm = "layer",
        rotary_base: float = 10_000.0,
        rotary_axes: int | None = None,
        checkpointing: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        patterns = read_patterns(pattern, depth)
        for known in patterns:
            if known is not None:
                check_axes(known, coord_dims)
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
            rotary_axes=rotary_axes,
            checkpointing=checkpointing,
            backend=backend,
        )
        self._last: _Known | None = None
        self.num_registers = max((leading_globals(p) for p in patterns if p), default=0)
        self.registers = nn.Parameter(torch.randn(self.num_registers, dim) * 0.02)
        self.pool = build_pooling(dim, pooling)
        self.apart = self.num_registers > 0 and isinstance(self.pool, SeveralPoolings)
        width = dim * (pooling.count("+") + 1 + self.apart)
        self.head = nn.Sequential(
            build_head_norm(width, head_norm), nn.Dropout(dropout), nn.Linear(width, num_classes)
        )

    def forward(self, batch: PackedBatch, *, explain: bool = False) -> NetworkOutput:
        """Score every sequence of the batch; `explain` adds the tokens' contributions.

        A token's contribution is the change of each number, to first order, from the mean token of
        its sequence to the token itself, as they enter the encoder: gradient times difference
        (Baehrens et al. 2010; Ancona et al. 2018, section 3, with the mean as baseline). It counts
        every way through the network, registers too, which attention in the pooling does not.
        """
        if not explain:
            return self._read(self.stem(batch.inputs, batch.lengths), batch)
        with torch.enable_grad():
            x = self.stem(batch.inputs, batch.lengths).detach().requires_grad_()
            output = self._read(x, batch)
            totals = output.logits.sum(0)  # a sequence's numbers depend on its own tokens alone
            slopes = [torch.autograd.grad(total, x, retain_graph=True)[0] for total in totals]
        lengths = self._tokens(batch).lengths.tolist()
        parts = x.detach().split(lengths)
        away = torch.cat([part - part.mean(0) for part in parts])
        added = torch.stack([(slope * away).sum(1) for slope in slopes], 1)
        return NetworkOutput(
            output.logits.detach(),
            output.attention.detach(),
            output.embedding.detach(),
            self._by_input(added, batch),
        )

    def _read(self, x: Float[Tensor, "N E"], batch: PackedBatch) -> NetworkOutput:
        """Encode tokens, pool them, and read the pooled vectors."""
        tokens = self._tokens(batch)
        lengths = tokens.lengths.to(x.device)
        encoded, segment, place = self._encode(x, tokens, lengths)
        pooled, attention = self.pool(encoded.index_select(0, place), segment, lengths.numel())
        if self.num_registers:
            registers = encoded[self._register_places(lengths)].mean(1)
            pooled = torch.cat([pooled, registers], 1) if self.apart else pooled + registers
        return NetworkOutput(self.head(pooled), self._by_input(attention, batch), pooled)

    def encode(self, batch: PackedBatch) -> Float[Tensor, "N E"]:
        """Turn inputs into what the encoder makes of their tokens, in their order."""
        tokens = self._tokens(batch)
        x = self.stem(batch.inputs, batch.lengths)
        encoded, _, place = self._encode(x, tokens, tokens.lengths.to(x.device))
        return encoded.index_select(0, place)

    def _encode(
        self, x: Float[Tensor, "N E"], tokens: PackedBatch, lengths: Int64[Tensor, " S"]
    ) -> tuple[Float[Tensor, "N+S*R E"], Int64[Tensor, " N"], Int64[Tensor, " N"]]:
        """Encode tokens and registers; also each token's sequence, and its place among them."""
        segment, place = self._places(tokens.coords, lengths)
        joined = self._with_registers(x, place, lengths)
        return self.encoder(joined[None], self._layouts(tokens))[0], segment, place

    def build_layouts(self, batch: PackedBatch) -> tuple[AnyLayout, ...]:
        """Build the layouts of a batch, registers included; none if no layer attends."""
        return self._layouts(self._tokens(batch))

    def _layouts(self, tokens: PackedBatch) -> tuple[AnyLayout, ...]:
        """Build layouts, or take those of the batch before: full windows come again and again."""
        if not self.encoder.patterns:
            return ()
        if self._last is None or not self._last.serves(tokens):
            self._last = _Known.of(tokens, self._new_layouts(tokens))
        return self._last.layouts

    def _new_layouts(self, tokens: PackedBatch) -> tuple[AnyLayout, ...]:
        lengths = tokens.lengths.to(tokens.coords.device)
        _, place = self._places(tokens.coords, lengths)
        total = tokens.coords.shape[0] + lengths.numel() * self.num_registers
        coords = tokens.coords.new_zeros(total, tokens.coords.shape[1])
        coords[place] = tokens.coords
        return self.encoder.build_layouts(coords, segments=lengths + self.num_registers)

    def _tokens(self, batch: PackedBatch) -> PackedBatch:
        """Lengths and coordinates of the stem's tokens; a token stands where its first input does.

        Coordinates are those of inputs, so that patterns mean the same whatever the stride.
        """
        stride = self._stride
        if stride == 1:
            return batch
        _, share = token_of_input(batch.lengths, stride)
        first = (share.cumsum(0) - share).to(batch.coords.device)
        return replace(batch, coords=batch.coords[first], lengths=-(-batch.lengths // stride))

    def _by_input(
        self, values: Float[Tensor, "N ..."], batch: PackedBatch
    ) -> Float[Tensor, "T ..."]:
        """Share each token's value evenly among its inputs."""
        stride = self._stride
        if stride == 1:
            return values
        owner, share = token_of_input(batch.lengths, stride)
        each = share.to(values).reshape(-1, *[1] * (values.ndim - 1))
        return (values / each)[owner.to(values.device)]

    @property
    def _stride(self) -> int:
        stride = getattr(self.stem, "stride", 1)
        assert isinstance(stride, int), "a stem's stride is a number"
        return stride

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

    def __init__(self, dim: int, kind: str = "attention") -> None:
        super().__init__()
        if kind not in POOLINGS:
            raise ValueError(f"pooling is {', '.join(POOLINGS)}, or several with +; got {kind!r}")
        self.kind = kind
        if kind == "attention":
            self.content, self.gate = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.score = nn.Linear(dim, 1)

    def forward(
        self, x: Float[Tensor, "T E"], segment: Int64[Tensor, " T"], num_sequences: int
    ) -> tuple[Float[Tensor, "S E"], Float[Tensor, " T"]]:
        """Pool the tokens of each sequence; sums over them are never in half precision."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "max":
            pooled = segment_max(x, segment, num_sequences)
            return pooled, _given(x, pooled, segment).mean(1)
        weights = self._weights(x, segment, num_sequences)
        pooled = x.new_zeros(num_sequences, x.shape[1])
        return pooled.index_add(0, segment, weights[:, None] * x), weights

    def shares(
        self, x: Float[Tensor, "T E"], segment: Int64[Tensor, " T"], num_sequences: int
    ) -> Float[Tensor, "T E"]:
        """What each token gives to the pooled vector; a sequence's shares sum to it."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.kind == "max":
            return x * _given(x, segment_max(x, segment, num_sequences), segment)
        return x * self._weights(x, segment, num_sequences)[:, None]

    def _weights(
        self, x: Float[Tensor, "T E"], segment: Int64[Tensor, " T"], num_sequences: int
    ) -> Float[Tensor, " T"]:
        scores = x.new_zeros(x.shape[0])
        if self.kind == "attention":
            scores = self.score(self.content(x).tanh() * self.gate(x).sigmoid())[:, 0].to(x.dtype)
        return segment_softmax(scores, segment, num_sequences)


class SeveralPoolings(nn.ModuleList):
    """Pool in several ways, side by side; a token counts by their mean."""

    def __init__(self, dim: int, kinds: Sequence[str]) -> None:
        super().__init__(SequencePooling(dim, kind) for kind in kinds)

    def forward(
        self, x: Float[Tensor, "T E"], segment: Int64[Tensor, " T"], num_sequences: int
    ) -> tuple[Float[Tensor, "S F"], Float[Tensor, " T"]]:
        """Pool the tokens of each sequence."""
        vectors, weights = zip(*(pool(x, segment, num_sequences) for pool in self), strict=True)
        return torch.cat(vectors, 1), torch.stack(weights).mean(0)


def build_pooling(dim: int, pooling: str) -> SequencePooling | SeveralPoolings:
    """Build a pooling from its name, or several from names joined by +."""
    kinds = pooling.split("+")
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"pooling names a kind twice; got {pooling!r}")
    return SequencePooling(dim, pooling) if len(kinds) == 1 else SeveralPoolings(dim, kinds)


class SequenceNorm(nn.Module):
    """Standardise each channel over sequences: batch normalisation (Ioffe and Szegedy 2015).

    Mean pooling over thousands of tokens leaves vectors that differ by a small part of what they
    have in common; the head learns from the difference alone. Evaluation uses running estimates, so
    that a result does not depend on its batch. The statistics are those of all processes
    together, in float32 at least. A batch of a single sequence has no spread of its own, and is
    standardised by the running estimates in training too. `momentum` is the share of the newest
    batch in them: while weights move fast, what sequences have in common moves by several times
    their spread, and older batches mislead.
    """

    mean: Float[Tensor, " E"]
    variance: Float[Tensor, " E"]
    num_steps: Int64[Tensor, ""]

    def __init__(self, dim: int, *, momentum: float = 0.2, eps: float = 1e-8) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Float[Tensor, "S E"]) -> Float[Tensor, "S E"]:
        """Standardise, by the batch in training and by the running estimates else."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(torch.promote_types(x.dtype, self.weight.dtype))
            mean, variance = self._measure(x) if self.training else (self.mean, self.variance)
            return (x - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias

    def _measure(self, x: Float[Tensor, "S E"]) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"]]:
        """Take mean and variance over the sequences of all processes, and remember them."""
        count = _sum_over_processes(x.new_full((), len(x)))
        mean = _sum_over_processes(x.sum(0)) / count
        # in a second pass: the mean may exceed the spread a thousandfold
        variance = _sum_over_processes((x - mean).square().sum(0)) / count
        several = count > 1
        self._remember(mean.detach(), variance.detach(), several)
        return torch.where(several, mean, self.mean), torch.where(several, variance, self.variance)

    @torch.no_grad()
    def _remember(
        self, mean: Float[Tensor, " E"], variance: Float[Tensor, " E"], several: Bool[Tensor, ""]
    ) -> None:
        """Mix the batch into the running estimates, as two samples are joined into one."""
        share = (1.0 / (self.num_steps + 1)).clamp(min=self.momentum).to(mean.dtype)
        shift = mean - self.mean
        between = share * (1 - share) * shift.square()
        joined = (1 - share) * self.variance + share * variance + between
        self.mean += share * shift
        # the first of all sequences, alone, says nothing of the spread
        self.variance.copy_(torch.where(several | (self.num_steps > 0), joined, self.variance))
        self.num_steps += 1


class _SumOverProcesses(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        torch.distributed.all_reduce(total)
        return total


def _sum_over_processes(x: Tensor) -> Tensor:
    """Add what all processes of a distributed run have; alone, change nothing."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return x
    total: Tensor = _SumOverProcesses.apply(x)
    return total


def build_head_norm(dim: int, kind: str) -> nn.Module:
    """Build what stands between the pooled vectors and the classes."""
    if kind not in ("layer", "batch"):
        raise ValueError(f"head_norm is layer or batch; got {kind!r}")
    return nn.LayerNorm(dim) if kind == "layer" else SequenceNorm(dim)


def segment_max(
    x: Float[Tensor, "T E"], segment: Int64[Tensor, " T"], num_sequences: int
) -> Float[Tensor, "S E"]:
    """Largest value of each channel in each sequence."""
    largest = x.new_zeros(num_sequences, x.shape[1])
    index = segment[:, None].expand_as(x)
    return largest.scatter_reduce(0, index, x, "amax", include_self=False)


def _given(
    x: Float[Tensor, "T E"], largest: Float[Tensor, "S E"], segment: Int64[Tensor, " T"]
) -> Float[Tensor, "T E"]:
    """Share that each token has in each channel's largest value; equal ones share it."""
    given = (x == largest[segment]).to(x.dtype)
    count = torch.zeros_like(largest).index_add(0, segment, given)
    return given / count[segment]


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
    """Standardise features by the training set's mean and spread, and project them.

    `project` takes F features to E channels; by default two layers.
    """

    mean: Float[Tensor, " F"]
    spread: Float[Tensor, " F"]

    def __init__(self, num_features: int, dim: int, project: nn.Module | None = None) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("spread", torch.ones(num_features))
        self.project = project or nn.Sequential(
            nn.Linear(num_features, dim), nn.GELU(), nn.Linear(dim, dim)
        )

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
        tokens: Tensor = self.project(x.clamp(-8.0, 8.0))
        return tokens


class ConvolutionStem(nn.Module):
    """Embed symbols and look at `kernel` of them at a time; sequences do not see each other.

    With a `stride`, a token is the mean of so many neighbours (of what is left, at the end).
    """

    def __init__(self, num_symbols: int, dim: int, *, kernel: int = 11, stride: int = 1) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd; got {kernel}")
        if stride < 1:
            raise ValueError(f"stride must be at least 1; got {stride}")
        self.num_symbols, self.margin, self.stride = num_symbols, kernel // 2, stride
        self.convolution = nn.Conv1d(num_symbols, dim, kernel, padding=kernel // 2)
        self.project = nn.Sequential(nn.GELU(), nn.Linear(dim, dim))

    def forward(
        self, inputs: Shaped[Tensor, " T"], lengths: Int64[Tensor, " S"]
    ) -> Float[Tensor, "N E"]:
        """Turn symbols into tokens; zeros stand beyond both ends of a sequence."""
        sequence = torch.arange(lengths.numel(), device=inputs.device)
        segment = sequence.repeat_interleave(lengths.to(inputs.device), output_size=inputs.shape[0])
        place = torch.arange(inputs.shape[0], device=inputs.device) + segment * self.margin
        total = inputs.shape[0] + lengths.numel() * self.margin
        dtype = self.convolution.weight.dtype
        spread = torch.zeros(self.num_symbols, total, dtype=dtype, device=inputs.device)
        spread[inputs.long(), place] = 1
        seen = self.convolution(spread[None])[0].T.index_select(0, place)
        if self.stride == 1:
            return self.project(seen)
        activation, linear = self.project
        return linear(_mean_of_neighbours(activation(seen), lengths, self.stride))


def token_of_input(
    lengths: Int64[Tensor, " S"], stride: int
) -> tuple[Int64[Tensor, " T"], Int64[Tensor, " N"]]:
    """Say which token each input belongs to, and how many inputs each token has.

    Tokens are `stride` neighbours of one sequence; the last token of a sequence has what is left.
    """
    tokens = -(-lengths // stride)
    sequence = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)
    start, first = lengths.cumsum(0) - lengths, tokens.cumsum(0) - tokens
    position = torch.arange(sequence.numel(), device=lengths.device) - start[sequence]
    share = torch.full((int(tokens.sum()),), stride, device=lengths.device)
    share[first + tokens - 1] = lengths - stride * (tokens - 1)
    return first[sequence] + position // stride, share


def _mean_of_neighbours(
    x: Float[Tensor, "T E"], lengths: Int64[Tensor, " S"], stride: int
) -> Float[Tensor, "N E"]:
    owner, share = (item.to(x.device) for item in token_of_input(lengths, stride))
    first = share.cumsum(0) - share
    slot = torch.arange(x.shape[0], device=x.device) - first[owner] + owner * stride
    # a place for each input, so that sums keep one order on every device
    spread = x.new_zeros(share.numel() * stride, x.shape[1]).index_copy(0, slot, x)
    return spread.view(share.numel(), stride, -1).sum(1) / share[:, None].to(x.dtype)


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
