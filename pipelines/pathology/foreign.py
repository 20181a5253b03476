"""Read tile features that other tools wrote, each as that tool defines them.

    tool       features               coordinates            their unit      tile and stride
    TRIDENT    h5 `features`          `coords`               level-0 pixels  attributes of `coords`
    CLAM       h5_files/, pt_files/   `coords`               level-0 pixels  patches/*.h5
    STAMP      h5 `feats`             `coords`               micrometres     attributes of the file
    GigaPath   h5 `features`          `coords`               pixels, 0.5 um  256, by convention
    slide2vec  tile_embeddings/       tiles/*.npz `x`, `y`   level-0 pixels  tiles/*.meta.json

What a file leaves open is refused with what to give, never guessed; and nothing is unpickled.
"""

import importlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipelines.pathology.slides import SLIDE_ENDINGS
from pipelines.shared.errors import InputError

FORMATS = ("auto", "trident", "clam", "stamp", "gigapath", "slide2vec", "plain")
OWN_ATTRIBUTE = "gigasparse"
"""Attribute of `coords` in files that `export` wrote: a JSON of what TRIDENT has no name for."""

OWN_KEYS = (
    "tile0", "pitch0", "plan", "plan_hash", "tile_px", "mpp", "mpp_source", "dimensions", "encoder",
    "encoder_fingerprint",
)  # fmt: skip

Unit = float | Literal["level0_px"]
"""Micrometres in one unit of the coordinates, or pixels of the slide's level 0."""

_STAMP_MAJOR = 2
_HISTORIC_STRIDE = 224  # of STAMP 1: 256 um, counted in 224 pixels
_GIGAPATH_MPP, _GIGAPATH_TILE, _GIGAPATH_DIM = 0.5, 256, 1536
_H5_ARRAYS = ("features", "feats", "coords", "grid", "tissue")
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile)
_ASK = "give unit=level0_px (or um, or the um of a unit), tile= in that unit, and mpp="


class ForeignError(Exception):
    """One slide that cannot be imported: a row of `failures.csv`."""

    def __init__(self, status: str, reason: str, remedy: str) -> None:
        super().__init__(f"{status}: {reason}; {remedy}")
        self.status, self.reason, self.remedy = status, reason, remedy


@dataclass(frozen=True, slots=True)
class Given:
    """What the user says of all files; None where the files are to say it."""

    unit: Unit | None = None
    tile: float | None = None
    stride: float | None = None
    tile_px: int | None = None
    encoder: str | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """One slide of another tool: its files by role (features, tensor, tiles, meta)."""

    slide_id: str
    format: str
    files: Mapping[str, Path]

    @property
    def path(self) -> Path:
        """The file that stands for the slide in messages."""
        return next(iter(self.files.values()))


@dataclass(slots=True)
class ForeignSlide:
    """Tile features as a tool stored them, rows in its order.

    `coords` [N, 2] (x, y) of the tiles' corners and `tile`, `stride` are in `unit`s; `skipped` is
    what TRIDENT adds to all corners but the first of an axis. `features` float [N, E]. `plan` says
    in the tool's words how tiles were cut, alike for all slides of a run; `own` and `grid` int32
    [N, 2] (col, row) are there in files that `export` wrote. What is None is unknown.
    """

    format: str
    coords: np.ndarray
    features: np.ndarray
    unit: Unit
    tile: float
    stride: float
    plan: dict[str, object]
    skipped: float = 0.0
    tile_px: int | None = None
    encoder: str | None = None
    mpp: float | None = None
    dimensions: tuple[int, int] | None = None
    tissue: np.ndarray | None = None
    own: dict[str, Any] | None = None
    grid: np.ndarray | None = None
    attributes: dict[str, object] = field(default_factory=dict)


def find_items(source: Path, format: str, patches: Path | None) -> list[Item]:
    """List the slides of a folder, or of one file, by id; several may share one.

    Raises InputError where there is nothing to import.
    """
    if not source.exists():
        raise InputError(f"{source} does not exist; check source=")
    if source.is_file():
        items = [_single(source, format, patches)]
    elif format in ("auto", "clam") and _subfolder(source, "h5_files", "pt_files"):
        items = list(_clam_items(source, patches))
    elif format in ("auto", "slide2vec") and (source / "tile_embeddings").is_dir():
        items = list(_slide2vec_items(source / "tile_embeddings"))
    else:
        items = [_single(path, format, patches) for path in _feature_files(source)]
        items = list({(item.slide_id, item.path): item for item in items}.values())
    if not items:
        raise InputError(f"no .h5, .pt or .npz files in {source}; check source=")
    return sorted(items, key=lambda item: (item.slide_id, str(item.path)))


