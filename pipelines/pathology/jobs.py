"""One slide to embed: what its features depend on, what the store holds of it, what is missing."""

import hashlib
import json
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipelines.pathology.encoding import TileEncoder
from pipelines.pathology.reading import Source
from pipelines.pathology.slides import SlideError, SlideFile, SlideReader, slide_fingerprint
from pipelines.pathology.store import (
    Provenance,
    SlideFeatures,
    is_current,
    read_provenances,
    read_slide,
    slide_folder,
)
from pipelines.pathology.surveys import read_survey, survey_file
from pipelines.pathology.tile_features import TileFeatures, TileRequest, select_tiles
from pipelines.pathology.tiling import TilePlan, Tiles, no_tiles, plan_tiles
from pipelines.pathology.tissue import TissueMask
from pipelines.shared.errors import InputError

_OF_ENCODER = ("encoder", "encoder_fingerprint")


@dataclass(frozen=True, slots=True)
class Job:
    """A slide, the tiles to cut from it and the encoder for them; `mpp` outweighs the file's."""

    slide: SlideFile
    store: Path
    plan: TilePlan
    encoder: TileEncoder
    mpp: float | None
    source: Source = "auto"
    surveys: Path | None = None

    @property
    def plan_id(self) -> str:
        """What decides the tiles: the plan, and the slide's survey where one is given."""
        if self.surveys is None:
            return self.plan.hash
        path = survey_file(self.surveys, self.slide.slide_id)
        content = path.read_bytes() if path.is_file() else b""
        return f"{self.plan.hash}-{hashlib.sha256(content).hexdigest()[:16]}"

    @property
    def folder(self) -> Path:
        """Where the slide stands in the store."""
        return slide_folder(self.store, self.slide.slide_id)

    @property
    def request(self) -> TileRequest:
        """What worker processes need."""
        return TileRequest(self.slide.path, self.mpp, self.plan, self.source)

    def provenance(self) -> Provenance:
        """What the features depend on; raises OSError where the slide cannot be read."""
        return Provenance(
            slide_fingerprint=slide_fingerprint(self.slide.path),
            given_mpp=self.mpp,
            plan_hash=self.plan_id,
            encoder=self.encoder.name,
            encoder_fingerprint=self.encoder.fingerprint,
        )

    def is_done(self) -> bool:
        """Tell whether the store has the features that the job would make."""
        try:
            return self.folder.exists() and is_current(self.folder, self.provenance())
        except OSError:  # the slide cannot be read: extraction will say why
            return False


def refuse_others(jobs: Iterable[Job], *, new_thresholds: bool) -> None:
    """Raise InputError where what the store holds of a slide does not go with the job's features.

    Encoders of one slide share its tiles, so the plan must be theirs. With `new_thresholds` a
    single encoder's tiles may be chosen anew from the same grid.
    """
    for job in jobs:
        held = read_provenances(job.folder) if job.folder.exists() else {}
        difference = _difference(job, held, new_thresholds=new_thresholds) if held else None
        if difference is not None:
            raise InputError(
                f"{job.folder} holds features {difference}; they are never mixed: give another "
                "features=FOLDER, or the settings that these were made with"
            )


