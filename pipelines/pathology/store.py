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

Rows stand in Hilbert order. Several encoders share a slide's tiles: the attribute `encoders` holds
for each what its features were made from and how the tiles were read; features that are not named
there were never finished. `digests` are of the arrays alone, and `digest` of them all, so that
equal content has equal digests whenever and wherever it was written. Imported slides have
source_row, and neither overview, mask nor survey_row.
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
from pipelines.shared.asides import aside_of, remove_leftovers
from pipelines.shared.errors import InputError
from pipelines.shared.tables import read_table, write_table

SCHEMA = "gigasparse-slide/2"
INDEX_COLUMNS = (
    "slide_id", "num_tiles", "num_features", "encoder", "encoder_fingerprint", "plan_hash",
    "mpp", "mpp_source", "source", "num_damaged", "digest",
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

    `grid` int32 [N, 2] (col, row), `xy0` int64 [N, 2], `tissue` float32 [N]; `encoder` is the name
    of that whose features are read, None where none of several was chosen; `dimensions` (width,
    height) and the distance `pitch0` of neighbouring tiles in level-0 pixels, `mpp` in micrometres
    per such pixel; `attributes` are the group's.
    """

    slide_id: str
    folder: Path
    grid: np.ndarray
    xy0: np.ndarray
    tissue: np.ndarray
    encoder: str | None
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

        4 GB for a million tiles of 1,024 in float32. Raises DamageError where they are damaged, and
        InputError where it is open which encoder's are meant.
        """
        return read_rows(self._features, start, stop)

    @property
    def num_features(self) -> int:
        """The encoder's number of features, E; raises as `features` does."""
        return read_shape(self._features)[1]

    @property
    def encoder_fingerprint(self) -> str | None:
        """The fingerprint of the encoder's weights."""
        return None if self.encoder is None else self._entries[self.encoder]["fingerprint"]

    @property
    def _features(self) -> Path:
        if self.encoder is None:
            raise InputError(
                f"{self.folder} holds features of {', '.join(self._entries)}: say of which encoder"
            )
        return self.folder / "features" / self.encoder

    @property
    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = self.attributes["encoders"]
        return entries

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


def encoder_entry(
    fingerprint: str,
    provenance: Mapping[str, object],
    reading: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """What the attribute `encoders` holds of one: its weights, what it was given, how it was read.

    `reading`: `source` (openslide or jpeg_tiles) and `why`, `num_damaged` tiles that could not be
    read, and `damage`, what the first of them met.
    """
    return {"fingerprint": fingerprint, "provenance": dict(provenance), **(reading or {})}


def write_group(
    folder: Path, attributes: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> None:
    """Write arrays, uncompressed, and attributes aside and move them into place.

    The attributes `digests` and `digest` are added.
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


def add_array(folder: Path, name: str, array: np.ndarray, attributes: Mapping[str, object]) -> None:
    """Add an array to a slide's group, aside and renamed, and then set attributes of the group.

    Of two processes that add to one slide at one moment the first may have to add again.
    """
    target = folder / name
    target.parent.mkdir(exist_ok=True)
    remove_leftovers(target.parent.iterdir())
    aside = aside_of(target)
    try:
        zarr.create_array(aside, data=array, **_layout(array))
        if target.exists():  # not in the digests: adding it was never finished
            shutil.rmtree(target)
        os.replace(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    metadata = json.loads((folder / "zarr.json").read_text(encoding="utf-8"))
    digests = {**metadata["attributes"]["digests"], name: _array_digest(array)}
    known = {"digests": digests, "digest": _joint_digest(digests)}
    metadata["attributes"] |= {**attributes, **known}
    aside = aside_of(folder / "zarr.json")
    aside.write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    os.replace(aside, folder / "zarr.json")


def _write_arrays(
    folder: Path, attributes: Mapping[str, object], arrays: Mapping[str, np.ndarray]
) -> None:
    digests = {name: _array_digest(array) for name, array in sorted(arrays.items())}
    noted = {**attributes, "digests": digests, "digest": _joint_digest(digests)}
    group = zarr.create_group(folder, zarr_format=3, attributes=noted)
    for name, array in arrays.items():
        group.create_array(name, data=array, **_layout(array))


def _layout(array: np.ndarray) -> dict[str, Any]:
    rows = len(array)
    sharded = rows >= _ROWS_WITHOUT_SHARDS
    return {
        "chunks": (max(1, min(_ROWS_PER_CHUNK, rows)), *array.shape[1:]),
        "shards": (_ROWS_PER_SHARD, *array.shape[1:]) if sharded else None,
        "compressors": None,
        "config": {"write_empty_chunks": True},  # a missing file is then always damage
    }


def content_digest(arrays: Mapping[str, np.ndarray]) -> str:
    """Digest of arrays: names, types, shapes and values, and nothing of when or where."""
    return _joint_digest({name: _array_digest(array) for name, array in arrays.items()})


def _array_digest(array: np.ndarray) -> str:
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    digest = hashlib.sha256(f"{plain.dtype.str}:{plain.shape}".encode())
    digest.update(plain.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _joint_digest(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(dict(sorted(digests.items()))).encode()).hexdigest()


def check_content(folder: Path) -> None:
    """Compare a slide's arrays with the digest noted when they were written.

    Raises InputError where they differ, a chunk is missing, or there is no complete group.
    """
    for name, noted in read_slide(folder).attributes["digests"].items():
        if _array_digest(read_rows(folder / name)) != noted:
            raise DamageError(
                f"{folder / name} is not what was written (digest {noted[:12]}...); the stored "
                f"slide is damaged: delete {folder} and make it again"
            )


def read_slide(folder: Path, encoder: str | None = None) -> SlideFeatures:
    """Read a slide's tiles, and which encoder's features go with them: the only one's, or one's.

    `encoder` is its name or its fingerprint. Raises InputError where there is no complete group,
    and where that encoder is not in it.
    """
    attributes = _read_attributes(folder)
    if attributes is None:
        raise InputError(f"no stored slide features at {folder}; extract them first")
    _check_schema(folder, attributes)
    return SlideFeatures(
        slide_id=attributes["slide_id"],
        folder=folder,
        grid=read_rows(folder / "grid"),
        xy0=read_rows(folder / "xy0"),
        tissue=read_rows(folder / "tissue"),
        encoder=_choose_encoder(folder, attributes["encoders"], encoder),
        dimensions=(attributes["dimensions"][0], attributes["dimensions"][1]),
        mpp=attributes["mpp"],
        pitch0=attributes["pitch0"],
        attributes=attributes,
    )


def _check_schema(folder: Path, attributes: Mapping[str, Any]) -> None:
    if attributes.get("schema") != SCHEMA:
        raise InputError(
            f"{folder} is of another version of the store ({attributes.get('schema')}, here "
            f"{SCHEMA}); delete it and make it again"
        )


def _choose_encoder(folder: Path, entries: Mapping[str, Any], wanted: str | None) -> str | None:
    fitting = [n for n, entry in entries.items() if wanted in (None, n, entry["fingerprint"])]
    if not fitting:
        raise InputError(
            f"{folder} holds features of {', '.join(entries)}, none of encoder {wanted}; embed its "
            "slide with that one, too"
        )
    return fitting[0] if len(fitting) == 1 else None


def is_current(folder: Path, expected: Provenance | Mapping[str, object]) -> bool:
    """Tell whether features with this very provenance stand in a complete group at `folder`."""
    wanted = asdict(expected) if isinstance(expected, Provenance) else dict(expected)
    return wanted in read_provenances(folder).values()


def read_provenances(folder: Path) -> dict[str, dict[str, Any]]:
    """Say what a slide's features were made from, by encoder; none where there are none.

    Raises InputError for a group of another version of the store.
    """
    return {name: entry["provenance"] for name, entry in _read_entries(folder).items()}


def read_provenance(folder: Path, encoder: str) -> dict[str, Any] | None:
    """Say what features of an encoder (its fingerprint) were made from; None where there are none.

    Raises as `read_provenances` does.
    """
    entries = _read_entries(folder).values()
    return next((e["provenance"] for e in entries if e["fingerprint"] == encoder), None)


def _read_entries(folder: Path) -> dict[str, Any]:
    attributes = _read_attributes(folder)
    if attributes is None:
        return {}
    _check_schema(folder, attributes)
    return dict(attributes["encoders"])


def list_slides(store: Path) -> list[str]:
    """Return the ids of a store's complete slides, sorted."""
    return sorted(folder.relative_to(store).as_posix()[: -len(_ENDING)] for folder in _walk(store))


def write_index(store: Path) -> pd.DataFrame:
    """Write `index.csv`, a row for each slide and encoder, and return it, as strings."""
    found = ((name, _read_attributes(slide_folder(store, name))) for name in list_slides(store))
    rows = [
        _index_row(store, slide_id, encoder, attributes)
        for slide_id, attributes in found
        if attributes and attributes.get("schema") == SCHEMA
        for encoder in attributes["encoders"]
    ]
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
    if table is None or table["slide_id"].unique().tolist() != list_slides(store):
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


def _index_row(
    store: Path, slide_id: str, encoder: str, attributes: Mapping[str, Any]
) -> list[str]:
    array = slide_folder(store, slide_id) / "features" / encoder
    num_tiles, num_features = read_shape(array)
    entry = attributes["encoders"][encoder]
    known = {**attributes, **{k: v for k, v in entry.items() if k != "provenance"}}
    known |= {
        "slide_id": slide_id,
        "num_tiles": num_tiles,
        "num_features": num_features,
        "encoder": encoder,
        "encoder_fingerprint": entry["fingerprint"],
    }
    return [str(known.get(column, "")) for column in INDEX_COLUMNS]


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