def read_foreign(item: Item, given: Given) -> ForeignSlide:
    """Read a slide's features and how its coordinates are to be understood.

    Raises ForeignError with a status: `unreadable`, `no_features`, `no_coordinates`,
    `slide_features`, `unknown_unit`, `missing_attribute`, `unknown_version`, `contradictory`,
    `count_mismatch`, `not_float`, `not_finite`, `empty`.
    """
    readers = {"clam": _read_clam, "slide2vec": _read_slide2vec}
    slide = readers.get(item.format, _read_h5_slide)(item, given)
    if given.unit is not None and item.format != "plain" and slide.format != "plain":
        raise ForeignError(
            "contradictory",
            f"unit= is given, but {item.path.name} is a {slide.format} file that says it itself",
            "leave unit= and tile= out, or overrule the file by format=plain",
        )
    for key, said in (("tile", slide.tile), ("tile_px", slide.tile_px)):
        wanted = getattr(given, key)
        if wanted is not None and said is not None and abs(wanted / said - 1) > 1e-6:
            raise ForeignError(
                "contradictory",
                f"{key}={wanted:g} is given, but {item.path.name} says {said:g}",
                f"leave {key}= out, or overrule the file by format=plain",
            )
    _check(item, slide)
    slide.stride = given.stride or slide.stride
    slide.tile_px = given.tile_px or slide.tile_px
    slide.encoder = given.encoder or slide.encoder
    return slide


def _feature_files(source: Path) -> list[Path]:
    """List the files below a folder, but for lists of tiles: TRIDENT and CLAM call them patches."""
    found = (path for path in source.rglob("*") if path.suffix in (".h5", ".pt", ".npz"))
    return sorted(p for p in found if "patches" not in p.relative_to(source).parts and p.is_file())


def _single(path: Path, format: str, patches: Path | None) -> Item:
    """Take one file for a slide, with the files beside it that its place lets expect."""
    if format in ("auto", "clam") and path.parent.name in ("h5_files", "pt_files"):
        return _clam_item(path.parent.parent, _slide_id(path), patches, None)
    if format == "clam":
        return _clam_item(path.parent, _slide_id(path), patches, path)
    if path.suffix in (".pt", ".npz") and format in ("auto", "slide2vec"):
        return _slide2vec_item(path, next((p for p in path.parents if _is_root(p)), path.parent))
    return Item(_slide_id(path), format, {"features": path})


def _subfolder(source: Path, *names: str) -> bool:
    return any((source / name).is_dir() for name in names)


def _slide_id(path: Path) -> str:
    """A file's name without its ending, and without the slide's own: GigaPath keeps `.svs`."""
    stem = path.stem
    ending = Path(stem).suffix.lower()
    return stem[: -len(ending)] if ending in SLIDE_ENDINGS else stem


def _clam_items(root: Path, patches: Path | None) -> Iterator[Item]:
    files = [*root.glob("h5_files/*.h5"), *root.glob("pt_files/*.pt")]
    for slide_id in dict.fromkeys(sorted(_slide_id(path) for path in files)):
        yield _clam_item(root, slide_id, patches, None)


def _clam_item(root: Path, slide_id: str, patches: Path | None, path: Path | None) -> Item:
    folders = [patches] if patches else [root / "patches", root.parent / "patches"]
    wanted = {
        "features": [root / "h5_files" / f"{slide_id}.h5"],
        "tensor": [root / "pt_files" / f"{slide_id}.pt"],
        "tiles": [folder / f"{slide_id}.h5" for folder in folders],
    }
    if path is not None:
        wanted["tensor" if path.suffix == ".pt" else "features"] = [path]
    found = {role: [p for p in paths if p.is_file()] for role, paths in wanted.items()}
    return Item(slide_id, "clam", {role: paths[0] for role, paths in found.items() if paths})


def _is_root(folder: Path) -> bool:
    return folder.name == "tile_embeddings"


