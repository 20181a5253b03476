"""From slide files to stored tile features, past every slide that fails.

Many slides and a cheap encoder: each process does whole slides. Few slides, or an encoder that
stays in this process (a network on a GPU): slides come one after another, and processes read the
tiles of each ahead of the encoder.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipelines.pathology.chunk_files import DamageError
from pipelines.pathology.encoding import TileEncoder
from pipelines.pathology.jobs import (
    Job,
    choose_tiles,
    held_rows,
    join_features,
    refuse_others,
    tiles_of_others,
)
from pipelines.pathology.processes import TilePool, start_pool
from pipelines.pathology.progress import track
from pipelines.pathology.reading import DAMAGED_REMEDY, Source, TileReader
from pipelines.pathology.slides import SlideError, SlideFile, SlideReader, open_slide
from pipelines.pathology.store_writer import add_features, write_slide
from pipelines.pathology.tile_features import encode_tiles, select_tiles
from pipelines.pathology.tiling import TilePlan
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

    Another encoder's features of the same tiles stay beside them. Raises InputError where the store
    holds features of other tiles, or of other weights of this encoder: they are never mixed nor
    overwritten. With `new_thresholds`, plans that differ only in which tiles they choose
    are no others: tiles that have features keep them, and the rest are made.
    """
    given = mpps or {}
    jobs = [
        Job(slide, store, plan, encoder, given.get(slide.slide_id, slide.mpp), source, surveys)
        for slide in slides
    ]
    refuse_others(jobs, new_thresholds=new_thresholds)
    todo = [job for job in jobs if not job.is_done()]
    store.mkdir(parents=True, exist_ok=True)
    clean(store)
    outcomes: dict[str, Outcome] = {}
    results = _run(todo, workers, show_tiles=progress)
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
    surveys: Path | None = None,
) -> Iterator[tuple[str, Outcome | None]]:
    """Yield the id of each slide when its features are there, or why they will not be.

    First those that are there already, with None, then the rest as they are made. Without `ahead`
    a slide is begun when the one before it has been taken, so that no more than one waits on disk;
    else whole slides may be made by several processes. Arguments and errors are otherwise those of
    `extract_features`.
    """
    given = mpps or {}
    jobs = [
        Job(slide, store, plan, encoder, given.get(slide.slide_id, slide.mpp), surveys=surveys)
        for slide in slides
    ]
    refuse_others(jobs, new_thresholds=False)
    store.mkdir(parents=True, exist_ok=True)
    clean(store)
    there = {job.slide.slide_id: job.is_done() for job in jobs}
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
    surveys: Path | None = None,
) -> dict[str, dict[str, object]]:
    """What features of these slides would be made from, by slide id; of those that can be read."""
    found = {}
    for slide in slides:
        mpp = (mpps or {}).get(slide.slide_id, slide.mpp)
        try:
            provenance = Job(slide, Path(), plan, encoder, mpp, surveys=surveys).provenance()
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
    jobs = [Job(slide, store, plan, encoder, slide.mpp, surveys=surveys) for slide in slides]
    refuse_others(jobs, new_thresholds=new_thresholds)
    return {job.slide.slide_id for job in jobs if job.is_done()}


def _num_processes(wanted: int | None) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, wanted or cores or 1)


def _run(
    jobs: list[Job], wanted: int | None, *, show_tiles: bool = False
) -> Iterator[tuple[str, Outcome]]:
    if not jobs:
        return iter(())
    processes = _num_processes(wanted)
    most = len(jobs) // _SLIDES_PER_WORKER if wanted is None else len(jobs)
    if jobs[0].encoder.in_workers and min(processes, most) > 1:
        return _run_by_slides(jobs, min(processes, most))
    return _run_by_tiles(jobs, processes, show_tiles=show_tiles)


def _run_by_tiles(
    jobs: list[Job], processes: int, *, show_tiles: bool = False
) -> Iterator[tuple[str, Outcome]]:
    """One slide after another; the tiles of a large one are read in processes."""
    with TilePool(processes) as pool:
        for job in jobs:
            yield job.slide.slide_id, _extract_one(job, pool, show_tiles=show_tiles)


def _run_by_slides(jobs: list[Job], workers: int) -> Iterator[tuple[str, Outcome]]:
    unfinished = {job.slide.slide_id: job for job in jobs}
    with start_pool(workers) as pool:
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


def _run_apart(jobs: Iterable[Job]) -> Iterator[tuple[str, Outcome]]:
    for job in jobs:
        with start_pool(1) as pool:
            try:
                yield pool.submit(_extract_named, job).result()
            except BrokenProcessPool:
                yield job.slide.slide_id, _died(job)


def _extract_named(job: Job) -> tuple[str, Outcome]:
    return job.slide.slide_id, _extract_one(job, TilePool(1))


def _extract_one(job: Job, pool: TilePool, *, show_tiles: bool = False) -> Outcome:
    slide = job.slide
    try:
        return _extract(job, pool, show_tiles=show_tiles)
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


def _died(job: Job) -> Failure:
    reason = "the process reading it died (out of memory, or a crash in a library)"
    return _failed(job, reason, "try it alone with workers=1 and watch its memory")


def _failed(job: Job, reason: str, remedy: str) -> Failure:
    return Failure(job.slide.slide_id, str(job.slide.path), "failed", reason, remedy)


def _extract(job: Job, pool: TilePool, *, show_tiles: bool) -> SlideReport:
    with open_slide(job.slide.path, mpp=job.mpp) as slide:  # says best what is wrong with a file
        provenance = job.provenance()
        pool.prepare(_foreseen_tiles(slide, job.plan))
        shared = tiles_of_others(job, provenance)
        tiles = shared or choose_tiles(job, slide, provenance)
        held = held_rows(job, provenance, tiles)
        missing = np.flatnonzero(held < 0)
        with TileReader(slide, job.plan, source=job.source) as reader:
            made = encode_tiles(
                select_tiles(tiles, missing),
                job.request,
                job.encoder,
                reader=reader,
                pool=pool.for_tiles(len(missing)),
                processes=pool.processes,
                label=job.slide.slide_id if show_tiles else None,
            )
            source = reader.source
        kept, features = join_features(job, tiles, held, made)
        reading = {
            "num_damaged": made.num_damaged,
            "damage": made.damage,
            "source": source.name,
            "why": source.why,
        }
        if shared is None:
            write_slide(
                job.folder,
                job.slide.slide_id,
                slide,
                kept,
                features,
                plan=job.plan,
                encoder=job.encoder,
                provenance=provenance,
                reading=reading,
            )
        elif made.num_damaged:
            reason = f"{made.num_damaged:,} tiles are damaged that another encoder had read"
            raise SlideError("unreadable", f"{reason}; the first: {made.damage}", DAMAGED_REMEDY)
        else:
            add_features(
                job.folder, features, encoder=job.encoder, provenance=provenance, reading=reading
            )
    num_reused = len(tiles) - len(missing)
    return SlideReport(job.slide.slide_id, len(kept), num_reused, **reading)


def _foreseen_tiles(slide: SlideReader, plan: TilePlan) -> int:
    """About how many tiles there will be: half of a slide is tissue."""
    width, height = slide.bounds[2:]
    return int(width * height * (slide.mpp / (plan.tile_px * plan.mpp)) ** 2 / 2)
