"""Write what was embedded: a slide's tiles with features, and further encoders' features."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipelines.pathology.encoding import TileEncoder
from pipelines.pathology.slides import SlideReader
from pipelines.pathology.store import (
    SCHEMA,
    Provenance,
    add_array,
    encoder_entry,
    read_slide,
    write_group,
)
from pipelines.pathology.tiling import TilePlan, Tiles


def write_slide(
    folder: Path,
    slide_id: str,
    reader: SlideReader,
    tiles: Tiles,
    features: np.ndarray,
    *,
    plan: TilePlan,
    encoder: TileEncoder,
    provenance: Provenance,
    reading: Mapping[str, object] | None = None,
) -> None:
    """Write a slide's group aside and move it into place: what is visible is complete.

    `reading` says how its tiles were read. Raises ValueError for features [N, E] that are not
    finite or not one row per tile.
    """
    _check_features(features, len(tiles), encoder)
    entry = encoder_entry(encoder.fingerprint, asdict(provenance), reading)
    attributes = _attributes(slide_id, reader, tiles, plan) | {"encoders": {encoder.name: entry}}
    arrays = {
        "grid": tiles.grid,
        "xy0": tiles.xy0,
        "tissue": tiles.tissue,
        f"features/{encoder.name}": _as_float(features),
        "overview": tiles.mask.overview,
        "mask": tiles.mask.mask,
    }
    if tiles.index is not None:
        arrays["survey_row"] = tiles.index.astype(np.int64)
    write_group(folder, attributes, arrays)


def add_features(
    folder: Path,
    features: np.ndarray,
    *,
    encoder: TileEncoder,
    provenance: Provenance,
    reading: Mapping[str, object] | None = None,
) -> None:
    """Add another encoder's features [N, E] of all stored tiles; raises as `write_slide` does.

    They are written aside and renamed, and only then named in the attributes.
    """
    attributes = read_slide(folder).attributes
    _check_features(features, attributes["num_tiles"], encoder)
    entry = encoder_entry(encoder.fingerprint, asdict(provenance), reading)
    encoders = {**attributes["encoders"], encoder.name: entry}
    add_array(folder, f"features/{encoder.name}", _as_float(features), {"encoders": encoders})


def _check_features(features: np.ndarray, num_tiles: int, encoder: TileEncoder) -> None:
    if features.shape != (num_tiles, encoder.dim):
        raise ValueError(
            f"features must be [{num_tiles}, {encoder.dim}]; got {features.shape} of "
            f"{encoder.name!r}"
        )
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise ValueError(f"encoder {encoder.name!r} gave NaN or infinity in row {row}")


def _as_float(features: np.ndarray) -> np.ndarray:
    """Keep half precision, the rest as float32."""
    return features if features.dtype == np.float16 else features.astype(np.float32, copy=False)


def _attributes(
    slide_id: str,
    reader: SlideReader,
    tiles: Tiles,
    plan: TilePlan,
) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "slide_id": slide_id,
        "slide_path": str(reader.path.resolve()),
        "slide_bytes": reader.path.stat().st_size,
        "slide_quickhash": reader.quickhash,
        "vendor": reader.vendor,
        "dimensions": list(reader.dimensions),
        "bounds": list(reader.bounds),
        "mpp": reader.mpp,
        "mpp_source": reader.mpp_source,
        "plan": plan.params,
        "plan_hash": plan.hash,
        "grid_hash": plan.grid_hash,
        "tile_px": plan.tile_px,
        "pitch0": tiles.pitch0,
        "order": "hilbert",
        "num_tiles": len(tiles),
        "tissue_threshold": tiles.mask.threshold,
        "tissue_threshold_source": tiles.mask.threshold_source,
    }