def _slide2vec_items(root: Path) -> Iterator[Item]:
    for path in sorted(root.rglob("*")):
        if path.suffix in (".pt", ".npz"):
            yield _slide2vec_item(path, root)


def _slide2vec_item(path: Path, root: Path) -> Item:
    """Annotated classes stand in folders of their names, below both trees."""
    tiles = root.parent / "tiles" / path.parent.relative_to(root)
    files = {
        "features": path,
        "meta": path.with_suffix(".meta.json"),
        "tiles": tiles / f"{path.stem}.coordinates.npz",
        "tiles_meta": tiles / f"{path.stem}.coordinates.meta.json",
    }
    return Item(path.stem, "slide2vec", files)


@dataclass(frozen=True, slots=True)
class _H5:
    """Content of an HDF5 file: its names and attributes, those of each dataset, and the arrays."""

    names: list[str]
    attributes: dict[str, Any]
    of: dict[str, dict[str, Any]]
    arrays: dict[str, np.ndarray]


def _read_h5(path: Path, names: tuple[str, ...] = _H5_ARRAYS) -> _H5:
    h5py = _import_h5py(path)
    try:
        with h5py.File(path, "r") as file:
            found = [name for name in names if isinstance(file.get(name), h5py.Dataset)]
            content = _H5(
                sorted(file.keys()),
                _plain(file.attrs),
                {name: _plain(file[name].attrs) for name in found},
                {name: np.asarray(file[name][()]) for name in found},
            )
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return content


