"""The slide classifier: tile features, the sparse encoder on the tissue's grid."""

from typing import Any

from pipelines.shared.network import FeatureStem, SequenceClassifier


class SlideClassifier(SequenceClassifier):
    """Classify slides by their tiles; `config` holds what `SlideClassifier(**config)` needs.

    `num_features` is the encoder's width; other arguments are those of `SequenceClassifier`.
    """

    stem: FeatureStem

    def __init__(self, *, num_features: int, dim: int, **architecture: Any) -> None:
        super().__init__(FeatureStem(num_features, dim), dim=dim, coord_dims=2, **architecture)
        self.config: dict[str, object] = {
            "num_features": num_features,
            "dim": dim,
            **architecture,
        }
