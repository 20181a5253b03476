"""`export`: stored slides as files of other tools: TRIDENT's HDF5, tensors, QuPath's GeoJSON."""

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.pathology.foreign import OWN_ATTRIBUTE, OWN_KEYS
from pipelines.pathology.progress import track
from pipelines.pathology.store import (
    SlideFeatures,
    check_content,
    read_index,
    read_slide,
    slide_folder,
)
from pipelines.shared.asides import aside_of, clean
from pipelines.shared.errors import InputError
from pipelines.shared.record import finish_run, open_run
from pipelines.shared.tables import Failure, write_failures

_ROWS_AT_ONCE = 10_000
# TRIDENT names a magnification by the first bound that mpp stays below
_MAGNIFICATIONS = ((0.16, 80), (0.2, 60), (0.3, 40), (0.6, 20), (1.2, 10), (2.4, 5))
# of little tissue to much: dark violet to yellow, as in the heatmaps
_COLOURS = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip
_PLAIN_COLOUR = (38, 130, 142)


def export_features(config: dict[str, Any]) -> int:
    """Write a file, or two, for every stored slide; 0, or 3 if some failed and are listed.

    A file that is newer than its slide is kept. Each slide is compared with its digest first, so
    that no damage is handed on. Raises InputError where nothing can be exported.
    """
    writers: dict[str, tuple[str, Callable[[Path, SlideFeatures], None]]] = {
        "trident": (".h5", write_trident),
        "pt": (".pt", write_tensors),
        "geojson": (".geojson", write_geojson),
    }
    if config["format"] not in writers:
        raise InputError(f"unknown format {config['format']!r}; use {', '.join(writers)}")
    ending, write = writers[config["format"]]
    store, out, dry = Path(config["features"]), Path(config["out"]), bool(config["dry_run"])
    if config["format"] == "trident":
        _import_h5py()
    slide_ids, encoder = _choose_slides(store, config["encoder_name"], config["format"])
    targets = {name: out / f"{name}{ending}" for name in slide_ids}
    todo = [name for name in slide_ids if not _is_newer(targets[name], slide_folder(store, name))]
    if dry:
        for name in todo:
            print(f"would write {targets[name]}")
        print(f"dry run: {len(todo):,} files to write, {len(slide_ids) - len(todo):,} are there")
        return 0
    open_run(out, config, volatile=("out", "dry_run"))
    clean(out)
    failures = []
    for name in track(todo, total=len(todo), label="export", enabled=True):
        folder = slide_folder(store, name)
        try:
            check_content(folder)
            write(targets[name], read_slide(folder, encoder))
        except InputError as error:
            remedy = "delete the stored slide and make it again"
            failures.append(Failure(name, str(folder), "damaged", str(error), remedy))
            print(f"failed: {name}: {error}")
    write_failures(out / "failures.csv", failures, id_column="slide_id")
    if len(failures) == len(slide_ids):
        raise InputError(f"no slide could be exported; {out / 'failures.csv'} says why of each")
    finish_run(out, {"slides": len(slide_ids) - len(failures), "failures": len(failures)})
    print(f"{len(todo) - len(failures):,} files written to {out}, {len(failures):,} failed")
    return 3 if failures else 0


def _choose_slides(store: Path, encoder: str | None, wanted: str) -> tuple[list[str], str | None]:
    """Ids of the slides to export, and of which encoder; GeoJSON holds no features."""
    index = read_index(store)
    if wanted == "geojson":
        encoder = None
    elif encoder is not None:
        index = index[index["encoder"] == encoder]
    elif index["slide_id"].duplicated().any():
        names = ", ".join(sorted(index["encoder"].unique()))
        raise InputError(f"{store} holds features of {names}: choose one by encoder_name=NAME")
    if index.empty:
        raise InputError(f"{store} holds no features of encoder_name={encoder}")
    return index["slide_id"].unique().tolist(), encoder


def write_trident(path: Path, slide: SlideFeatures) -> None:
    """Write `features` [N, E] and `coords` int64 [N, 2] as TRIDENT's `features_<encoder>/*.h5`.

    Rows stand in the order of the file they were imported from, if they were. What TRIDENT has no
    name for (the exact stride, the grid) is added, so that `import` gives back the same slide.
    """
    h5py = _import_h5py()
    order = _source_order(slide)
    features = slide.features()[order]

    def write(aside: Path) -> None:
        with h5py.File(aside, "w") as file:
            file.create_dataset("features", data=features)
            file["features"].attrs["encoder"] = slide.encoder
            file["features"].attrs["name"] = slide.slide_id
            file.create_dataset("coords", data=slide.xy0[order])
            file.create_dataset("grid", data=slide.grid[order])
            file.create_dataset("tissue", data=slide.tissue[order])
            for key, value in _trident_attributes(slide).items():
                file["coords"].attrs[key] = "None" if value is None else value

    _write_aside(path, write)


def write_tensors(path: Path, slide: SlideFeatures) -> None:
    """Write features [N, E] as one bare tensor, and corners int64 [N, 2] beside it in `coords/`.

    `torch.load(path, weights_only=True)` reads both; rows stand as in `write_trident`.
    """
    import torch

    order = _source_order(slide)
    coords = path.parent / "coords" / path.name
    _write_aside(coords, lambda aside: torch.save(torch.from_numpy(slide.xy0[order]), aside))
    features = torch.from_numpy(slide.features()[order])
    _write_aside(path, lambda aside: torch.save(features, aside))


