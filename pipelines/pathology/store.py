"""Keep tile features on disk: one Zarr group per slide, complete or absent.

    index.csv                      a line per slide, so that a cohort is known from one file
    <slide_id>.zarr/
      grid      int32   [N, 2]     column and row on the tile grid: the truth about position
      xy0       int64   [N, 2]     tile corner in level-0 pixels
      tissue    float32 [N]        share of tissue; NaN where it is not known
      features/<encoder> float     [N, E]
      overview  uint8   [h, w, 3]  the slide at about 8 um per pixel, for heatmaps
      mask      bool    [h, w]     tissue on the overview
      survey_row int64  [N]        row in the survey of all tiles that it was chosen from
      source_row int64  [N]        row in the file of another tool that it was imported from

Rows stand in Hilbert order. Attributes tell where everything came from; `digest` is of the arrays
alone, so that equal content has equal digests whenever and wherever it was written. Imported slides
have source_row, and neither overview, mask nor survey_row.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr

from pipelines.pathology.chunk_files import DamageError, read_rows, read_shape
from pipelines.pathology.encoding import TileEncoder
from pipelines.pathology.slides import SlideReader
from pipelines.pathology.tiling import TilePlan, Tiles
from pipelines.shared.asides import aside_of, remove_leftovers
from pipelines.shared.errors import InputError
from pipelines.shared.tables import read_table, write_table

SCHEMA = "gigasparse-slide/1"
INDEX_COLUMNS = (
    "slide_id", "num_tiles", "num_features", "encoder", "encoder_fingerprint", "plan_hash",
    "mpp", "mpp_source", "digest",
)  # fmt: skip
_ENDING = ".zarr"
_INDEX = "index.csv"
_ROWS_PER_CHUNK = 4096
_ROWS_PER_SHARD = 16 * _ROWS_PER_CHUNK
_ROWS_WITHOUT_SHARDS = 500_000  # below, shards cost more time than their fewer files save


@dataclass(frozen=True, slots=True)
class Provenance:
    """What stored features depend on; equal values mean that they need no recomputing."""

    slide_fingerprint: str
    given_mpp: float | None
    plan_hash: str
    encoder: str
    encoder_fingerprint: str
    schema: str = SCHEMA


@dataclass(frozen=True, slots=True)
class SlideFeatures:
    """One slide's tiles, rows in Hilbert order; what is large is read when it is asked for.

    `grid` int32 [N, 2] (col, row), `xy0` int64 [N, 2], `tissue` float32 [N]; `num_features` is E;
    `dimensions` (width, height) and the distance `pitch0` of neighbouring tiles in level-0 pixels,
    `mpp` in micrometres per such pixel; `attributes` are the group's.
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

    @property
    def tile0(self) -> float:
        """The tile's side in level-0 pixels: `pitch0`, but for tiles that overlap."""
        return float(self.attributes.get("tile0", self.pitch0))

    @property
    def has_overview(self) -> bool:
        """Whether there is a picture of the slide and its tissue mask: not where it is imported."""
        return (self.folder / "overview").is_dir() and (self.folder / "mask").is_dir()

    def features(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Read features [N, E], or rows `start` to `stop`, in the float type they are stored in.

        4 GB for a million tiles of 1,024 in float32. Raises InputError where they are damaged.
        """
        return read_rows(self.folder / "features" / self.attributes["encoder"], start, stop)

    def source_rows(self) -> np.ndarray | None:
        """Read each tile's row [N] in the file it was imported from; None for slides of our own."""
        array = self.folder / "source_row"
        return read_rows(array) if array.is_dir() else None

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
        f"features/{encoder.name}": _as_float(features),
        "overview": tiles.mask.overview,
        "mask": tiles.mask.mask,
    }
    if tiles.index is not None:
        arrays["survey_row"] = tiles.index.astype(np.int64)
    write_group(folder, attributes, arrays)


def write_group(
    folder: Path, attributes: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write arrays, uncompressed, and attributes aside and move them into place.

    The attribute `digest` is added.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder.parent.glob(f"{glob.escape(folder.name)}.tmp-*"))
    aside = aside_of(folder)
    try:
        _write_arrays(aside, attributes, arrays)
    except BaseException:  # a full disk, an interrupt: nothing half written stays
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _move_into_place(aside, folder)


