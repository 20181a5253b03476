"""From slide files to stored tile features, past every slide that fails.

Many slides and a cheap encoder: each process does whole slides. Few slides, or an encoder that
stays in this process (a network on a GPU): slides come one after another, and processes read the
tiles of each ahead of the encoder.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipelines.pathology.chunk_files import DamageError
from pipelines.pathology.encoding import TileEncoder
from pipelines.pathology.processes import TilePool, check_start, new_pool
from pipelines.pathology.progress import track
from pipelines.pathology.reading import Source, TileReader
from pipelines.pathology.slides import (
    SlideError,
    SlideFile,
    SlideReader,
    open_slide,
    slide_fingerprint,
)
from pipelines.pathology.store import (
    Provenance,
    is_current,
    read_provenance,
    read_slide,
    slide_folder,
    write_slide,
)
from pipelines.pathology.surveys import read_survey, survey_file
from pipelines.pathology.tile_features import (
    TileFeatures,
    TileRequest,
    encode_tiles,
    select_tiles,
)
from pipelines.pathology.tiling import TilePlan, Tiles, no_tiles, plan_tiles
from pipelines.shared.asides import clean
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure

_STORE_REMEDY = "delete this folder; the same command makes it again"
_SLIDES_PER_WORKER = 8  # fewer do not repay the start of a process


@dataclass(frozen=True, slots=True)
class SlideReport:
    """How a slide was read: by what (`source`, and `why`), and how many tiles of it.

    `num_reused` tiles had features already; `num_damaged` could not be read and are left out,
    `damage` says what the first of them met.
    """

    slide_id: str
    num_tiles: int
    num_reused: int
    num_damaged: int
    damage: str | None
    source: str
    why: str


@dataclass(frozen=True, slots=True)
class ExtractionReport:
    """What became of the slides, in their given order.

    `done` are the ids with current features, `num_reused` how many of them were there before;
    `read` tells of the others how they were read.
    """

    done: list[str]
    failures: list[Failure]
    num_reused: int
    read: list[SlideReport]


@dataclass(frozen=True, slots=True)
class _Job:
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
        return slide_folder(self.store, self.slide.slide_id)

    @property
    def request(self) -> TileRequest:
        return TileRequest(self.slide.path, self.mpp, self.plan, self.source)


Outcome = SlideReport | Failure


def extract_features(
    slides: Sequence[SlideFile],
    *,
    store: Path,
    plan: TilePlan,
    encoder: TileEncoder,
    mpps: Mapping[str, float] | None = None,
    workers: int | None = None,
    progress: bool = True,
    source: Source = "auto",
    new_thresholds: bool = False,
    surveys: Path | None = None,
) -> ExtractionReport:
    """Bring the store up to date for `slides`; a slide that fails is reported, not raised.

    Features that are current (same file, plan, encoder and given mpp) are kept. Those of a file
    that has changed are made anew. `mpps` gives um per pixel by slide id, above what `slides` say.
    `workers` defaults to one process per core; the result does not depend on it. `surveys` is a
    folder of surveys that `tile` made: tiles are chosen from these, with their edited outlines.

    Raises InputError where the store holds features of another encoder or plan: they are never
    mixed nor overwritten. With `new_thresholds`, plans that differ only in which tiles they choose
    are no others: tiles that have features keep them, and the rest are made.
    """
    given = mpps or {}
    jobs = [
        _Job(slide, store, plan, encoder, given.get(slide.slide_id, slide.mpp), source, surveys)
        for slide in slides
    ]
    _refuse_others(jobs, new_thresholds=new_thresholds)
    todo = [job for job in jobs if not _is_done(job)]
    store.mkdir(parents=True, exist_ok=True)
    clean(store)
    outcomes: dict[str, Outcome] = {}
    results = _run(todo, workers)
    for slide_id, outcome in track(results, total=len(todo), label="features", enabled=progress):
        outcomes[slide_id] = outcome
    failures = {key: value for key, value in outcomes.items() if isinstance(value, Failure)}
    ids = [slide.slide_id for slide in slides]
    return ExtractionReport(
        done=[slide_id for slide_id in ids if slide_id not in failures],
        failures=[failures[slide_id] for slide_id in ids if slide_id in failures],
        num_reused=len(jobs) - len(todo),
        read=[o for i in ids if isinstance(o := outcomes.get(i), SlideReport)],
    )


def stream_features(
    slides: Sequence[SlideFile],
    *,
    store: Path,
    plan: TilePlan,
    encoder: TileEncoder,
    mpps: Mapping[str, float] | None = None,
    workers: int | None = None,
    ahead: bool = True,
) -> Iterator[tuple[str, Outcome | None]]:
    """Yield the id of each slide when its features are there, or why they will not be.

    First those that are there already, with None, then the rest as they are made. Without `ahead`
    a slide is begun when the one before it has been taken, so that no more than one waits on disk;
    else whole slides may be made by several processes. Arguments and errors are otherwise those of
    `extract_features`.
    """
    given = mpps or {}
    jobs = [
        _Job(slide, store, plan, encoder, given.get(slide.slide_id, slide.mpp)) for slide in slides
    ]
    _refuse_others(jobs, new_thresholds=False)
    store.mkdir(parents=True, exist_ok=True)
    clean(store)
    there = {job.slide.slide_id: _is_done(job) for job in jobs}
    yield from ((slide_id, None) for slide_id, done in there.items() if done)
    todo = [job for job in jobs if not there[job.slide.slide_id]]
    if todo:
        yield from _run(todo, workers) if ahead else _run_by_tiles(todo, _num_processes(workers))


def expected_provenances(
    slides: Sequence[SlideFile],
    *,
    plan: TilePlan,
    encoder: TileEncoder,
    mpps: Mapping[str, float] | None = None,
) -> dict[str, dict[str, object]]:
    """What features of these slides would be made from, by slide id; of those that can be read."""
    found = {}
    for slide in slides:
        mpp = (mpps or {}).get(slide.slide_id, slide.mpp)
        try:
            provenance = _provenance(_Job(slide, Path(), plan, encoder, mpp))
        except OSError:
            continue
        found[slide.slide_id] = asdict(provenance)
    return found


def find_current(
    slides: Sequence[SlideFile],
    *,
    store: Path,
    plan: TilePlan,
    encoder: TileEncoder,
    new_thresholds: bool = False,
    surveys: Path | None = None,
) -> set[str]:
    """Return the ids of the slides whose features `extract_features` would keep.

    Raises InputError where it would.
    """
    jobs = [_Job(slide, store, plan, encoder, slide.mpp, surveys=surveys) for slide in slides]
    _refuse_others(jobs, new_thresholds=new_thresholds)
    return {job.slide.slide_id for job in jobs if _is_done(job)}


def _provenance(job: _Job) -> Provenance:
    return Provenance(
        slide_fingerprint=slide_fingerprint(job.slide.path),
        given_mpp=job.mpp,
        plan_hash=job.plan_id,
        encoder=job.encoder.name,
        encoder_fingerprint=job.encoder.fingerprint,
    )


def _refuse_others(jobs: Iterable[_Job], *, new_thresholds: bool) -> None:
    """Raise InputError where a slide's stored features are of another encoder or plan."""
    for job in jobs:
        held = read_provenance(job.folder) if job.folder.exists() else None
        if held is None:
            continue
        ours = (job.encoder.name, job.encoder.fingerprint)
        theirs = (held.get("encoder"), held.get("encoder_fingerprint"))
        if theirs != ours:
            difference = f"of encoder {_shown(theirs)}, not of {_shown(ours)}"
        elif held.get("plan_hash") != job.plan_id and not (new_thresholds and _same_grid(job)):
            difference = f"of tiles cut otherwise (there -> here): {_plan_difference(job)}"
        else:
            continue
        raise InputError(
            f"{job.folder} holds features {difference}; they are never mixed: give another "
            "features=FOLDER, or the settings that these were made with"
        )


