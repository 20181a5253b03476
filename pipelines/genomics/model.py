"""The sequence classifier for DNA: bases, a convolution, the sparse encoder."""

from typing import Any

from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from pipelines.genomics.alphabet import NUM_TOKENS
from pipelines.shared.network import ConvolutionStem, SequenceClassifier

TASK = "genomics"
"""What a model file says that it is for."""

_FEW_TOKENS = 64
"""Up to so many kinds of tokens are bases, which are looked at several at a time."""


class DnaClassifier(SequenceClassifier):
    """Classify records of bases; `config` holds what `DnaClassifier(**config)` needs.

    `kernel` bases are seen by the stem, which makes a token of each `stem_stride` bases;
    coordinates stay those of bases. The `num_tokens` of a tokenizer whose tokens are words (k-mers,
    byte pairs) are embedded instead, one by one. Other arguments are those of `SequenceClassifier`.
    Raises ValueError for `stem_stride` above 1 with words.
    """

    def __init__(
        self,
        *,
        dim: int,
        kernel: int = 11,
        stem_stride: int = 1,
        num_tokens: int = NUM_TOKENS,
        **architecture: Any,
    ) -> None:
        if num_tokens > _FEW_TOKENS and stem_stride != 1:
            raise ValueError(f"stem_stride={stem_stride} is one of bases; words need stem_stride=1")
        stem = (
            ConvolutionStem(num_tokens, dim, kernel=kernel, stride=stem_stride)
            if num_tokens <= _FEW_TOKENS
            else WordStem(num_tokens, dim)
        )
        super().__init__(stem, dim=dim, coord_dims=1, **architecture)
        self.config: dict[str, object] = {
            "dim": dim,
            "kernel": kernel,
            "stem_stride": stem_stride,
            "num_tokens": num_tokens,
            **architecture,
        }


class WordStem(nn.Module):
    """Embed words, one token each."""

    def __init__(self, num_words: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, dim)
        nn.init.normal_(self.embedding.weight, std=0.5)
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, inputs: Shaped[Tensor, " T"], lengths: Int64[Tensor, " S"]
    ) -> Float[Tensor, "T E"]:
        """Turn words into tokens."""
        return self.norm(self.embedding(inputs.long()))
