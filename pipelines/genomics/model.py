"""The sequence classifier for DNA: bases, a convolution, the sparse encoder."""

from typing import Any

from pipelines.genomics.alphabet import NUM_TOKENS
from pipelines.shared.network import ConvolutionStem, SequenceClassifier


class DnaClassifier(SequenceClassifier):
    """Classify records of bases; `config` holds what `DnaClassifier(**config)` needs.

    `kernel` bases are seen by the stem, which makes a token of each `stem_stride` bases;
    coordinates stay those of bases. Other arguments are those of `SequenceClassifier`.
    """

    def __init__(
        self, *, dim: int, kernel: int = 11, stem_stride: int = 1, **architecture: Any
    ) -> None:
        stem = ConvolutionStem(NUM_TOKENS, dim, kernel=kernel, stride=stem_stride)
        super().__init__(stem, dim=dim, coord_dims=1, **architecture)
        self.config: dict[str, object] = {
            "dim": dim,
            "kernel": kernel,
            "stem_stride": stem_stride,
            **architecture,
        }