def _write_arrays(
    folder: Path, attributes: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> None:
    noted = {**attributes, "digest": content_digest(arrays)}
    group = zarr.create_group(folder, zarr_format=3, attributes=noted)
    for name, array in arrays.items():
        rows = len(array)
        sharded = rows >= _ROWS_WITHOUT_SHARDS
        group.create_array(
            name,
            data=array,
            chunks=(max(1, min(_ROWS_PER_CHUNK, rows)), *array.shape[1:]),
            shards=(_ROWS_PER_SHARD, *array.shape[1:]) if sharded else None,
            compressors=None,
            config={"write_empty_chunks": True},  # a missing file is then always damage
        )


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Digest of arrays: names, types, shapes and values, and nothing of when or where."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(f"{name}:{plain.dtype.str}:{plain.shape}".encode())
        digest.update(plain.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def check_content(folder: Path) -> None:
    """Compare a slide's arrays with the digest noted when they were written.

    Raises InputError where they differ, a chunk is missing, or there is no complete group.
    """
    noted = read_slide(folder).attributes.get("digest")
    arrays = {
        path.parent.relative_to(folder).as_posix(): read_rows(path.parent)
        for path in sorted(folder.rglob("zarr.json"))
        if json.loads(path.read_text(encoding="utf-8"))["node_type"] == "array"
    }
    if noted is not None and content_digest(arrays) != noted:
        raise DamageError(
            f"{folder}: its content is not what was written (digest {noted[:12]}...); the stored "
            "slide is damaged: delete this folder and make it again"
        )


def read_slide(folder: Path) -> SlideFeatures:
    """Read a slide's tiles. Raises InputError where there is no complete group."""
    attributes = _read_attributes(folder)
    if attributes is None:
        raise InputError(f"no stored slide features at {folder}; extract them first")
    features = folder / "features" / attributes["encoder"]
    return SlideFeatures(
        slide_id=attributes["slide_id"],
        folder=folder,
        grid=read_rows(folder / "grid"),
        xy0=read_rows(folder / "xy0"),
        tissue=read_rows(folder / "tissue"),
        num_features=read_shape(features)[1],
        dimensions=(attributes["dimensions"][0], attributes["dimensions"][1]),
        mpp=attributes["mpp"],
        pitch0=attributes["pitch0"],
        attributes=attributes,
    )


def is_current(folder: Path, expected: Provenance | Mapping[str, object]) -> bool:
    """Tell whether a complete group with this very provenance stands at `folder`."""
    attributes = _read_attributes(folder)
    wanted = asdict(expected) if isinstance(expected, Provenance) else dict(expected)
    return attributes is not None and attributes.get("provenance") == wanted


def read_provenance(folder: Path) -> dict[str, Any] | None:
    """Say what a slide's features were made from; None where there are none."""
    attributes = _read_attributes(folder)
    return None if attributes is None else attributes.get("provenance")


def list_slides(store: Path) -> list[str]:
    """Return the ids of a store's complete slides, sorted."""
    return sorted(folder.relative_to(store).as_posix()[: -len(_ENDING)] for folder in _walk(store))


def write_index(store: Path) -> pd.DataFrame:
    """Write `index.csv` from the groups' attributes and return it, as strings, by slide id."""
    found = ((name, _read_attributes(slide_folder(store, name))) for name in list_slides(store))
    rows = [_index_row(store, name, attributes) for name, attributes in found if attributes]
    table = pd.DataFrame(rows, columns=list(INDEX_COLUMNS), dtype=str)
    if rows and os.access(store, os.W_OK):  # of a store that is only read it stays in memory
        write_table(store / _INDEX, table)
    return table


def read_index(store: Path) -> pd.DataFrame:
    """Read `index.csv`, written anew where slides came, went or changed since.

    Raises InputError for a folder without stored slides.
    """
    if not store.is_dir():
        raise InputError(f"feature folder {store} does not exist; check features=FOLDER")
    path = store / _INDEX
    table = read_table(path) if path.is_file() and _is_fresh(path, store) else None
    if table is None or table["slide_id"].tolist() != list_slides(store):
        table = write_index(store)
    if table.empty:
        raise InputError(
            f"no stored slides in {store}; make them with `embed` or `import`, or check "
            "features=FOLDER"
        )
    return table


def _is_fresh(index: Path, store: Path) -> bool:
    written = index.stat().st_mtime_ns
    return all((folder / "zarr.json").stat().st_mtime_ns < written for folder in _walk(store))


def _walk(store: Path) -> Iterator[Path]:
    for folder, names, _ in os.walk(store):
        groups = [name for name in names if name.endswith(_ENDING)]
        names[:] = [name for name in names if _ENDING not in name]  # nor what is written aside
        for name in groups:
            if (Path(folder) / name / "zarr.json").is_file():
                yield Path(folder) / name


def _index_row(store: Path, slide_id: str, attributes: Mapping[str, Any]) -> list[str]:
    array = slide_folder(store, slide_id) / "features" / attributes["encoder"]
    num_tiles, num_features = read_shape(array)
    known = {**attributes.get("provenance", {}), **attributes, "slide_id": slide_id}
    known |= {"num_tiles": num_tiles, "num_features": num_features}
    return [str(known.get(column, "")) for column in INDEX_COLUMNS]


def _as_float(features: np.ndarray) -> np.ndarray:
    """Keep half precision, the rest as float32."""
    return features if features.dtype == np.float16 else features.astype(np.float32, copy=False)


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
    old = aside.with_name(f"{aside.name}-old")
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder, old)
        try:
            os.replace(aside, folder)
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(old, ignore_errors=True)  # another process was faster: its slide goes
    shutil.rmtree(old, ignore_errors=True)
