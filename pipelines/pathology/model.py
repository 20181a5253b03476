"""The slide classifier: tile features, the sparse encoder on the tissue's grid."""

from pathlib import Path
from typing import Any

import yaml

from pipelines.pathology.pooling import KINDS, PoolingClassifier
from pipelines.shared.conf_tree import conf_folder
from pipelines.shared.errors import InputError
from pipelines.shared.network import FeatureStem, SequenceClassifier

TASK = "pathology"
"""Of model files: what can read them."""


class SlideClassifier(SequenceClassifier):
    """Classify slides by their tiles; `config` holds what `SlideClassifier(**config)` needs.

    `num_features` is the encoder's width. With `coord_dims` 3 the third coordinate of a tile is
    its slide's among those of a patient (`data.SLIDE_GAP` apart): windows do not cross from one to
    another, rotary positions do not know of it, and registers see all. Other arguments are those
    of `SequenceClassifier`.
    """

    stem: FeatureStem

    def __init__(
        self, *, num_features: int, dim: int, coord_dims: int = 2, **architecture: Any
    ) -> None:
        stem = FeatureStem(num_features, dim)
        super().__init__(stem, dim=dim, coord_dims=coord_dims, rotary_axes=2, **architecture)
        self.config: dict[str, object] = {
            "num_features": num_features,
            "dim": dim,
            "coord_dims": coord_dims,
            **architecture,
        }


def build_network(config: dict[str, Any]) -> SlideClassifier | PoolingClassifier:
    """Build a slide's network from its plain values: a pooling model where they name its kind."""
    return PoolingClassifier(**config) if "kind" in config else SlideClassifier(**config)


def architecture(
    config: dict[str, Any], name: str, *, num_features: int, num_classes: int
) -> dict[str, Any]:
    """Plain values of a run's model, or of a network that it is compared with.

    Pooling models other than the run's own take their settings from `conf/model/NAME.yaml`. The
    rest are the run's model with something taken away or put in its place. Raises InputError
    where there is nothing to take away: the run's model pools too.
    """
    sizes = {"num_features": num_features, "num_classes": num_classes}
    if name in KINDS:
        return {**read_choice(name), **sizes}
    model = dict(config["model"])
    if "kind" in model:
        if name != "model":
            raise InputError(
                f"baselines: {name} changes attention between tiles, and model={model['kind']} has "
                f"none; take baselines of {', '.join(KINDS)}"
            )
        return {**model, **sizes}
    return {
        **model,
        **sizes,
        "pattern": _PATTERNS[name] if name in _PATTERNS else _pattern(config, name),
        "coord_dims": 3 if config["unit"] == "patient" else 2,
        "checkpointing": config["checkpointing"],
    }


_PATTERNS = {"no_attention": None, "dense": "Dense()"}


def _pattern(config: dict[str, Any], name: str) -> str | list[str]:
    if name == "window":
        return f"SlidingWindow(radius={config['window']})"
    expression: str | list[str] = config["pattern"]["expression"]
    return expression


def read_choice(name: str) -> dict[str, Any]:
    """Read `conf/model/NAME.yaml`."""
    path = Path(conf_folder()) / "model" / f"{name}.yaml"
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict), "a choice holds settings"
    return found