def _shown(encoder: tuple[object, object]) -> str:
    name, fingerprint = encoder
    return f"{name} (fingerprint {str(fingerprint)[:12]})"


def _plan_difference(job: _Job) -> str:
    there, here = read_slide(job.folder).attributes.get("plan", {}), job.plan.params
    keys = [key for key in here if there.get(key) != here[key]]
    changes = ", ".join(f"{key} {there.get(key)} -> {here[key]}" for key in keys)
    return changes or "chosen from another survey"


def _same_grid(job: _Job) -> bool:
    return read_slide(job.folder).attributes.get("grid_hash") == job.plan.grid_hash


def _is_done(job: _Job) -> bool:
    """Tell whether a slide has the features that the job would make."""
    try:
        return job.folder.exists() and is_current(job.folder, _provenance(job))
    except OSError:  # the slide cannot be read: extraction will say why
        return False


def _num_processes(wanted: int | None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, wanted or cores or 1)


def _run(jobs: list[_Job], wanted: int | None) -> Iterator[tuple[str, Outcome]]:
    if not jobs:
        return iter(())
    processes = _num_processes(wanted)
    most = len(jobs) // _SLIDES_PER_WORKER if wanted is None else len(jobs)
    if jobs[0].encoder.in_workers and min(processes, most) > 1:
        return _run_by_slides(jobs, min(processes, most))
    return _run_by_tiles(jobs, processes)


def _run_by_tiles(jobs: list[_Job], processes: int) -> Iterator[tuple[str, Outcome]]:
    """One slide after another; the tiles of a large one are read in processes."""
    with TilePool(processes) as pool:
        for job in jobs:
            yield job.slide.slide_id, _extract_one(job, pool)


def _run_by_slides(jobs: list[_Job], workers: int) -> Iterator[tuple[str, Outcome]]:
    unfinished = {job.slide.slide_id: job for job in jobs}
    with new_pool(workers) as pool:
        check_start(pool)
        try:
            for future in as_completed([pool.submit(_extract_named, job) for job in jobs]):
                slide_id, outcome = future.result()
                del unfinished[slide_id]
                yield slide_id, outcome
        except BrokenProcessPool:
            pass  # one slide killed its worker; below each gets a process of its own
        finally:
            pool.shutdown(cancel_futures=True)
    yield from _run_apart(unfinished.values())


