"""From slide files to stored tile features, past every slide that fails."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.pathology.encoding import TileEncoder
from pipelines.pathology.progress import track
from pipelines.pathology.slides import SlideError, SlideFile, open_slide, slide_fingerprint
from pipelines.pathology.store import Provenance, is_current, slide_folder, write_slide
from pipelines.pathology.tiling import TilePlan, plan_tiles, read_tiles
from pipelines.shared.tables import Failure

_SLIDES_PER_WORKER = 8  # fewer do not repay the start of a process


@dataclass(frozen=True, slots=True)
class ExtractionReport:
    """What became of the slides, in their given order.

    `done` are the ids with current features, `num_reused` how many of them were there before.
    """

    done: list[str]
    failures: list[Failure]
    num_reused: int


@dataclass(frozen=True, slots=True)
class _Job:
    slide: SlideFile
    store: Path
    plan: TilePlan
    encoder: TileEncoder
    mpp: float | None


def extract_features(
    slides: Sequence[SlideFile],
    *,
    store: Path,
    plan: TilePlan,
    encoder: TileEncoder,
    mpps: Mapping[str, float] | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> ExtractionReport:
    """Bring the store up to date for `slides`; a slide that fails is reported, not raised.

    Features that are current (same file, plan, encoder and given mpp) are kept, others replaced.
    `mpps` gives um per pixel by slide id where the file's own value is missing or wrong.
    `workers` defaults to one process per core; the result does not depend on it.
    """
    jobs = [_Job(s, store, plan, encoder, (mpps or {}).get(s.slide_id)) for s in slides]
    todo = [job for job in jobs if not _is_done(job)]
    store.mkdir(parents=True, exist_ok=True)
    failures: dict[str, Failure] = {}
    results = _run(todo, _num_workers(workers, len(todo), encoder))
    for slide_id, failure in track(results, total=len(todo), label="features", enabled=progress):
        if failure is not None:
            failures[slide_id] = failure
    ids = [slide.slide_id for slide in slides]
    return ExtractionReport(
        done=[slide_id for slide_id in ids if slide_id not in failures],
        failures=[failures[slide_id] for slide_id in ids if slide_id in failures],
        num_reused=len(jobs) - len(todo),
    )


def _provenance(job: _Job) -> Provenance:
    return Provenance(
        slide_fingerprint=slide_fingerprint(job.slide.path),
        given_mpp=job.mpp,
        plan_hash=job.plan.hash,
        encoder=job.encoder.name,
        encoder_fingerprint=job.encoder.fingerprint,
    )


def _is_done(job: _Job) -> bool:
    folder = slide_folder(job.store, job.slide.slide_id)
    try:
        return folder.exists() and is_current(folder, _provenance(job))
    except OSError:  # the slide cannot be read: extraction will say why
        return False


def _num_workers(wanted: int | None, num_jobs: int, encoder: TileEncoder) -> int:
    if not encoder.in_workers:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    most = num_jobs // _SLIDES_PER_WORKER if wanted is None else num_jobs
    return max(1, min(wanted or cores or 1, most))


def _run(jobs: list[_Job], workers: int) -> Iterator[tuple[str, Failure | None]]:
    if workers == 1:
        return map(_extract_one, jobs)
    return _run_in_processes(jobs, workers)


def _run_in_processes(jobs: list[_Job], workers: int) -> Iterator[tuple[str, Failure | None]]:
    # spawned, not forked: the parent may hold threads and locks of torch
    context = multiprocessing.get_context("spawn")
    unfinished = {job.slide.slide_id: job for job in jobs}
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        _check_start(pool)
        try:
            for future in as_completed([pool.submit(_extract_one, job) for job in jobs]):
                slide_id, failure = future.result()
                del unfinished[slide_id]
                yield slide_id, failure
        except BrokenProcessPool:
            pass  # one slide killed its worker; below each gets a process of its own
        finally:
            pool.shutdown(cancel_futures=True)
    yield from _run_apart(unfinished.values(), context)


def _check_start(pool: ProcessPoolExecutor) -> None:
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "worker processes cannot start; call extract_features below "
            "`if __name__ == '__main__':` or with workers=1"
        ) from error


def _run_apart(
    jobs: Iterable[_Job], context: multiprocessing.context.SpawnContext
) -> Iterator[tuple[str, Failure | None]]:
    for job in jobs:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                yield pool.submit(_extract_one, job).result()
            except BrokenProcessPool:
                reason = "the process reading it died (out of memory, or a crash in a library)"
                yield _failed(job, reason, "try it alone with workers=1 and watch its memory")


def _extract_one(job: _Job) -> tuple[str, Failure | None]:
    slide = job.slide
    try:
        _extract(job)
    except SlideError as error:
        failure = Failure(slide.slide_id, str(slide.path), error.status, error.reason, error.remedy)
        return slide.slide_id, failure
    except Exception as error:
        return _failed(job, f"{type(error).__name__}: {error}", "report this with the file")
    return slide.slide_id, None


def _failed(job: _Job, reason: str, remedy: str) -> tuple[str, Failure | None]:
    slide = job.slide
    return slide.slide_id, Failure(slide.slide_id, str(slide.path), "failed", reason, remedy)


def _extract(job: _Job) -> None:
    with open_slide(job.slide.path, mpp=job.mpp) as reader:
        tiles = plan_tiles(reader, job.plan)
        features = np.empty((len(tiles), job.encoder.dim), dtype=np.float32)
        for rows, pixels in read_tiles(reader, tiles, job.plan):
            features[rows] = job.encoder(pixels)
        write_slide(
            slide_folder(job.store, job.slide.slide_id),
            job.slide.slide_id,
            reader,
            tiles,
            features,
            plan=job.plan,
            encoder=job.encoder,
            provenance=_provenance(job),
        )
