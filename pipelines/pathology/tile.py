"""`tile`: find the tissue of slides and lay tiles over it, before anything is learned.

OUT/slides.csv                 one row per slide: resolution, level, counts
OUT/failures.csv               what could not be tiled, why, and what to do
OUT/surveys/<slide_id>.npz     every cell that touches tissue, with its shares of tissue and flags
OUT/outlines/<slide_id>.geojson  the tissue, for QuPath
OUT/previews/<slide_id>.png    tissue, tiles and flags over the slide
"""

import hashlib
import importlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.pathology.manifest import list_slides
from pipelines.pathology.outlines import outlined_tissue, write_outline
from pipelines.pathology.preview import draw_preview
from pipelines.pathology.progress import track
from pipelines.pathology.slides import (
    SlideError,
    SlideFile,
    SlideReader,
    open_slide,
    slide_fingerprint,
)
from pipelines.pathology.surveys import read_survey, survey_file, write_survey
from pipelines.pathology.tiling import (
    Survey,
    TilePlan,
    choose_level,
    grid_size,
    make_plan,
    no_tiles,
    survey_tiles,
)
from pipelines.pathology.tissue import TissueModel, find_tissue
from pipelines.shared.asides import clean
from pipelines.shared.errors import InputError
from pipelines.shared.record import finish_run, open_run
from pipelines.shared.tables import Failure, align, write_failures, write_table