def _import_h5py(path: Path) -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise InputError(
            f"{path} is HDF5 and needs h5py; install it with: pip install -e '.[interchange]'"
        ) from None


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Turn attributes into plain values; TRIDENT writes None as the word and dicts as JSON."""
    plain: dict[str, Any] = {}
    for key, value in attributes.items():
        value = value.tolist() if hasattr(value, "tolist") else value
        value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
        plain[key] = None if value == "None" else value
    return plain


def _read_h5_slide(item: Item, given: Given) -> ForeignSlide:
    """Read a file that stands alone, by the tool that its attributes name."""
    path = item.files["features"]
    if path.suffix != ".h5":
        raise ForeignError(
            "no_coordinates",
            f"{path.name} holds features and no coordinates",
            "give the folder above it: slide2vec's with tile_embeddings/ and tiles/, or CLAM's "
            "with pt_files/ and patches/",
        )
    content = _read_h5(path)
    name = next((name for name in ("features", "feats") if name in content.arrays), None)
    _check_kind(path, content, name)
    assert name is not None
    features, coords = content.arrays[name], content.arrays["coords"]
    tool = _detect(content, name) if item.format in ("auto", "plain") else item.format
    if item.format == "plain" or (tool is None and given.unit is not None and given.tile):
        tool = "plain"
    readers = {
        "trident": _trident,
        "legacy": _legacy,
        "stamp": _stamp,
        "gigapath": _gigapath,
        "plain": _given_geometry,
    }
    if tool is None:
        raise ForeignError(
            "unknown_unit",
            f"{path.name} says neither the unit of its coordinates nor the size of its tiles",
            f"{_ASK}; or format=gigapath or format=clam, if it comes from there",
        )
    slide = readers[tool](path, content, features, coords, given)
    slide.attributes = {
        "file": content.attributes,
        **content.of,
    }
    return slide


def _check_kind(path: Path, content: _H5, name: str | None) -> None:
    """Refuse files of something else than tile features with coordinates."""
    kind = content.attributes.get("feat_type") or "tile"
    if kind != "tile" or (name is not None and content.arrays[name].ndim == 1):
        raise ForeignError(
            "slide_features",
            f"{path.name} holds one vector for a whole {'slide' if kind == 'tile' else kind}",
            "give the folder of tile features: TRIDENT's features_*, STAMP's output of preprocess",
        )
    if name is None:
        raise ForeignError(
            "no_features",
            f"{path.name} holds {', '.join(content.names) or 'nothing'}, and neither features nor "
            "feats",
            "give the folder of tile features: TRIDENT's features_*, CLAM's with h5_files/",
        )
    if "coords" not in content.arrays:
        raise ForeignError(
            "no_coordinates",
            f"{path.name} holds features and no coords",
            "extract the features again with coordinates; without them there is no arrangement",
        )


def _detect(content: _H5, name: str) -> str | None:
    coords = content.of["coords"]
    if OWN_ATTRIBUTE in coords or "patch_size_level0" in coords:
        return "trident"
    if "patch_size" in coords and "patch_level" in coords:
        return "legacy"
    if {"stamp_version", "unit", "tile_size", "tile_size_um"} & set(content.attributes):
        return "stamp"
    if name == "feats" and _observed_stride(content.arrays["coords"]) == _HISTORIC_STRIDE:
        return "stamp"
    return None


def _observed_stride(coords: np.ndarray) -> int | None:
    """Smallest step between columns, or rows, as STAMP looks for it; None where there is none."""
    if coords.ndim != 2 or len(coords) == 0:
        return None
    steps = np.concatenate([np.diff(np.unique(axis)) for axis in coords.T.astype(np.float64)])
    return round(float(steps.min())) if len(steps) else None


def _trident(
    path: Path, content: _H5, features: np.ndarray, coords: np.ndarray, given: Given
) -> ForeignSlide:
    """TRIDENT 0.1 to 0.3: `coords_to_h5` and `WSIPatcher` of its source."""
    noted = content.of["coords"]
    own = _own(path, noted)
    if own is not None:
        return _exported(content, own, features, coords)
    patch, overlap = (_number(path, noted, key) for key in ("patch_size", "overlap"))
    side = _number(path, noted, "patch_size_level0")
    scale = side / patch
    if overlap or (noted.get("level0_magnification") and noted.get("target_magnification")):
        source = _number(path, noted, "level0_magnification")
        scale = source / _number(path, noted, "target_magnification")
    skipped = float(round(overlap * scale))
    size = [noted.get("level0_width") or 0, noted.get("level0_height") or 0]
    return ForeignSlide(
        format="trident",
        coords=coords,
        features=features,
        unit="level0_px",
        tile=side,
        stride=round(patch * scale) - skipped,
        skipped=skipped,
        plan={
            "tool": "trident",
            "tile_px": int(patch),
            "overlap_px": int(overlap),
            "target_magnification": noted.get("target_magnification"),
        },
        tile_px=int(patch),
        encoder=content.of.get("features", {}).get("encoder") or _folder_encoder(path),
        dimensions=(int(size[0]), int(size[1])) if all(size) else None,
    )


def _exported(
    content: _H5, own: dict[str, Any], features: np.ndarray, coords: np.ndarray
) -> ForeignSlide:
    """Take a slide that `export` wrote for what it was."""
    return ForeignSlide(
        format="trident",
        coords=coords,
        features=features,
        unit="level0_px",
        tile=own["tile0"],
        stride=own["pitch0"],
        plan=own["plan"],
        tile_px=own["tile_px"],
        encoder=own["encoder"],
        mpp=own["mpp"],
        dimensions=(own["dimensions"][0], own["dimensions"][1]),
        tissue=content.arrays.get("tissue"),
        own=own,
        grid=content.arrays.get("grid"),
    )


def _own(path: Path, noted: Mapping[str, Any]) -> dict[str, Any] | None:
    if OWN_ATTRIBUTE not in noted:
        return None
    try:
        own = json.loads(noted[OWN_ATTRIBUTE])
        missing = [key for key in OWN_KEYS if key not in own]
        if missing:
            raise KeyError(f"attribute {OWN_ATTRIBUTE} lacks {missing[0]}")
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error
    return dict(own)


def _folder_encoder(path: Path) -> str | None:
    name = path.parent.name
    return name.removeprefix("features_") if name.startswith("features_") else None


def _legacy(
    path: Path, content: _H5, features: np.ndarray, coords: np.ndarray, given: Given
) -> ForeignSlide:
    """Coordinates of CLAM with features of TRIDENT: the tile's size is that of CLAM."""
    return _of_clam(path, content.of["coords"], features, coords, given)