def write_geojson(
    path: Path, slide: SlideFeatures, scores: Mapping[str, np.ndarray] | None = None
) -> None:
    """Write every tile as a closed square that QuPath reads: a FeatureCollection (RFC 7946).

    Corners are level-0 pixels counted from the part that the scanner filled, as QuPath counts them.
    Tiles are detections, coloured by their share of tissue where it is known. `scores` are a number
    [N] per tile each, written as measurements; then tiles are coloured by the tenth of the tiles
    that the first of them puts them in.
    """

    def write(aside: Path) -> None:
        with aside.open("w", encoding="utf-8") as file:
            file.write('{"type":"FeatureCollection","features":[\n')
            for start, lines in enumerate(_feature_lines(slide, scores or {})):
                file.write(",\n" if start else "")
                file.write(",\n".join(lines))
            file.write("\n]}\n")

    _write_aside(path, write)


def _feature_lines(slide: SlideFeatures, scores: Mapping[str, np.ndarray]) -> Iterator[list[str]]:
    """Yield runs of features as JSON; they are written by hand, for their number."""
    left, top = slide.attributes.get("bounds", [0, 0])[:2]
    first = slide.xy0 - np.array([left, top])
    last = np.rint(first + slide.tile0).astype(np.int64)
    classes = np.clip(np.nan_to_num(slide.tissue, nan=-1.0) * 10, -1, 9).astype(int)
    title = "Tissue"
    if scores:
        title, first_scores = next(iter(scores.items()))
        classes = np.argsort(np.argsort(first_scores, kind="stable")) * 10 // len(slide)
    heads = [_properties(number, title) for number in range(len(_COLOURS))]
    heads.append(_properties(None, title))
    keys = [json.dumps(name) for name in scores]
    measured = np.stack([*scores.values()], axis=1) if scores else np.zeros((len(slide), 0))
    for start in range(0, len(slide), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        columns = (
            first[rows], last[rows], slide.grid[rows], classes[rows], slide.tissue[rows],
            measured[rows],
        )  # fmt: skip
        yield [
            '{"type":"Feature","geometry":{"type":"Polygon","coordinates":'
            f"[[[{x},{y}],[{right},{y}],[{right},{bottom}],[{x},{bottom}],[{x},{y}]]]}},"
            f'{heads[number]},"measurements":{{"column":{col},"row":{row}'
            + (f',"tissue":{tissue:.4f}' if tissue >= 0 else "")
            + "".join(f",{key}:{value:.6g}" for key, value in zip(keys, values, strict=True))
            + "}}}"
            for (x, y), (right, bottom), (col, row), number, tissue, values in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]


def _properties(number: int | None, title: str) -> str:
    name = "Tile" if number is None else f"{title} {number / 10:.1f} to {number / 10 + 0.1:.1f}"
    colour = _PLAIN_COLOUR if number is None else _COLOURS[number]
    kind = {"name": name, "color": list(colour)}
    return f'"properties":{{"objectType":"detection","classification":{json.dumps(kind)}'


def _trident_attributes(slide: SlideFeatures) -> dict[str, object]:
    """What TRIDENT notes of coordinates: its own words again, or ours in its words."""
    noted = slide.attributes
    own = {key: noted.get(key) for key in OWN_KEYS} | {
        "tile0": slide.tile0,
        "encoder": slide.encoder,
        "encoder_fingerprint": slide.encoder_fingerprint,
    }
    source = noted.get("source", {})
    kept = source.get("attributes", {}).get("coords", {}) if source else {}
    if source.get("format") == "trident" and kept:
        return {**kept, OWN_ATTRIBUTE: json.dumps(own)}
    tile_px = noted.get("tile_px") or round(slide.tile0)
    tile_mpp = slide.tile0 * slide.mpp / tile_px
    overlap = (slide.tile0 - slide.pitch0) / slide.tile0 * tile_px
    return {
        "patch_size": int(tile_px),
        "patch_size_level0": round(slide.tile0),
        "level0_magnification": _magnification(slide.mpp),
        "target_magnification": _magnification(tile_mpp),
        "overlap": round(overlap),
        "name": slide.slide_id,
        "savetodir": None,
        "level0_width": slide.dimensions[0],
        "level0_height": slide.dimensions[1],
        OWN_ATTRIBUTE: json.dumps(own),
    }


def _magnification(mpp: float) -> int | None:
    """Name the magnification that TRIDENT takes such pixels for; None for coarser ones."""
    return next((name for bound, name in _MAGNIFICATIONS if mpp < bound), None)


def _source_order(slide: SlideFeatures) -> np.ndarray:
    rows = slide.source_rows()
    return np.arange(len(slide)) if rows is None else np.argsort(rows, kind="stable")


def _is_newer(target: Path, folder: Path) -> bool:
    try:
        return target.stat().st_mtime_ns > (folder / "zarr.json").stat().st_mtime_ns
    except OSError:
        return False


def _write_aside(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _import_h5py() -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError:
        raise InputError(
            "format=trident writes HDF5 and needs h5py; install it with: "
            "pip install -e '.[interchange]'"
        ) from None
