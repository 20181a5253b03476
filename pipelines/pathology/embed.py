"""`embed`: slides to stored tile features, on one machine or several.

OUT/reading.csv     how each slide was read: tiles, damaged tiles, and by what
OUT/failures.csv    what could not be embedded, why, and what to do
FEATURES            the store (default OUT/features), shared by all machines

Several machines work on one cohort with one `features=` folder: `worker=2/4` takes every fourth
slide, the second first, and keeps its record in OUT/worker_2_of_4.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import pandas as pd

from pipelines.pathology.encoding import TileEncoder, build_encoder
from pipelines.pathology.features import (
    ExtractionReport,
    SlideReport,
    extract_features,
    find_current,
)
from pipelines.pathology.manifest import list_slides
from pipelines.pathology.reading import Source, TileReader
from pipelines.pathology.slides import SlideError, SlideFile, open_slide
from pipelines.pathology.store import write_index
from pipelines.pathology.surveys import survey_folder
from pipelines.pathology.tiling import TilePlan, grid_size, make_plan
from pipelines.shared.errors import InputError
from pipelines.shared.record import finish_run, open_run
from pipelines.shared.tables import align, read_table, write_failures, write_table

# what may change between two runs in one folder: thresholds choose among what is embedded, and
# encoders share its tiles
VOLATILE = (
    "out", "slides", "root", "columns", "where", "tiles", "min_tissue", "leave_out", "max_flagged",
    "read_with", "num_workers", "progress", "dry_run", "encoder",
)  # fmt: skip

_READING = "reading.csv"
_COLUMNS = (
    "slide_id",
    "encoder",
    "num_tiles",
    "num_reused",
    "num_damaged",
    "damage",
    "source",
    "why",
)


def embed(config: dict[str, Any]) -> int:
    """Embed the slides; 0, or 3 if some failed. Raises InputError if none can be embedded.

    With `dry_run`, say of each slide what would happen and write nothing.
    """
    plan = make_plan(config)
    if config["read_with"] not in get_args(Source):
        known = ", ".join(get_args(Source))
        raise InputError(f"read_with={config['read_with']}: choose one of {known}")
    slides = _share(_slides(config), config["worker"])
    encoder = build_encoder(**config["encoder"])
    out = _record_folder(config)
    store = Path(config["features"] or Path(config["out"]) / "features")
    surveys = survey_folder(config["tiles"])
    if config["dry_run"]:
        return _dry_run(slides, store, plan, encoder, config["read_with"], surveys)
    open_run(out, config, volatile=VOLATILE)
    report = extract_features(
        slides,
        store=store,
        plan=plan,
        encoder=encoder,
        workers=config["num_workers"] or None,
        progress=config["progress"],
        source=config["read_with"],
        new_thresholds=True,
        surveys=surveys,
    )
    _write_reading(out / _READING, encoder.name, report.read)
    write_failures(out / "failures.csv", report.failures, id_column="slide_id")
    write_index(store)
    return _finish(out, store, report, encoder)


def _finish(out: Path, store: Path, report: ExtractionReport, encoder: TileEncoder) -> int:
    for slide in report.read:
        if slide.num_damaged:
            print(
                f"note: {slide.slide_id}: {slide.num_damaged:,} damaged tiles are left out: "
                f"{slide.damage}"
            )
    for failure in report.failures:
        print(f"failed: {failure.id}: {failure.status}: {failure.reason}; {failure.remedy}")
    if not report.done:
        raise InputError(f"no slide could be embedded; {out / 'failures.csv'} says why of each")
    tiles = sum(slide.num_tiles for slide in report.read)
    counts = {"slides": len(report.done), "tiles": tiles, "failures": len(report.failures)}
    finish_run(out, {**counts, "encoder_fingerprint": encoder.fingerprint})
    print(
        f"{len(report.done):,} slides, {report.num_reused:,} of them as they were; {tiles:,} tiles "
        f"of {encoder.dim:,} features of {encoder.name}: {store}"
    )
    for name in sorted({slide.source for slide in report.read}):
        count = sum(slide.source == name for slide in report.read)
        print(f"read by {name}: {count:,} slides ({out / _READING} says why)")
    if report.failures:
        print(f"{len(report.failures):,} slides failed: {out / 'failures.csv'}")
    return 3 if report.failures else 0


def _slides(config: dict[str, Any]) -> list[SlideFile]:
    slides = list_slides(
        config["slides"], root=config["root"], columns=config["columns"], where=config["where"]
    )
    given = config["slide_mpp"]
    if given is None:
        return slides
    if not isinstance(given, int | float) or not given > 0:
        raise InputError(f"slide_mpp must be a positive number of um per pixel; got {given!r}")
    return [s if s.mpp is not None else replace(s, mpp=float(given)) for s in slides]


def _parse_worker(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", str(text))
    number, total = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= number <= total:
        raise InputError(f"worker={text}: write I/N with I from 1 to N, such as worker=2/4")
    return number, total


def _share(slides: list[SlideFile], worker: str) -> list[SlideFile]:
    """Return this machine's slides: every N-th, so that large and small ones mix."""
    number, total = _parse_worker(worker)
    if total > len(slides):
        raise InputError(f"worker={worker}: there are {len(slides)} slides for {total} workers")
    return slides[number - 1 :: total]