def _of_clam(
    path: Path,
    noted: Mapping[str, Any],
    features: np.ndarray,
    coords: np.ndarray,
    given: Given,
) -> ForeignSlide:
    """CLAM: `create_patches_fp` and `WholeSlideImage.process_contours` of its source."""
    patch, level = (int(_number(path, noted, key)) for key in ("patch_size", "patch_level"))
    if noted.get("custom_downsample", 1) != 1:
        raise ForeignError(
            "unknown_unit",
            f"{path.name} was cut with custom_downsample, which leaves the tile's size open",
            f"format=plain: {_ASK}",
        )
    downsample = noted.get("downsample", 1.0 if level == 0 else None)
    if downsample is None and not given.tile:
        raise ForeignError(
            "missing_attribute",
            f"{path.name} says patch_level {level} and not that level's downsample",
            "give tile=, its side in level-0 pixels",
        )
    x, y = downsample if isinstance(downsample, list) else (downsample, downsample)
    if x is not None and int(x) != int(y):
        raise ForeignError(
            "contradictory",
            f"{path.name}: downsample is {x:g} across and {y:g} down",
            f"format=plain: {_ASK}",
        )
    size = noted.get("level_dim")
    return ForeignSlide(
        format="clam",
        coords=coords,
        features=features,
        unit="level0_px",
        tile=(given.tile or 0.0) if x is None else patch * float(x),
        stride=(given.tile or 0.0) if x is None else patch * int(x),  # CLAM's own rounding
        plan={"tool": "clam", "tile_px": patch, "patch_level": level},
        tile_px=patch,
        dimensions=(int(size[0]), int(size[1])) if level == 0 and size else None,
    )


def _read_clam(item: Item, given: Given) -> ForeignSlide:
    """Read features from h5_files or pt_files, and the tile's size from patches."""
    files = item.files
    tiles = _read_h5(files["tiles"], ("coords",)) if "tiles" in files else None
    tensor = _load_tensor(files["tensor"]) if "tensor" in files else None
    if "features" in files:
        content = _read_h5(files["features"])
        _check_kind(files["features"], content, "features" if "features" in content.of else None)
        features, coords = content.arrays["features"], content.arrays["coords"]
        if tensor is not None and not _same(tensor, features):
            raise _differ(item, "pt_files", "h5_files")
        if tiles is not None and not _same(tiles.arrays.get("coords"), coords):
            raise _differ(item, "patches", "h5_files")
    elif tiles is not None and tensor is not None and "coords" in tiles.arrays:
        features, coords = tensor, tiles.arrays["coords"]
    else:
        raise ForeignError(
            "no_coordinates",
            f"{item.path.name} has no coordinates: neither h5_files/ nor patches/ has the slide",
            "give patches=FOLDER with CLAM's patches/*.h5",
        )
    noted = tiles.of.get("coords", {}) if tiles is not None else {}
    if noted:
        slide = _of_clam(files["tiles"], noted, features, coords, given)
    elif given.tile:
        slide = _clam_tiles_given(features, coords, given.tile)
    else:
        raise ForeignError(
            "unknown_unit",
            f"{item.path.name} does not say how large its tiles are (CLAM notes it in patches/)",
            "give patches=FOLDER with CLAM's patches/*.h5, or tile= in level-0 pixels",
        )
    slide.attributes = {"coords": dict(noted)}
    return slide


def _clam_tiles_given(features: np.ndarray, coords: np.ndarray, tile: float) -> ForeignSlide:
    plan: dict[str, object] = {"tool": "clam", "tile0": tile}
    return ForeignSlide("clam", coords, features, "level0_px", tile, tile, plan)


def _same(one: np.ndarray | None, two: np.ndarray) -> bool:
    return one is not None and one.shape == two.shape and np.array_equal(one, two, equal_nan=True)


def _differ(item: Item, one: str, two: str) -> ForeignError:
    return ForeignError(
        "contradictory",
        f"{item.slide_id} is not the same in {one}/ and {two}/",
        "they come from different runs: extract the features again, or move the wrong file away",
    )


