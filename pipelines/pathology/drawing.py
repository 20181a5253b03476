"""`heatmap`: draw the scores of tiles that `predict` kept, without running the model again."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.pathology.heatmap import clipped_range, render_heatmap
from pipelines.pathology.manifest import list_slides
from pipelines.pathology.progress import track
from pipelines.pathology.slides import SlideError, SlideFile, open_slide
from pipelines.pathology.store import SlideFeatures, read_slide, slide_folder
from pipelines.pathology.tile_scores import read_scores
from pipelines.pathology.tissue import read_overview
from pipelines.shared.errors import InputError
from pipelines.shared.record import finish_run, open_run
from pipelines.shared.tables import Failure, write_failures

_ATTENTION = "attention"
_REMEDY = "give the slides by slides=FOLDER, or the store that predict used by features=FOLDER"

Range = tuple[float, float]


def draw(config: dict[str, Any]) -> int:
    """Write SLIDE.SCORE.png for every slide and score; 0, or 3 if some slides failed.

    Raises InputError where there are no kept scores, for slides and scores that there are not, and
    if nothing could be drawn.
    """
    kept = _kept_scores(config)
    chosen = _choose_scores(kept, config["scores"])
    files = _files(config)
    store = Path(config["features"] or Path(config["predictions"]) / "features")
    out = Path(config["out"])
    open_run(out, config, volatile=("out", "progress"))
    ranges = _ranges(kept.values(), chosen) if config["same_scale"] else {}
    failures = []
    for name in track(kept, total=len(kept), label="heatmap", enabled=bool(config["progress"])):
        slide, scores = read_scores(kept[name])
        try:
            overview = _overview(slide, store, files, float(config["mpp"]))
        except SlideError as error:
            path = files[name].path if name in files else store
            failures.append(Failure(name, str(path), error.status, error.reason, error.remedy))
            print(f"failed: {name}: {error}")
            continue
        for score in chosen:
            render_heatmap(
                out / f"{name}.{_file_name(score)}.png",
                slide,
                _shown(scores, score),
                title=f"{name}: {score}",
                unit=f"{score} / even share" if score == _ATTENTION else f"added to {score}",
                overview=overview,
                limits=ranges.get(score),
            )
    write_failures(out / "failures.csv", failures, id_column="slide_id")
    if len(failures) == len(kept):
        raise InputError(f"no slide could be drawn; {out / 'failures.csv'} says why of each")
    finish_run(out, {"slides": len(kept) - len(failures), "failures": len(failures)})
    print(f"{(len(kept) - len(failures)) * len(chosen):,} pictures: {out}")
    return 3 if failures else 0


def _kept_scores(config: dict[str, Any]) -> dict[str, Path]:
    """Groups of tile scores by slide, those that are asked for."""
    folder = Path(config["predictions"]) / "tile_scores"
    found = {path.name.removesuffix(".zarr"): path for path in sorted(folder.glob("*.zarr"))}
    if not found:
        raise InputError(
            f"{folder} holds no scores of tiles: give the out= folder of a predict that ran with "
            "tile_scores=true"
        )
    missing = [name for name in config["only"] if name not in found]
    if missing:
        raise InputError(
            f"only={missing[0]}: {folder} has no scores of it; it has {', '.join([*found][:5])}"
            + (", ..." if len(found) > 5 else "")
        )
    return {name: found[name] for name in config["only"]} or found


def _choose_scores(kept: dict[str, Path], wanted: Sequence[str]) -> list[str]:
    known = list(read_scores(next(iter(kept.values())))[1])
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise InputError(f"scores={unknown[0]}: the kept scores are {', '.join(known)}")
    return list(wanted) or known


def _files(config: dict[str, Any]) -> dict[str, SlideFile]:
    if not config["slides"]:
        return {}
    return {file.slide_id: file for file in list_slides(Path(config["slides"]))}


def _ranges(kept: Iterable[Path], chosen: Sequence[str]) -> dict[str, Range]:
    """Range of each score over all slides."""
    values: dict[str, list[np.ndarray]] = {name: [] for name in chosen}
    for folder in kept:
        scores = read_scores(folder)[1]
        for name in chosen:
            values[name].append(_shown(scores, name))
    return {name: clipped_range(np.concatenate(parts)) for name, parts in values.items()}


def _shown(scores: dict[str, np.ndarray], name: str) -> np.ndarray:
    """A score as pictures show it: attention in proportion to an even share of the slide's."""
    values = scores[name]
    if name != _ATTENTION:
        return values
    return np.asarray(values / max(float(values.sum()), 1e-12) * len(values))


def _file_name(score: str) -> str:
    """A class as part of a file's name."""
    return re.sub(r"[^\w.+-]", "_", score)


def _overview(
    slide: SlideFeatures, store: Path, files: dict[str, SlideFile], mpp: float
) -> np.ndarray:
    """Picture of a slide: of its file where files are given, else the one stored with features."""
    if files:
        if slide.slide_id not in files:
            raise SlideError("no_slide", "slides= holds no such slide", "add its file")
        with open_slide(files[slide.slide_id].path, mpp=slide.mpp) as reader:
            if reader.dimensions != slide.dimensions:
                raise SlideError(
                    "other_slide",
                    f"the file measures {reader.dimensions} px, the predicted one "
                    f"{slide.dimensions}",
                    "give the slides that were predicted",
                )
            return read_overview(reader, mpp)
    folder = slide_folder(store, slide.slide_id)
    stored = read_slide(folder) if folder.is_dir() else None
    if stored is None or not stored.has_overview:
        raise SlideError("no_picture", f"{store} holds no picture of it", _REMEDY)
    return stored.overview()
