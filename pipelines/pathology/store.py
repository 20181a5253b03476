"""Keep tile features on disk: one Zarr group per slide, complete or absent.

    <slide_id>.zarr/
      grid      int32   [N, 2]     column and row on the tile grid: the truth about position
      xy0       int64   [N, 2]     tile corner in level-0 pixels
      tissue    float32 [N]        share of tissue
      features/<encoder> float32 [N, E]
      overview  uint8   [h, w, 3]  the slide at about 8 um per pixel, for heatmaps
      mask      bool    [h, w]     tissue on the overview

Rows stand in Hilbert order. Attributes tell where everything came from.
"""

import glob
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipelines.pathology.encoding import TileEncoder
from pipelines.pathology.slides import SlideReader
from pipelines.pathology.tiling import TilePlan, Tiles
from pipelines.shared.errors import InputError

SCHEMA = 1
_ENDING = ".zarr"
_ROWS_PER_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Provenance:
    """What stored features depend on; equal values mean that they need no recomputing."""

    slide_fingerprint: str
    given_mpp: float | None
    plan_hash: str
    encoder: str
    encoder_fingerprint: str
    schema: int = SCHEMA


@dataclass(frozen=True, slots=True)
class SlideFeatures:
    """One slide's tiles, rows in Hilbert order; what is large is read when it is asked for.

    `grid` int32 [N, 2] (col, row), `xy0` int64 [N, 2], `tissue` float32 [N]; `num_features` is E;
    `dimensions` (width, height) and the tile's side `pitch0` in level-0 pixels, `mpp` in
    micrometres per such pixel; `attributes` are the group's.
    """

    slide_id: str
    folder: Path
    grid: np.ndarray
    xy0: np.ndarray
    tissue: np.ndarray
    num_features: int
    dimensions: tuple[int, int]
    mpp: float
    pitch0: float
    attributes: dict[str, Any]

    def __len__(self) -> int:
        return len(self.grid)

    def features(self) -> np.ndarray:
        """Read the features, float32 [N, E]: 4 GB for a million tiles of 1,024."""
        array = self.folder / "features" / self.attributes["encoder"]
        return np.asarray(zarr.open_array(array, mode="r")[:])

    def overview(self) -> np.ndarray:
        """Read the small picture of the slide, uint8 RGB [h, w, 3]."""
        return np.asarray(zarr.open_array(self.folder / "overview", mode="r")[:])

    def tissue_mask(self) -> np.ndarray:
        """Read the tissue mask on the overview, bool [h, w]."""
        return np.asarray(zarr.open_array(self.folder / "mask", mode="r")[:])


def slide_folder(store: Path, slide_id: str) -> Path:
    """Return where a slide's group stands in a store."""
    return store / f"{slide_id}{_ENDING}"


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
) -> None:
    """Write a slide's group aside and move it into place: what is visible is complete.

    Raises ValueError for features [N, E] that are not finite or not one row per tile.
    """
    if features.shape != (len(tiles), encoder.dim):
        raise ValueError(
            f"features must be [{len(tiles)}, {encoder.dim}] for {slide_id!r}; got {features.shape}"
        )
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise ValueError(f"encoder {encoder.name!r} gave NaN or infinity in row {row}")
    attributes = _attributes(slide_id, reader, tiles, plan, encoder, provenance)
    arrays = {
        "grid": tiles.grid,
        "xy0": tiles.xy0,
        "tissue": tiles.tissue,
        f"features/{encoder.name}": features.astype(np.float32, copy=False),
        "overview": tiles.mask.overview,
        "mask": tiles.mask.mask,
    }
    write_group(folder, attributes, arrays)


def write_group(
    folder: Path, attributes: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write arrays, uncompressed, and attributes aside and move them into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*"):
        shutil.rmtree(leftover)
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    group = zarr.create_group(aside, zarr_format=3, attributes=dict(attributes))
    for name, array in arrays.items():
        chunks = (min(_ROWS_PER_CHUNK, array.shape[0]), *array.shape[1:])
        group.create_array(name, data=array, chunks=chunks, compressors=None)
    _move_into_place(aside, folder)


def read_slide(folder: Path) -> SlideFeatures:
    """Read a slide's tiles. Raises InputError where there is no complete group."""
    attributes = _read_attributes(folder)
    if attributes is None:
        raise InputError(f"no stored slide features at {folder}; extract them first")
    group = zarr.open_group(folder, mode="r")
    return SlideFeatures(
        slide_id=attributes["slide_id"],
        folder=folder,
        grid=np.asarray(group["grid"][:]),
        xy0=np.asarray(group["xy0"][:]),
        tissue=np.asarray(group["tissue"][:]),
        num_features=group[f"features/{attributes['encoder']}"].shape[1],
        dimensions=(attributes["dimensions"][0], attributes["dimensions"][1]),
        mpp=attributes["mpp"],
        pitch0=attributes["pitch0"],
        attributes=attributes,
    )


def is_current(folder: Path, expected: Provenance) -> bool:
    """Tell whether a complete group with this very provenance stands at `folder`."""
    attributes = _read_attributes(folder)
    return attributes is not None and attributes.get("provenance") == asdict(expected)


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Say what a slide's features were made from; None where there are none."""
    attributes = _read_attributes(folder)
    return None if attributes is None else attributes.get("provenance")


def _attributes(
    slide_id: str,
    reader: SlideReader,
    tiles: Tiles,
    plan: TilePlan,
    encoder: TileEncoder,
    provenance: Provenance,
) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "slide_id": slide_id,
        "slide_path": str(reader.path.resolve()),
        "slide_bytes": reader.path.stat().st_size,
        "slide_quickhash": reader.quickhash,
        "vendor": reader.vendor,
        "dimensions": list(reader.dimensions),
        "mpp": reader.mpp,
        "mpp_source": reader.mpp_source,
        "plan": plan.params,
        "plan_hash": plan.hash,
        "pitch0": tiles.pitch0,
        "order": "hilbert",
        "num_tiles": len(tiles),
        "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint,
        "tissue_threshold": tiles.mask.threshold,
        "tissue_threshold_source": tiles.mask.threshold_source,
        "provenance": asdict(provenance),
    }


def _read_attributes(folder: Path) -> dict[str, Any] | None:
    try:
        attributes = json.loads((folder / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError):
        return None
    return dict(attributes)


def _move_into_place(aside: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f"{folder.name}.tmp-{os.getpid()}-old")
        os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old)
    else:
        os.replace(aside, folder)