def _stamp(
    path: Path, content: _H5, features: np.ndarray, coords: np.ndarray, given: Given
) -> ForeignSlide:
    """STAMP 1 to 2: `get_coords` of its source."""
    noted = content.attributes
    version = str(noted.get("stamp_version") or "0")
    if not version.split(".")[0].isdigit() or int(version.split(".")[0]) > _STAMP_MAJOR:
        raise ForeignError(
            "unknown_version",
            f"{path.name} was written by STAMP {version}",
            f"versions up to {_STAMP_MAJOR} are known here; {_ASK} format=plain",
        )
    unit, tile, tile_px = 1.0, noted.get("tile_size_um"), noted.get("tile_size_px")
    if tile is None and noted.get("unit") == "um":
        tile = noted.get("tile_size")  # 2.0
    historic = tile is None and _HISTORIC_STRIDE in (
        noted.get("tile_size"), _observed_stride(coords),
    )  # fmt: skip
    if historic:
        unit, tile, tile_px = 256 / _HISTORIC_STRIDE, _HISTORIC_STRIDE, _HISTORIC_STRIDE
    if tile is None or noted.get("unit", "um") != "um":
        raise ForeignError(
            "unknown_unit",
            f"{path.name} does not give its tiles in micrometres (unit {noted.get('unit')!r}, "
            f"tile_size_um {noted.get('tile_size_um')!r})",
            f"format=plain: {_ASK}",
        )
    return ForeignSlide(
        format="stamp",
        coords=coords,
        features=features,
        unit=unit,
        tile=float(tile),
        stride=float(tile),
        plan={"tool": "stamp", "tile_um": float(tile) * unit, "tile_px": tile_px},
        tile_px=tile_px,
        encoder=noted.get("extractor"),
    )


def _gigapath(
    path: Path, content: _H5, features: np.ndarray, coords: np.ndarray, given: Given
) -> ForeignSlide:
    """GigaPath: tiles of 256 pixels at 0.5 um, counted in such pixels; the file does not say so."""
    is_its_own = features.ndim == 2 and features.shape[1] == _GIGAPATH_DIM
    return ForeignSlide(
        format="gigapath",
        coords=coords,
        features=features,
        unit=_GIGAPATH_MPP,
        tile=_GIGAPATH_TILE,
        stride=_GIGAPATH_TILE,
        plan={"tool": "gigapath", "tile_px": _GIGAPATH_TILE, "mpp": _GIGAPATH_MPP},
        tile_px=_GIGAPATH_TILE,
        encoder="gigapath" if is_its_own else None,
    )


def _given_geometry(
    path: Path, content: _H5, features: np.ndarray, coords: np.ndarray, given: Given
) -> ForeignSlide:
    if given.unit is None or given.tile is None:
        raise ForeignError("unknown_unit", f"format=plain takes nothing from {path.name}", _ASK)
    stride = given.stride or given.tile
    plan: dict[str, object] = {"tool": "plain", "unit": given.unit, "tile": given.tile}
    plan |= {"stride": stride, "tile_px": given.tile_px}
    return ForeignSlide("plain", coords, features, given.unit, given.tile, stride, plan)


def _read_slide2vec(item: Item, given: Given) -> ForeignSlide:
    """slide2vec 5 with hs2p 4: its page "Output Layout"."""
    path, files = item.files["features"], item.files
    for role in ("meta", "tiles", "tiles_meta"):
        if not files[role].is_file():
            raise ForeignError(
                "no_coordinates",
                f"{path.name} lacks {files[role]}",
                "give slide2vec's output folder, with tile_embeddings/ and tiles/; a file without "
                "its .meta.json is of an interrupted run",
            )
    meta, noted = _read_json(files["meta"]), _flatten(_read_json(files["tiles_meta"]))
    if meta.get("artifact_type", "tile_embeddings") != "tile_embeddings":
        raise ForeignError(
            "slide_features", f"{path.name} holds {meta['artifact_type']}", "give tile_embeddings/"
        )
    if str(noted.get("coordinate_space", "level_0")) not in ("level_0", "level0_px"):
        raise ForeignError(
            "unknown_unit",
            f"{files['tiles_meta'].name}: coordinate_space {noted['coordinate_space']!r}",
            "level_0 is known here; tile again with slide2vec 5",
        )
    arrays = _load_npz(files["tiles"])
    features, rows = _slide2vec_features(path, arrays)
    side = _number(files["tiles_meta"], noted, "tile_size_lv0")
    fractions = arrays.get("tissue_fractions", arrays.get("tissue_fraction"))
    size = noted.get("dimensions")
    named = ("requested_tile_size_px", "requested_spacing_um", "overlap")
    return ForeignSlide(
        format="slide2vec",
        coords=np.stack([arrays["x"], arrays["y"]], axis=-1)[rows],
        features=features,
        unit="level0_px",
        tile=side,
        stride=float(noted.get("step_px_lv0") or side),
        plan={"tool": "slide2vec", **{key: noted.get(key) for key in named}},
        tile_px=noted.get("requested_tile_size_px"),
        encoder=meta.get("encoder_name"),
        mpp=noted.get("base_spacing_um"),
        dimensions=(int(size[0]), int(size[1])) if size else None,
        tissue=None if fractions is None else fractions[rows].astype(np.float32),
        attributes={"meta": meta, "tiles": noted},
    )


