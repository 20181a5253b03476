"""`import`: tile features of other tools into the store, past every slide that is not clear."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.pathology.foreign import (
    FORMATS,
    ForeignError,
    ForeignSlide,
    Given,
    Item,
    Unit,
    find_items,
    read_foreign,
)
from pipelines.pathology.lattice import fit_lattice, snap_to_lattice
from pipelines.pathology.ordering import hilbert_order
from pipelines.pathology.progress import track
from pipelines.pathology.resolution import SlideError
from pipelines.pathology.slides import (
    SLIDE_ENDINGS,
    find_slides,
    open_slide,
    slide_fingerprint,
)
from pipelines.pathology.store import (
    SCHEMA,
    encoder_entry,
    is_current,
    read_provenances,
    slide_folder,
    write_group,
    write_index,
)
from pipelines.shared.errors import InputError
from pipelines.shared.record import finish_run, make_folder, open_run
from pipelines.shared.tables import Failure, read_table, write_failures

_REVISION = 1
_ID_COLUMNS = ("slide_id", "wsi", "sample_id")
_MPP_COLUMNS = ("mpp", "spacing_at_level_0")
_LEAST_MPP, _MOST_MPP = 0.01, 100.0


@dataclass(frozen=True, slots=True)
class _SlideFacts:
    """What a slide's own file says: mpp and its source, size and filled part in level-0 pixels."""

    mpp: float
    source: str
    dimensions: tuple[int, int]
    bounds: tuple[int, int, int, int]


def import_features(config: dict[str, Any]) -> int:
    """Import every slide of `source`; 0, or 3 if some were refused and are listed.

    Slides that are there already, from the same files and with the same settings, are kept. With
    `dry_run` all is read and checked and nothing written. Raises InputError if nothing could be
    imported.
    """
    given, source = _given(config), Path(config["source"])
    resolutions = _Resolutions(config)
    patches = Path(config["patches"]) if config["patches"] else None
    items, failures = _without_duplicates(find_items(source, config["format"], patches))
    out, dry = Path(config["out"]), bool(config["dry_run"])
    store = Path(config["features"] or out / "features")
    if not dry:
        _open_run(out, config)
    done, kept = 0, 0
    importer = _Importer(given, bool(config["snap"]), resolutions, store, dry)
    for item in track(items, total=len(items), label="import", enabled=not dry):
        try:
            kept += not importer.run(item)
            done += 1
        except ForeignError as error:
            failures.append(_failure(item, error))
        except OSError as error:
            raise InputError(
                f"{store} cannot be written ({error.strerror}); make room, or give another "
                "features=: the same command goes on from here"
            ) from error
    for failure in failures:
        print(f"refused: {failure.id}: {failure.status}: {failure.reason}; {failure.remedy}")
    if not dry:
        write_failures(out / "failures.csv", failures, id_column="slide_id")
        write_index(store)
    if not done:
        where = "above" if dry else f"in {out / 'failures.csv'}"
        raise InputError(f"no slide of {source} can be imported; the reasons stand {where}")
    if dry:
        print(f"dry run: {done:,} slides would be imported to {store}, {len(failures):,} refused")
        return 3 if failures else 0
    finish_run(out, {"slides": done, "failures": len(failures)})
    print(f"{done:,} slides in {store} ({kept:,} were there), {len(failures):,} refused")
    print(f"train on them with  python -m pipelines.pathology train features={store} labels=TABLE")
    return 3 if failures else 0


def _open_run(out: Path, config: dict[str, Any]) -> None:
    """Begin again in `out`: every slide notes its own settings, so all of them may change."""
    make_folder(out)
    (out / "metrics.json").unlink(missing_ok=True)
    open_run(out, config, volatile=tuple(config))