def choose_tiles(job: Job, slide: SlideReader, provenance: Provenance) -> Tiles:
    """Choose from the slide's survey where surveys are given, else from one made now.

    Raises SlideError `no_survey` and `stale_survey`, and what `plan_tiles` does.
    """
    if job.surveys is None:
        return plan_tiles(slide, job.plan)
    path = survey_file(job.surveys, job.slide.slide_id)
    remedy = f"run `tile` with these slides, tile_px and mpp, and its out= above {job.surveys}"
    try:
        with np.load(path, allow_pickle=False) as arrays:
            made_from = json.loads(str(arrays["about"]))["made_from"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SlideError("no_survey", f"no survey can be read at {path}", remedy) from error
    wanted = {
        "slide": provenance.slide_fingerprint,
        "given_mpp": job.mpp,
        "grid_hash": job.plan.grid_hash,
    }
    changed = [key for key, value in wanted.items() if made_from.get(key) != value]
    survey = read_survey(path, made_from) if not changed else None
    if survey is None:
        reason = f"the survey {path} is of another {' and '.join(changed) or 'version'}"
        raise SlideError("stale_survey", reason, remedy)
    tiles = survey.choose(job.plan)
    if len(tiles) == 0:
        raise no_tiles(survey, job.plan)
    return tiles


def tiles_of_others(job: Job, provenance: Provenance) -> Tiles | None:
    """Return the stored tiles where other encoders have embedded them and the job's has not."""
    held = read_provenances(job.folder) if job.folder.exists() else {}
    ours = _of_slide(asdict(provenance))
    if not held or job.encoder.name in held or any(_of_slide(p) != ours for p in held.values()):
        return None
    stored = read_slide(job.folder)
    mask, overview = stored.tissue_mask(), stored.overview()
    scale = (stored.dimensions[0] / mask.shape[1], stored.dimensions[1] / mask.shape[0])
    found = TissueMask(mask, overview, scale, float("nan"), "stored")
    return Tiles(stored.grid, stored.xy0, stored.tissue, stored.pitch0, found)


def held_rows(job: Job, provenance: Provenance, tiles: Tiles) -> np.ndarray:
    """Return the stored row of each tile's features, int64 [N]; -1 where there are none.

    A tile is known by its cell: stored rows count if they differ in the plan's thresholds alone.
    """
    rows = np.full(len(tiles), -1, dtype=np.int64)
    held = read_provenances(job.folder).get(job.encoder.name) if job.folder.exists() else None
    if held is None or {**held, "plan_hash": job.plan_id} != asdict(provenance):
        return rows
    if not _same_grid(job):
        return rows
    _, here, there = np.intersect1d(
        _cells(tiles.grid), _cells(_stored(job).grid), return_indices=True
    )
    rows[here] = there
    return rows


def join_features(
    job: Job, tiles: Tiles, held: np.ndarray, made: TileFeatures
) -> tuple[Tiles, np.ndarray]:
    """Put stored and new features in the order of the tiles; tiles without any are left out."""
    if (held < 0).all():
        return made.tiles, made.features
    stored = _stored(job).features()
    dtype = np.result_type(stored, made.features)
    features = np.empty((len(tiles), made.features.shape[1]), dtype=dtype)
    features[held >= 0] = stored[held[held >= 0]]
    new = np.isin(_cells(tiles.grid), _cells(made.tiles.grid))
    features[new] = made.features
    present = new | (held >= 0)
    return select_tiles(tiles, present), features[present]


def _difference(
    job: Job, held: dict[str, dict[str, object]], *, new_thresholds: bool
) -> str | None:
    """Say why features of the job cannot stand beside or in the place of those held."""
    of = " and ".join(held)
    if any("imported" in provenance for provenance in held.values()):
        return f"of encoder {of}, imported from files of another tool, which cut its own tiles"
    own = held.get(job.encoder.name)
    if own is not None and own["encoder_fingerprint"] != job.encoder.fingerprint:
        return f"of {_shown(own)}, not of {_shown(asdict(job.provenance()))}"
    others = [name for name in held if name != job.encoder.name]
    if any(p["plan_hash"] != job.plan_id for p in held.values()):
        if new_thresholds and _same_grid(job) and not others:
            return None
        return f"of encoder {of}, of tiles cut otherwise (there -> here): {_plan_difference(job)}"
    if others and any(_slide_changed(job, held[name]) for name in others):
        return f"of encoder {of}, of an earlier file or another mpp of this slide"
    return None


def _slide_changed(job: Job, held: dict[str, object]) -> bool:
    try:
        return _of_slide(asdict(job.provenance())) != _of_slide(held)
    except OSError:  # the slide cannot be read: extraction will say why
        return False


def _of_slide(provenance: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in provenance.items() if key not in _OF_ENCODER}


def _shown(provenance: dict[str, object]) -> str:
    fingerprint = str(provenance["encoder_fingerprint"])[:12]
    return f"encoder {provenance['encoder']} (fingerprint {fingerprint})"


def _plan_difference(job: Job) -> str:
    there, here = _stored(job).attributes.get("plan", {}), job.plan.params
    keys = [key for key in here if there.get(key) != here[key]]
    changes = ", ".join(f"{key} {there.get(key)} -> {here[key]}" for key in keys)
    return changes or "chosen from another survey (tiles=)"


def _same_grid(job: Job) -> bool:
    return _stored(job).attributes.get("grid_hash") == job.plan.grid_hash


def _stored(job: Job) -> SlideFeatures:
    held = read_provenances(job.folder)
    return read_slide(job.folder, job.encoder.name if job.encoder.name in held else None)


def _cells(grid: np.ndarray) -> np.ndarray:
    """One number int64 [N] for each (column, row)."""
    return grid[:, 0].astype(np.int64) << 32 | grid[:, 1].astype(np.int64)