def _slide2vec_features(
    path: Path, tiles: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return features and, for each, its row among the tiles."""
    for name in ("x", "y"):
        if name not in tiles:
            raise ForeignError(
                "no_coordinates", f"the tiles of {path.name} have no {name}", "tile the slide again"
            )
    everything = np.arange(len(tiles["x"]))
    if path.suffix == ".pt":
        return _load_tensor(path), everything
    arrays = _load_npz(path)
    if "features" not in arrays:
        raise ForeignError("no_features", f"{path.name} holds no features", "extract them again")
    if "tile_index" not in arrays or "tile_index" not in tiles:
        return arrays["features"], everything
    where = {int(index): row for row, index in enumerate(tiles["tile_index"])}
    rows = [where.get(int(index), -1) for index in arrays["tile_index"]]
    if -1 in rows:
        raise ForeignError(
            "contradictory",
            f"{path.name} has tile_index {arrays['tile_index'][rows.index(-1)]}, its tiles do not",
            "the slide was tiled again since: extract the features again",
        )
    return arrays["features"], np.array(rows, dtype=np.int64)


def _load_tensor(path: Path) -> np.ndarray:
    """Load a bare tensor [N, E]; anything that wants code to be run is refused."""
    import torch

    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (*_UNREADABLE, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(tensor, torch.Tensor):
        raise ForeignError(
            "no_features",
            f"{path.name} holds a {type(tensor).__name__}, not one tensor",
            "save the features alone: torch.save(features, path)",
        )
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()  # exact: numpy has no such type
    return np.asarray(tensor.numpy())


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (*_UNREADABLE, AttributeError) as error:
        raise _unreadable(path, error) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error
    return found if isinstance(found, dict) else {}


def _flatten(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a sidecar's sections to one level; older ones have none."""
    flat = {key: value for key, value in meta.items() if not isinstance(value, dict)}
    for section in meta.values():
        if isinstance(section, dict):
            flat |= section
    return flat


def _number(path: Path, noted: Mapping[str, Any], key: str) -> float:
    value = noted.get(key)
    if not isinstance(value, int | float) or value < 0 or (value == 0 and "size" in key):
        raise ForeignError(
            "missing_attribute",
            f"{path.name}: attribute {key} is {'missing' if value is None else repr(value)}",
            f"format=plain: {_ASK}",
        )
    return float(value)


def _check(item: Item, slide: ForeignSlide) -> None:
    """Refuse arrays that are not one finite vector and one corner per tile."""
    name, features, coords = item.path.name, slide.features, slide.coords
    if features.ndim != 2 or coords.ndim != 2 or coords.shape[1] != 2:
        raise ForeignError(
            "count_mismatch",
            f"{name}: features have shape {features.shape}, coordinates {coords.shape}",
            "[N, E] and [N, 2] are needed: extract the features again",
        )
    if len(features) != len(coords):
        raise ForeignError(
            "count_mismatch",
            f"{name}: {len(features):,} features, {len(coords):,} coordinates",
            "the slide was tiled again since: extract the features again",
        )
    if len(features) == 0:
        raise ForeignError("empty", f"{name} has no tiles", "look at the slide, or leave it out")
    if features.dtype.kind != "f":
        raise ForeignError(
            "not_float", f"{name}: features are {features.dtype}", "features must be floats"
        )
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ForeignError(
            "not_finite",
            f"{name}, row {int(np.argmin(finite))}: NaN or infinity among the features",
            "extract the slide again, in float32 if it overflowed",
        )
    for extra in (slide.grid, slide.tissue):
        if extra is not None and len(extra) != len(coords):
            raise ForeignError(
                "count_mismatch", f"{name}: {len(extra):,} rows beside {len(coords):,} coordinates",
                "write the file again",
            )  # fmt: skip
    if not np.isfinite(coords).all() or coords.min() < 0:
        raise ForeignError(
            "off_lattice", f"{name}: coordinates are negative or not finite", "tile it again"
        )


def _unreadable(path: Path, error: BaseException) -> ForeignError:
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return ForeignError(
        "unreadable", f"{path.name}: {reason}", "copy it again; only plain arrays are read"
    )