def _run_apart(jobs: Iterable[_Job]) -> Iterator[tuple[str, Outcome]]:
    for job in jobs:
        with new_pool(1) as pool:
            try:
                yield pool.submit(_extract_named, job).result()
            except BrokenProcessPool:
                yield job.slide.slide_id, _died(job)


def _extract_named(job: _Job) -> tuple[str, Outcome]:
    return job.slide.slide_id, _extract_one(job, TilePool(1))


def _extract_one(job: _Job, pool: TilePool) -> Outcome:
    slide = job.slide
    try:
        return _extract(job, pool)
    except SlideError as error:
        return Failure(slide.slide_id, str(slide.path), error.status, error.reason, error.remedy)
    except BrokenProcessPool:
        pool.discard()
        return _died(job)
    except DamageError as error:
        return Failure(slide.slide_id, str(job.folder), "damaged", str(error), _STORE_REMEDY)
    except InputError:
        raise  # of the encoder: every slide would meet it
    except OSError as error:
        reason = f"{error.strerror or error} ({error.filename or job.folder})"
        return _failed(job, reason, "make room, or allow it; the same command goes on from here")
    except Exception as error:
        return _failed(job, f"{type(error).__name__}: {error}", "report this with the file")


def _died(job: _Job) -> Failure:
    reason = "the process reading it died (out of memory, or a crash in a library)"
    return _failed(job, reason, "try it alone with workers=1 and watch its memory")


def _failed(job: _Job, reason: str, remedy: str) -> Failure:
    return Failure(job.slide.slide_id, str(job.slide.path), "failed", reason, remedy)


def _extract(job: _Job, pool: TilePool) -> SlideReport:
    provenance = _provenance(job)
    with open_slide(job.slide.path, mpp=job.mpp) as slide:
        pool.prepare(_foreseen_tiles(slide, job.plan))
        tiles = _choose_tiles(job, slide, provenance)
        held = _held_rows(job, provenance, tiles)
        missing = np.flatnonzero(held < 0)
        with TileReader(slide, job.plan, source=job.source) as reader:
            made = encode_tiles(
                select_tiles(tiles, missing),
                job.request,
                job.encoder,
                reader=reader,
                pool=pool.for_tiles(len(missing)),
                processes=pool.processes,
            )
            source = reader.source
        kept, features = _join(job, tiles, held, made)
        write_slide(
            job.folder,
            job.slide.slide_id,
            slide,
            kept,
            features,
            plan=job.plan,
            encoder=job.encoder,
            provenance=provenance,
        )
    return SlideReport(
        slide_id=job.slide.slide_id,
        num_tiles=len(kept),
        num_reused=len(tiles) - len(missing),
        num_damaged=made.num_damaged,
        damage=made.damage,
        source=source.name,
        why=source.why,
    )


def _foreseen_tiles(slide: SlideReader, plan: TilePlan) -> int:
    """About how many tiles there will be: half of a slide is tissue."""
    width, height = slide.bounds[2:]
    return int(width * height * (slide.mpp / (plan.tile_px * plan.mpp)) ** 2 / 2)


def _choose_tiles(job: _Job, slide: SlideReader, provenance: Provenance) -> Tiles:
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


def _held_rows(job: _Job, provenance: Provenance, tiles: Tiles) -> np.ndarray:
    """Return the stored row of each tile's features, int64 [N]; -1 where there are none.

    A tile is known by its cell: stored rows count if they differ in the plan's thresholds alone.
    """
    rows = np.full(len(tiles), -1, dtype=np.int64)
    held = read_provenance(job.folder) if job.folder.exists() else None
    if held is None or {**held, "plan_hash": job.plan_id} != asdict(provenance):
        return rows
    if not _same_grid(job):
        return rows
    stored = read_slide(job.folder).grid
    _, here, there = np.intersect1d(_cells(tiles.grid), _cells(stored), return_indices=True)
    rows[here] = there
    return rows


def _cells(grid: np.ndarray) -> np.ndarray:
    """One number int64 [N] for each (column, row)."""
    return grid[:, 0].astype(np.int64) << 32 | grid[:, 1].astype(np.int64)


def _join(
    job: _Job, tiles: Tiles, held: np.ndarray, made: TileFeatures
) -> tuple[Tiles, np.ndarray]:
    """Put stored and new features in the order of the tiles; tiles without any are left out."""
    if (held < 0).all():
        return made.tiles, made.features
    stored = read_slide(job.folder).features()
    dtype = np.result_type(stored, made.features)
    features = np.empty((len(tiles), made.features.shape[1]), dtype=dtype)
    features[held >= 0] = stored[held[held >= 0]]
    new = np.isin(_cells(tiles.grid), _cells(made.tiles.grid))
    features[new] = made.features
    present = new | (held >= 0)
    return select_tiles(tiles, present), features[present]