# what may change between two runs in one folder: thresholds choose among what was surveyed
VOLATILE = (
    "out", "slides", "root", "columns", "where", "min_tissue", "leave_out", "max_flagged",
    "outlines", "preview", "num_workers", "progress", "dry_run",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Job:
    slide: SlideFile
    plan: TilePlan
    out: Path
    outline: Path | None
    model: TissueModel | None
    blur: bool
    preview: bool

    @property
    def survey_file(self) -> Path:
        return survey_file(self.out / "surveys", self.slide.slide_id)

    @property
    def made_from(self) -> dict[str, object]:
        """What the survey depends on."""
        return {
            "slide": slide_fingerprint(self.slide.path),
            "given_mpp": self.slide.mpp,
            "grid_hash": self.plan.grid_hash,
            "outline": self.outline and hashlib.sha256(self.outline.read_bytes()).hexdigest(),
            "model": self.model and self.model.fingerprint,
            "blur": self.blur,
        }


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a slide: a row of the table, a failure, or both (no tissue)."""

    row: dict[str, object] | None = None
    failure: Failure | None = None
    reused: bool = False


def tile(config: dict[str, Any]) -> int:
    """Tile the slides; 0, or 3 if some cannot be tiled. Raises InputError if none can.

    With `dry_run`, say of each slide what would happen and write nothing.
    """
    jobs = _jobs(config)
    if config["dry_run"]:
        return _dry_run(jobs)
    out = Path(config["out"])
    open_run(out, config, volatile=VOLATILE)
    clean(out)
    outcomes = list(
        track(
            _in_threads(_tile_one, jobs, config["num_workers"]),
            total=len(jobs),
            label="tile",
            enabled=config["progress"],
        )
    )
    rows = [outcome.row for outcome in outcomes if outcome.row is not None]
    failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
    write_failures(out / "failures.csv", failures, id_column="slide_id")
    write_table(out / "slides.csv", pd.DataFrame(rows, columns=_COLUMNS))
    _print_failures(failures)
    for group in _copies(rows):
        print(f"note: one file under several ids: {', '.join(group)}")
    if len(failures) == len(jobs):
        raise InputError(f"no slide could be tiled; {out / 'failures.csv'} says why of each")
    tiles = sum(int(str(row["tiles"])) for row in rows)
    reused = sum(outcome.reused for outcome in outcomes)
    finish_run(out, {"slides": len(rows), "tiles": tiles, "failures": len(failures)})
    print(f"{len(jobs) - len(failures):,} slides, {tiles:,} tiles: {out / 'slides.csv'}")
    if reused:
        print(f"{reused:,} surveys were there and are current")
    if failures:
        print(f"{len(failures):,} slides failed: {out / 'failures.csv'}")
    return 3 if failures else 0


def load_tissue_model(factory: str | None) -> TissueModel | None:
    """Call `package.module:function`, which makes a TissueModel; None gives None."""
    if factory is None:
        return None
    module, sign, name = factory.partition(":")
    if not sign:
        raise InputError(f"tissue_model={factory} must be package.module:function")
    try:
        model: TissueModel = getattr(importlib.import_module(module), name)()
    except (ImportError, AttributeError) as error:
        raise InputError(f"tissue_model={factory} cannot be imported: {error}") from error
    missing = [name for name in ("mpp", "fingerprint", "__call__") if not hasattr(model, name)]
    if missing:
        raise InputError(f"tissue_model={factory}: what it returns has no {missing[0]}")
    return model


def _jobs(config: Mapping[str, Any]) -> list[_Job]:
    plan = make_plan(config)
    slides = list_slides(
        config["slides"], root=config["root"], columns=config["columns"], where=config["where"]
    )
    outlines = None if config["outlines"] is None else Path(config["outlines"])
    if outlines is not None and not outlines.is_dir():
        raise InputError(f"outlines={outlines} is no folder; it holds SLIDE_ID.geojson files")
    model = load_tissue_model(config["tissue_model"])
    jobs = []
    for slide in slides:
        outline = outlines and outlines / f"{slide.slide_id}.geojson"
        jobs.append(
            _Job(
                slide=_with_mpp(slide, config["slide_mpp"]),
                plan=plan,
                out=Path(config["out"]),
                outline=outline if outline and outline.exists() else None,
                model=model,
                blur=config["blur"] or "blur" in plan.leave_out,
                preview=config["preview"],
            )
        )
    return jobs


def _with_mpp(slide: SlideFile, given: object) -> SlideFile:
    if given is None or slide.mpp is not None:
        return slide
    if not isinstance(given, int | float) or not given > 0:
        raise InputError(f"slide_mpp must be a positive number of um per pixel; got {given!r}")
    return SlideFile(slide.slide_id, slide.path, float(given))


def _in_threads(
    function: Callable[[_Job], _Outcome], jobs: list[_Job], workers: int
) -> Iterator[_Outcome]:
    # threads suffice: reading and array work release the interpreter's lock
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from pool.map(function, jobs)


def _tile_one(job: _Job) -> _Outcome:
    try:
        return _tile(job)
    except SlideError as error:
        return _Outcome(failure=_failure(job, error))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return _Outcome(failure=_failure(job, SlideError("failed", reason, "report this")))


def _tile(job: _Job) -> _Outcome:
    with open_slide(job.slide.path, mpp=job.slide.mpp) as reader:
        made_from = job.made_from
        survey = read_survey(job.survey_file, made_from)
        reused = survey is not None
        if survey is None:
            survey = _survey(reader, job)
            write_survey(job.survey_file, survey, made_from)
        row = _row(job, reader, survey, str(made_from["slide"]))
    write_outline(job.out / "outlines" / f"{job.slide.slide_id}.geojson", survey.mask)
    if job.preview:
        path = job.out / "previews" / f"{job.slide.slide_id}.png"
        title = f"{job.slide.slide_id}   {job.plan.tile_px} px at {job.plan.mpp:g} um/px"
        draw_preview(path, survey, job.plan, title=title)
    failure = None if row["tiles"] else _failure(job, no_tiles(survey, job.plan))
    return _Outcome(row, failure, reused)


def _survey(reader: SlideReader, job: _Job) -> Survey:
    choose_level(reader, job.plan.mpp)  # before the slide is read
    mask = find_tissue(reader, model=job.model, blur=job.blur)
    if job.outline is not None:
        mask = outlined_tissue(job.outline, mask)
    return survey_tiles(reader, job.plan, mask)


def _row(job: _Job, reader: SlideReader, survey: Survey, fingerprint: str) -> dict[str, object]:
    plan, level = job.plan, choose_level(reader, job.plan.mpp)
    pixel_mm2 = survey.mask.scale[0] * survey.mask.scale[1] * (reader.mpp * 1e-3) ** 2
    flagged = {
        name: int((survey.flagged[name] > plan.max_flagged).sum()) if name in survey.flagged else ""
        for name in ("pen", "dark", "blur")
    }
    return {
        "slide_id": job.slide.slide_id,
        "path": str(job.slide.path),
        "vendor": reader.vendor,
        "width": reader.dimensions[0],
        "height": reader.dimensions[1],
        "mpp": reader.mpp,
        "mpp_source": reader.mpp_source,
        "mpp_in_file": "" if reader.resolution.in_file is None else reader.resolution.in_file,
        "level": level.level,
        "downsample": level.downsample,
        "filter": level.filter,
        "tissue_mm2": round(float(survey.mask.mask.sum() * pixel_mm2), 4),
        "tissue_source": survey.mask.threshold_source,
        "cells": len(survey),
        "tiles": len(survey.choose(plan)),
        **flagged,
        "plan_hash": plan.hash,
        "fingerprint": fingerprint,
    }


_COLUMNS = [
    "slide_id", "path", "vendor", "width", "height", "mpp", "mpp_source", "mpp_in_file", "level",
    "downsample", "filter", "tissue_mm2", "tissue_source", "cells", "tiles", "pen", "dark", "blur",
    "plan_hash", "fingerprint",
]  # fmt: skip


def _failure(job: _Job, error: SlideError) -> Failure:
    slide = job.slide
    return Failure(slide.slide_id, str(slide.path), error.status, error.reason, error.remedy)


def _print_failures(failures: list[Failure]) -> None:
    for failure in failures:
        print(f"failed: {failure.id}: {failure.status}: {failure.reason}; {failure.remedy}")


def _copies(rows: list[dict[str, object]]) -> list[list[str]]:
    """Ids of slides whose files are the same, in groups of two or more."""
    groups: dict[object, list[str]] = defaultdict(list)
    for row in rows:
        groups[row["fingerprint"]].append(str(row["slide_id"]))
    return [group for group in groups.values() if len(group) > 1]


def _dry_run(jobs: list[_Job]) -> int:
    """Open every slide, print what would be done, write nothing."""
    lines = [["slide", "um/px", "source", "pixels", "level", "filter", "grid", "then"]]
    failures = []
    for job in jobs:
        try:
            lines.append(_foresee(job))
        except SlideError as error:
            failures.append(_failure(job, error))
            lines.append([job.slide.slide_id, *["-"] * 6, error.status])
    print(align(lines), end="\n\n")
    _print_failures(failures)
    good = len(jobs) - len(failures)
    print(f"{good:,} slides would be tiled, {len(failures):,} would fail; nothing is written")
    return 3 if failures else 0


def _foresee(job: _Job) -> list[str]:
    with open_slide(job.slide.path, mpp=job.slide.mpp) as reader:
        reader.probe()
        level = choose_level(reader, job.plan.mpp)
        cols, rows, _ = grid_size(reader, job.plan)
        current = read_survey(job.survey_file, job.made_from) is not None
        return [
            job.slide.slide_id,
            f"{reader.mpp:.4g}",
            reader.mpp_source,
            f"{reader.dimensions[0]} x {reader.dimensions[1]}",
            f"{level.level} (1/{level.downsample:.3g})",
            level.filter,
            f"{cols} x {rows}",
            "kept: it is current" if current else "tile",
        ]