def _record_folder(config: dict[str, Any]) -> Path:
    number, total = _parse_worker(config["worker"])
    out = Path(config["out"])
    return out if total == 1 else out / f"worker_{number}_of_{total}"


def _write_reading(path: Path, encoder: str, read: Iterable[SlideReport]) -> None:
    """Add slides to the table of how they were read; a slide read again replaces its row."""
    rows = {
        (slide.slide_id, encoder): {"encoder": encoder}
        | {key: "" if value is None else str(value) for key, value in asdict(slide).items()}
        for slide in read
    }
    if path.exists():
        earlier = read_table(path).to_dict("records") if path.stat().st_size else []
        rows = {(row["slide_id"], row["encoder"]): row for row in earlier} | rows
    if rows:
        write_table(path, pd.DataFrame(list(rows.values()), columns=list(_COLUMNS)))


def _dry_run(
    slides: list[SlideFile],
    store: Path,
    plan: TilePlan,
    encoder: TileEncoder,
    source: Source,
    surveys: Path | None,
) -> int:
    current = find_current(
        slides, store=store, plan=plan, encoder=encoder, new_thresholds=True, surveys=surveys
    )
    rows, failed = [], []
    for slide in slides:
        try:
            rows.append(_plan_row(slide, plan, source, done=slide.slide_id in current))
        except SlideError as error:
            rows.append([slide.slide_id, error.status, "-", "-"])
            failed.append(f"would fail: {slide.slide_id}: {error}")
    print(align([["slide", "would be", "cells of the grid", "pixels from"], *rows]), end="\n\n")
    print("".join(f"{line}\n" for line in failed), end="")
    todo = len(slides) - len(failed) - len(current)
    print(
        f"{todo:,} slides to embed with {encoder.name} ({encoder.dim:,} features), "
        f"{len(current):,} as they are, {len(failed):,} refused; nothing was written"
    )
    return 3 if failed else 0


def _plan_row(slide: SlideFile, plan: TilePlan, source: Source, *, done: bool) -> list[str]:
    with open_slide(slide.path, mpp=slide.mpp) as reader:
        reader.probe()
        columns, rows, _ = grid_size(reader, plan)
        with TileReader(reader, plan, source=source) as tiles:
            level = tiles.level
            pixels = f"level {level.level}, filter {level.filter}, {tiles.source.name}"
            pixels += f" ({tiles.source.why})"
    return [slide.slide_id, "kept" if done else "embedded", f"{columns} x {rows}", pixels]