def _given(config: dict[str, Any]) -> Given:
    """Check what the command line says of the files."""
    if config["format"] not in FORMATS:
        raise InputError(f"unknown format {config['format']!r}; use {', '.join(FORMATS)}")
    for key in ("tile", "stride", "mpp", "tile_px"):
        value = config[key]
        if value is not None and not (_is_number(value) and 0 < value < math.inf):
            raise InputError(f"{key} takes a positive number; got {value!r}")
    if config["tile_px"] is not None and not isinstance(config["tile_px"], int):
        raise InputError(f"tile_px takes a whole number of pixels; got {config['tile_px']!r}")
    return Given(
        unit=_unit(config["unit"]),
        tile=config["tile"],
        stride=config["stride"],
        tile_px=config["tile_px"],
        encoder=None if config["encoder_name"] is None else str(config["encoder_name"]),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unit(value: object) -> Unit | None:
    if value is None or value == "level0_px":
        return value
    if value == "um":
        return 1.0
    if isinstance(value, int | float) and _is_number(value) and 0 < value < math.inf:
        return float(value)
    raise InputError(
        f"unit is level0_px, um, or a number of um (0.5 for pixels of 0.5 um); got {value!r}"
    )


def _without_duplicates(items: list[Item]) -> tuple[list[Item], list[Failure]]:
    """Split off the items whose id another one has: neither may take the other's place."""
    paths: dict[str, list[Path]] = {}
    for item in items:
        paths.setdefault(item.slide_id, []).append(item.path)
    single = [item for item in items if len(paths[item.slide_id]) == 1]
    failures = [
        Failure(
            item.slide_id,
            str(item.path),
            "duplicate_id",
            f"the id is also that of {next(p for p in paths[item.slide_id] if p != item.path)}",
            "give one folder at a time (one encoder, one class), each with a features= of its own",
        )
        for item in items
        if len(paths[item.slide_id]) > 1
    ]
    return single, failures


def _failure(item: Item, error: ForeignError) -> Failure:
    return Failure(item.slide_id, str(item.path), error.status, error.reason, error.remedy)


class _Resolutions:
    """Micrometres per level-0 pixel of each slide: given, from a table, or from its own file."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.given: float | None = config["mpp"]
        self.table = _read_mpps(Path(config["mpps"])) if config["mpps"] else {}
        slides = find_slides(config["slides"]) if config["slides"] else []
        self.files = {slide.slide_id: slide.path for slide in slides}

    def facts(self, slide_id: str) -> _SlideFacts | None:
        """Read what the slide's file says; None without a file."""
        path = self.files.get(slide_id)
        if path is None:
            return None
        try:
            with open_slide(path, mpp=self.given or self.table.get(slide_id)) as reader:
                return _SlideFacts(reader.mpp, reader.mpp_source, reader.dimensions, reader.bounds)
        except SlideError as error:
            raise ForeignError(error.status, f"{path}: {error.reason}", error.remedy) from error

    def settings(self, slide_id: str) -> list[object]:
        """What the answer depends on: the stored slide is made anew when it changes."""
        path = self.files.get(slide_id)
        known = None if path is None else slide_fingerprint(path)
        return [self.given, self.table.get(slide_id), known]

    def find(
        self, slide_id: str, facts: _SlideFacts | None, slide: ForeignSlide
    ) -> tuple[float, str]:
        """Return mpp and its source; raises ForeignError `missing_mpp` and `mpp_suspect`."""
        own = slide.own or {}
        for value, source in (
            (self.given, "given"),
            (self.table.get(slide_id), "table"),
            (facts.mpp if facts else None, facts.source if facts else ""),
            (slide.mpp, own.get("mpp_source", slide.format)),
        ):
            if value is not None:
                return _plausible(float(value)), source
        raise ForeignError(
            "missing_mpp",
            f"{slide.format} files do not say how large the slide's pixels are",
            "give slides=FOLDER with the slides, mpps=TABLE (slide_id, mpp), or mpp= of all",
        )


def _plausible(mpp: float) -> float:
    if not _LEAST_MPP <= mpp <= _MOST_MPP:
        raise ForeignError(
            "mpp_suspect",
            f"a pixel of {mpp:g} um is no slide's",
            "give the right mpp= in micrometres",
        )
    return mpp


def _read_mpps(path: Path) -> dict[str, float]:
    """Read a table of mpp by slide id; TRIDENT's (wsi, mpp) and slide2vec's columns do too."""
    table = read_table(path)
    key = next((name for name in _ID_COLUMNS if name in table), None)
    column = next((name for name in _MPP_COLUMNS if name in table), None)
    if key is None or column is None:
        raise InputError(
            f"{path} needs the columns slide_id and mpp; it has "
            f"{', '.join(map(repr, table.columns))}"
        )
    given = table[table[column] != ""]
    values = pd.to_numeric(given[column], errors="coerce")
    mpps: dict[str, float] = {}
    for row, name, text, value in zip(given.index, given[key], given[column], values, strict=True):
        slide_id = Path(name).stem if Path(name).suffix.lower() in SLIDE_ENDINGS else name
        if not value > 0 or mpps.setdefault(slide_id, float(value)) != value:
            raise InputError(
                f"{path}, row {row}: {column} of {name!r} must be one positive number; got {text!r}"
            )
    return mpps


@dataclass(frozen=True, slots=True)
class _Importer:
    given: Given
    snap: bool
    resolutions: _Resolutions
    store: Path
    dry: bool

    def run(self, item: Item) -> bool:
        """Bring one slide into the store; False if it is there already.

        Raises ForeignError where its files do not say all that is needed.
        """
        folder = slide_folder(self.store, item.slide_id)
        provenance = self._provenance(item)
        if is_current(folder, provenance):
            return False
        if any("imported" not in earlier for earlier in read_provenances(folder).values()):
            raise ForeignError(
                "exists",
                f"{folder} holds features that were not imported",
                "give another features= or out=",
            )
        slide = read_foreign(item, self.given)
        facts = self.resolutions.facts(item.slide_id)
        mpp, mpp_source = self.resolutions.find(item.slide_id, facts, slide)
        arrays, geometry = place_tiles(
            slide,
            mpp,
            dimensions=facts.dimensions if facts else None,
            certain=self.given.stride is not None,
            snap=self.snap,
        )
        name = encoder_name(slide)
        entry = encoder_entry(_fingerprint(slide), provenance, {"source": slide.format})
        known = {"mpp": mpp, "mpp_source": mpp_source, "encoders": {name: entry}}
        if facts is not None:
            known["bounds"] = list(facts.bounds)
        attributes = {**_attributes(item, slide), **geometry, **known}
        if self.dry:
            print(f"would import {_sentence(attributes)}")
        else:
            write_group(folder, attributes, arrays)
        return True

    def _provenance(self, item: Item) -> dict[str, object]:
        """All that the stored slide depends on, as JSON keeps it."""
        try:
            files = {
                role: slide_fingerprint(path) for role, path in item.files.items() if path.is_file()
            }
        except OSError as error:
            raise ForeignError(
                "unreadable", f"{item.path}: {error.strerror}", "allow it to be read, or copy it"
            ) from error
        settings = [asdict(self.given), self.snap, self.resolutions.settings(item.slide_id)]
        return {"imported": item.format, "files": files, "given": settings, "revision": _REVISION}


def place_tiles(
    slide: ForeignSlide,
    mpp: float,
    *,
    dimensions: tuple[int, int] | None = None,
    certain: bool = False,
    snap: bool = False,
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Put a foreign slide's tiles on the integer grid, in Hilbert order: arrays and attributes.

    `mpp` is micrometres per level-0 pixel. `dimensions` are the slide's, where they are known.
    Raises ForeignError as `fit_lattice` does, and `outside_slide`.
    """
    if slide.grid is not None:
        grid, origin = slide.grid, None
    elif snap:
        grid, origin = snap_to_lattice(slide.coords, slide.stride)
    else:
        grid, origin = fit_lattice(
            slide.coords, slide.stride, skipped=slide.skipped, certain=certain
        )
    scale = 1.0 if slide.unit == "level0_px" else slide.unit / mpp
    xy0 = slide.coords if scale == 1.0 else slide.coords.astype(np.float64) * scale
    xy0 = xy0.astype(np.int64) if xy0.dtype.kind in "iu" else np.rint(xy0).astype(np.int64)
    tile0 = slide.tile * scale
    size = dimensions or slide.dimensions
    if size is not None and (xy0 >= np.array(size)).any():
        row = int(np.argmax((xy0 >= np.array(size)).any(axis=1)))
        raise ForeignError(
            "outside_slide",
            f"row {row} begins at {tuple(xy0[row].tolist())}, the slide is {tuple(size)} px",
            "the unit, the mpp or the slide is another: check unit=, mpp= and slides=",
        )
    order = hilbert_order(grid)
    features = slide.features[order]
    tissue = np.full(len(order), np.nan) if slide.tissue is None else slide.tissue[order]
    arrays = {
        "grid": grid[order].astype(np.int32),
        "xy0": xy0[order],
        "tissue": tissue.astype(np.float32),
        f"features/{encoder_name(slide)}": features,
        "source_row": order,
    }
    least = np.ceil(xy0.max(axis=0) + tile0).astype(np.int64)
    geometry: dict[str, object] = {
        "pitch0": slide.stride * scale,
        "tile0": tile0,
        "dimensions": list(size) if size is not None else least.tolist(),
        "dimensions_source": "slide" if dimensions else slide.format if size else "tiles",
        "snapped": snap,
    }
    if origin is not None:
        geometry["origin0"] = (origin * scale).tolist()
    return arrays, geometry


def encoder_name(slide: ForeignSlide) -> str:
    """Name of the encoder, fit for a path; `unnamed` where nobody says it."""
    name = slide.encoder or "unnamed"
    return "".join(sign if sign.isalnum() or sign in "-_." else "_" for sign in name).strip(".")


def _fingerprint(slide: ForeignSlide) -> str:
    known = f"imported:{encoder_name(slide)}:{slide.features.shape[1]}"
    return str((slide.own or {}).get("encoder_fingerprint", known))


def _attributes(item: Item, slide: ForeignSlide) -> dict[str, object]:
    own = slide.own or {}
    plan = json.dumps(slide.plan, sort_keys=True).encode()
    return {
        "schema": SCHEMA,
        "slide_id": item.slide_id,
        "plan": slide.plan,
        "plan_hash": own.get("plan_hash", hashlib.sha256(plan).hexdigest()[:16]),
        "tile_px": slide.tile_px,
        "order": "hilbert",
        "num_tiles": len(slide.features),
        "source": {
            "format": slide.format,
            "files": [path.name for path in item.files.values()],
            "encoder": slide.encoder,
            "attributes": slide.attributes,
        },
    }


def _sentence(attributes: dict[str, Any]) -> str:
    um = attributes["tile0"] * attributes["mpp"]
    return (
        f"{attributes['slide_id']}: {attributes['source']['format']}, "
        f"{attributes['num_tiles']:,} tiles of {attributes['tile0']:g} px ({um:.4g} um) every "
        f"{attributes['pitch0']:g} px, {attributes['mpp']:.4g} um/px ({attributes['mpp_source']}), "
        f"encoder {', '.join(attributes['encoders'])}"
    )
