"""The network for DNA: bases, maybe a convolution, the sparse encoder; one strand or both."""

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from pipelines.genomics.alphabet import COMPLEMENT, NUM_TOKENS
from pipelines.genomics.equivariance import refuse_asymmetric, share_between_strands
from pipelines.shared.batch import PackedBatch
from pipelines.shared.errors import InputError
from pipelines.shared.network import (
    ConvolutionStem,
    NetworkOutput,
    SequenceClassifier,
    token_of_input,
)

TASK = "genomics"
"""What a model file says that it is for."""

Strands = Literal["none", "augment", "average", "equivariant"]
STRANDS = get_args(Strands)
"""How the other strand is dealt with: not at all; half of the training windows are read from it;
this, and predictions are the mean of both; or by a network to which both are the same."""

Stem = Literal["convolution", "none"]
STEMS = get_args(Stem)
"""What turns bases into tokens: a convolution that sees several, or nothing but their embedding."""

Per = Literal["sequence", "base"]
"""What the network says something of."""

_FEW_TOKENS = 64
"""Up to so many kinds of tokens are bases, which are looked at several at a time."""


class DnaClassifier(SequenceClassifier):
    """Classify records of bases; `config` holds what `DnaClassifier(**config)` needs.

    With `stem="convolution"` the stem sees `kernel` bases and makes a token of each `stem_stride`
    of them; coordinates stay those of bases. With "none" each base is embedded by itself, as are
    the `num_tokens` of a tokenizer whose tokens are words (k-mers, byte pairs). With `rc="average"`
    the network, once trained, says the mean of both strands; with "equivariant" its weights are
    such that it says the same of both. With `per="base"` nothing is pooled: `num_classes` numbers
    come out for each base (for all bases of a token the same), and the other strand's are the same
    backwards. Other arguments are those of `SequenceClassifier`. Raises ValueError for a stem that
    there is not and for `stem_stride` above 1 without a convolution, and InputError for an `rc`
    that cannot be had with words or with the pattern.
    """

    def __init__(
        self,
        *,
        dim: int,
        stem: Stem = "convolution",
        kernel: int = 11,
        stem_stride: int = 1,
        num_tokens: int = NUM_TOKENS,
        rc: Strands = "augment",
        per: Per = "sequence",
        **architecture: Any,
    ) -> None:
        words = num_tokens > _FEW_TOKENS
        if stem not in STEMS:
            raise ValueError(f"stem is {' or '.join(STEMS)}; got {stem!r}")
        alone = words or stem == "none"
        if alone and stem_stride != 1:
            raise ValueError(
                f"stem_stride={stem_stride} is one of a convolution over bases: words and "
                "stem=none need stem_stride=1"
            )
        _check_strands(rc, words=words)
        tokens = (
            EmbeddingStem(num_tokens, dim)
            if alone
            else ConvolutionStem(num_tokens, dim, kernel=kernel, stride=stem_stride)
        )
        if rc == "equivariant":
            refuse_asymmetric(architecture["pattern"], architecture["depth"])
        self.per_token = per == "base"
        pooled = {"pooling": "mean"} if self.per_token else {}  # which has no weights
        super().__init__(tokens, dim=dim, coord_dims=1, **{**architecture, **pooled})
        if rc == "equivariant":
            share_between_strands(self)
        self.rc, self.stem_stride = rc, stem_stride
        self.config: dict[str, object] = {
            "dim": dim,
            "stem": stem,
            "kernel": kernel,
            "stem_stride": stem_stride,
            "num_tokens": num_tokens,
            "rc": rc,
            "per": per,
            **architecture,
        }

    def forward(self, batch: PackedBatch, *, explain: bool = False) -> NetworkOutput:
        """Score every sequence of the batch, as `SequenceClassifier` does.

        Raises InputError for a sequence that an equivariant network cannot read backwards.
        """
        if self.rc == "equivariant":
            require_even_lengths(batch.lengths.tolist(), self.stem_stride)
        output = super().forward(batch, explain=explain)
        if self.rc != "average" or self.training:
            return output
        backwards = reversal(batch.lengths).to(batch.inputs.device)
        other = super().forward(opposite_strand(batch), explain=explain)
        added = None
        if output.contributions is not None and other.contributions is not None:
            added = (output.contributions + other.contributions[backwards]) / 2
        logits = other.logits[backwards] if self.per_token else other.logits
        return NetworkOutput(
            (output.logits + logits) / 2,
            (output.attention + other.attention[backwards]) / 2,
            (output.embedding + other.embedding) / 2,
            added,
        )

    def _read(self, x: Float[Tensor, "N E"], batch: PackedBatch) -> NetworkOutput:
        """Read the pooled tokens of each sequence, or every token by itself."""
        if not self.per_token:
            return super()._read(x, batch)
        tokens = self._tokens(batch)
        lengths = tokens.lengths.to(x.device)
        encoded, segment, place = self._encode(x, tokens, lengths)
        found = encoded.index_select(0, place)
        pooled, attention = self.pool(found, segment, lengths.numel())
        owner, _ = token_of_input(batch.lengths, self.stem_stride)
        logits = self.head(found)[owner.to(x.device)]
        return NetworkOutput(logits, self._by_input(attention, batch), pooled)


def opposite_strand(batch: PackedBatch) -> PackedBatch:
    """Read every sequence of bases backwards and complemented; coordinates count from there."""
    backwards = reversal(batch.lengths).to(batch.inputs.device)
    complement = torch.from_numpy(COMPLEMENT.astype("int64")).to(batch.inputs.device)
    sequence = torch.arange(batch.lengths.numel()).repeat_interleave(batch.lengths)
    largest = torch.stack([part.amax(0) for part in batch.coords.split(batch.lengths.tolist())])
    last = largest[sequence.to(batch.coords.device)]
    return replace(
        batch,
        inputs=complement[batch.inputs.long()][backwards].to(batch.inputs.dtype),
        coords=(last - batch.coords)[backwards],
    )


def reversal(lengths: Int64[Tensor, " S"]) -> Int64[Tensor, " T"]:
    """Places of the tokens with every sequence turned around; its own inverse."""
    ends = lengths.cumsum(0)
    sequence = torch.arange(lengths.numel()).repeat_interleave(lengths)
    return (2 * ends - lengths - 1)[sequence] - torch.arange(int(lengths.sum()))


def require_even_lengths(lengths: list[int], stem_stride: int) -> None:
    """Raise InputError for a length that is not cut into the same tokens from both ends."""
    uneven = [length for length in lengths if length % stem_stride]
    if uneven:
        raise InputError(
            f"rc=equivariant with stem_stride={stem_stride} needs lengths that are multiples of "
            f"it: {uneven[0]:,} bases are cut into other tokens from the other end; use "
            "stem_stride=1, a context that is a multiple, or rc=average"
        )


def _check_strands(rc: str, *, words: bool) -> None:
    if rc not in STRANDS:
        raise InputError(f"rc is {', '.join(STRANDS)}; got {rc!r}")
    if words and rc in ("average", "equivariant"):
        raise InputError(
            f"rc={rc} needs tokenizer=base: words of several bases are cut differently from the "
            "other end; use rc=augment, which turns bases around before they are cut"
        )


class EmbeddingStem(nn.Module):
    """Embed bases or words, one token each."""

    def __init__(self, num_symbols: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_symbols, dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, inputs: Shaped[Tensor, " T"], lengths: Int64[Tensor, " S"]
    ) -> Float[Tensor, "T E"]:
        """Turn symbols into tokens."""
        return self.norm(self.embedding(inputs.long()))
