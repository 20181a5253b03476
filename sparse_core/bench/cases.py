"""What is measured: patterns, where their tokens stand, and tensors of which shape."""

from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_core.patterns import (
    Causal,
    Dense,
    DilatedWindow,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
    Strided,
)
from sparse_core.testing import make_tissue

DTYPE = torch.bfloat16
K64, K256, MILLION = 65_536, 262_144, 1_048_576
TWO_THOUSAND_DOCUMENTS = 4_127_567
"""Tokens of the first 2,000 documents that `make_place` draws."""

PlaceName = Literal["sequence", "grid", "tissue", "documents"]
Per = Literal["call", "visited pair", "kept pair"]


@dataclass(frozen=True)
class Case:
    """One row of the table; `name` is stable and fit for `--only`.

    `flex` says whether FlexAttention can be asked for the same pairs in reasonable time and memory.
    `against` names a case of ours to compare with, by the time `per` call or pair.
    """

    name: str
    pattern: Pattern
    tokens: int
    heads: int = 12
    head_dim: int = 64
    kv_heads: int | None = None
    place: PlaceName = "sequence"
    block_size: int | None = None
    flex: bool = True
    against: str | None = None
    per: Per = "call"

    def shape(self) -> dict[str, str | int | None]:
        """Describe what is computed, for the record."""
        return {
            "pattern": repr(self.pattern),
            "place": self.place,
            "tokens": self.tokens,
            "heads": self.heads,
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "dtype": str(DTYPE).removeprefix("torch."),
        }


def _scattered(tokens: int) -> Pattern:
    """A window and 50 global positions all over the sequence: odd steps repeat none."""
    return SlidingWindow(256) | GlobalTokens(
        positions=tuple(i * 0x9E3779B1 % tokens for i in range(50))
    )


_WINDOW = SlidingWindow(512)
_CAUSAL_WINDOW = SlidingWindow(left=1024, right=0)
_GLOBAL = SlidingWindow(256) | GlobalTokens(64)
_STRIDED = Strided(8, block=128) | SlidingWindow(128)
_BIGBIRD = SlidingWindow(96) | GlobalTokens(128) | RandomBlocks(3, block=64)
_DILATED = DilatedWindow(512, 8)
_TILES = SlidingWindow(12)

CASES: tuple[Case, ...] = (
    Case("window-64k", _WINDOW, K64),
    Case("window-256k", _WINDOW, K256),
    Case("window-1m", _WINDOW, MILLION),
    Case("window-64k-d128", _WINDOW, K64, 6, 128),
    Case("window-256k-d128", _WINDOW, K256, 6, 128),
    Case("causal-window-64k", _CAUSAL_WINDOW, K64),
    Case("causal-window-256k", _CAUSAL_WINDOW, K256),
    Case("causal-window-64k-d128", _CAUSAL_WINDOW, K64, 6, 128),
    Case("causal-window-256k-d128", _CAUSAL_WINDOW, K256, 6, 128),
    Case("global-64k", _GLOBAL, K64),
    Case("global-256k", _GLOBAL, K256),
    Case("global-64k-h4", _GLOBAL, K64, 4),
    Case("global-256k-h4", _GLOBAL, K256, 4),
    Case("scattered-64k", _scattered(K64), K64),
    Case("scattered-256k", _scattered(K256), K256),
    Case("strided-64k", _STRIDED, K64),
    Case("strided-256k", _STRIDED, K256),
    Case("grid-256", _TILES, K64, place="grid"),
    Case("grid-512", _TILES, K256, place="grid"),
    Case("tissue-512", _TILES, 104_857, place="tissue", flex=False, against="grid-512"),
    Case("dilated-64k", _DILATED, K64, flex=False, against="window-64k", per="kept pair"),
    Case("dilated-256k", _DILATED, K256, flex=False, against="window-256k", per="kept pair"),
    Case("bigbird-64k", _BIGBIRD, K64),
    Case(
        "documents", _WINDOW, TWO_THOUSAND_DOCUMENTS, place="documents",
        flex=False, against="window-1m", per="visited pair",
    ),
    Case("dense-16k", Dense(), 16_384),
    Case("dense-16k-d128", Dense(), 16_384, 6, 128),
    Case("dense-64k", Dense(), K64),
    Case("causal-16k", Causal(), 16_384),
    Case("causal-16k-d128", Causal(), 16_384, 6, 128),
    Case("gqa-64k", _WINDOW, K64, kv_heads=4),
)  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a case's tokens stand: what `build_layout` takes. `side` is that of a full grid."""

    coords: Int[Tensor, "T P"] | int
    segments: Int[Tensor, "S"] | None = None
    side: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.coords if isinstance(self.coords, int) else self.coords.shape[0]


@dataclass(frozen=True)
class Problem:
    """A case's place and tensors on one device; the batch is 1."""

    case: Case
    place: Place
    q: Float[Tensor, "1 T H D"]
    k: Float[Tensor, "1 T Hkv D"]
    v: Float[Tensor, "1 T Hkv D"]
    grad_out: Float[Tensor, "1 T H D"]

    @property
    def device(self) -> torch.device:
        """Where its tensors live."""
        return self.q.device


def make_problem(
    case: Case, device: torch.device | str, *, dtype: torch.dtype = DTYPE, seed: int = 0
) -> Problem:
    """Draw normal inputs on the device."""
    place = make_place(case.place, case.tokens, device)
    generator = torch.Generator(device).manual_seed(seed)

    def draw(heads: int) -> Tensor:
        shape = (1, place.num_tokens, heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    kv_heads = case.kv_heads or case.heads
    return Problem(case, place, draw(case.heads), draw(kv_heads), draw(kv_heads), draw(case.heads))


def make_place(name: PlaceName, tokens: int, device: torch.device | str = "cpu") -> Place:
    """Lay out `tokens` tokens.

    `grid` is a full square and `tissue` ragged, filling 40 % of its square, both along a Hilbert
    curve. `documents` hold 64 to 4,096 tokens each, of a fixed seed; the last one takes the rest.
    """
    if name == "sequence":
        return Place(tokens)
    if name == "documents":
        return Place(tokens, _document_lengths(tokens).to(device))
    if name == "tissue":
        return Place(_along_hilbert(make_tissue(tokens)).to(device))
    side = isqrt(tokens)
    if side * side != tokens:
        raise ValueError(f"a full grid is a square; got {tokens} tokens")
    axis = torch.arange(side)
    coords = torch.cartesian_prod(axis, axis)
    return Place(_along_hilbert(coords).to(device), side=side)


def hilbert_index(coords: Int[Tensor, "T 2"]) -> Int[Tensor, "T"]:
    """Position of each non-negative cell (column, row) on a Hilbert curve."""
    x, y = coords.long().unbind(-1)
    index = torch.zeros_like(x)
    bits = int(coords.max()).bit_length()
    # an even number of bits, so that a larger grid does not turn the curve
    for bit in reversed(range(max(bits + bits % 2, 2))):
        right, low = (x >> bit) & 1, (y >> bit) & 1
        index = index * 4 + ((3 * right) ^ low)
        flip = (right == 1) & (low == 0)
        x, y = torch.where(flip, ~x, x), torch.where(flip, ~y, y)
        x, y = torch.where(low == 1, x, y), torch.where(low == 1, y, x)
    return index


def _along_hilbert(coords: Int[Tensor, "T 2"]) -> Int[Tensor, "T 2"]:
    return coords[hilbert_index(coords).argsort(stable=True)]


def _document_lengths(tokens: int) -> Int[Tensor, "S"]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(64, 4_097, (tokens // 64 + 1,), generator=generator)
    ends = lengths.cumsum(0).clamp(max=tokens)
    return ends[: int((ends < tokens).sum()) + 1].diff(prepend=ends.new_zeros(1))
