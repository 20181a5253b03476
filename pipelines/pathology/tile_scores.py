"""What single tiles have to do with a slide's result: kept as numbers, and drawn.

Two scores of a tile:

attention   the tile's share of the pooling's weights: all tiles of a sequence sum to 1. It says how
            much a tile counts, not for what. Mean pooling gives each tile the same; max pooling the
            share of channels whose largest value is the tile's.
NAME        for a class, or "risk" or "value": what that output owes to the tile.
            Of models that average tiles: what it loses when the tile is left out. With attention a,
            head l of the tile, and L the sum over the tiles of a l, that is a (l - L) / (1 - a),
            for the others' weights grow; it is exact. Of max pooling: the tile's own part.
            Of our transformer, where tiles also speak through their neighbours and registers: the
            change from the slide's mean tile to this one, to first order, gradient times difference
            (`SequenceClassifier.forward`). Attention times the head of the tile as it leaves the
            encoder would miss them: on slides with few tumour tiles it ran against what removing
            tiles does.
            Classes have their mean taken away: the same number added to all of them changes
            nothing. For bins of time the risk is the sum of the hazards' logits.

For a model of patients the sequence is all slides of a patient: attention sums to 1 over them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr
from PIL import Image

from pipelines.pathology.exporting import write_geojson
from pipelines.pathology.heatmap import draw_attention, render_heatmap
from pipelines.pathology.reading import TileReader
from pipelines.pathology.slides import open_slide
from pipelines.pathology.store import SlideFeatures, write_group
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.asides import aside_of
from pipelines.shared.objective import Classification, Objective


@dataclass(frozen=True, slots=True)
class TileScores:
    """Scores of one slide's tiles: attention [N], and one score [N] for each output's name.

    `shown` names the one that pictures show: of the predicted class, or the only one.
    """

    attention: np.ndarray
    outputs: dict[str, np.ndarray]
    shown: str


def left_out(attention: np.ndarray, contributions: np.ndarray) -> np.ndarray:
    """What each output loses without each tile [T, C], of all tiles of a sequence.

    `contributions` [T, C] are attention [T] times the head of each tile.
    """
    share = attention[:, None].astype(np.float64)
    lost = contributions - share * contributions.sum(0)
    return lost / np.maximum(1 - share, 1e-6)


def tile_scores(
    objective: Objective, attention: np.ndarray, contributions: np.ndarray, prediction: str
) -> TileScores:
    """Name what a slide's tiles add [N, C]; `prediction` is its class if it has one."""
    if isinstance(objective, Classification):
        centred = contributions - contributions.mean(1, keepdims=True)
        return TileScores(
            attention, dict(zip(objective.classes, centred.T, strict=True)), prediction
        )
    name = "risk" if hasattr(objective, "risk") else "value"
    return TileScores(attention, {name: contributions.sum(1)}, name)


def write_scores(folder: Path, slide: SlideFeatures, scores: TileScores) -> None:
    """Write a Zarr group: grid, xy0, attention [N], scores [N, C]; tiles in the store's order.

    Attributes say which score is whose.
    """
    attributes = {
        "slide_id": slide.slide_id,
        "scores": list(scores.outputs),
        "mpp": slide.mpp,
        "pitch0": slide.pitch0,
        "dimensions": list(slide.dimensions),
    }
    arrays = {
        "grid": slide.grid,
        "xy0": slide.xy0,
        "attention": scores.attention.astype(np.float32),
        "scores": np.stack([*scores.outputs.values()], axis=1).astype(np.float32),
    }
    write_group(folder, attributes, arrays)


def read_scores(folder: Path) -> tuple[SlideFeatures, dict[str, np.ndarray]]:
    """Read what `write_scores` wrote: where the tiles stand, and each score [N] by its name.

    The slide has neither features nor a picture.
    """
    group = zarr.open_group(folder, mode="r")
    held = dict(group.attrs)
    grid, xy0 = (np.asarray(group[name]) for name in ("grid", "xy0"))
    slide = SlideFeatures(
        slide_id=held["slide_id"],
        folder=folder,
        grid=grid,
        xy0=xy0,
        tissue=np.ones(len(grid), dtype=np.float32),
        encoder=None,
        dimensions=(int(held["dimensions"][0]), int(held["dimensions"][1])),
        mpp=float(held["mpp"]),
        pitch0=float(held["pitch0"]),
        attributes=held,
    )
    columns = np.asarray(group["scores"]).T
    scores = dict(zip(held["scores"], columns, strict=True))
    return slide, {"attention": np.asarray(group["attention"]), **scores}


def draw_scores(folder: Path, slide: SlideFeatures, scores: TileScores, *, title: str) -> None:
    """Write `SLIDE.png`, the attention, and `SLIDE.score.png`, the shown score, over the slide."""
    even = scores.attention / max(scores.attention.sum(), 1e-12) * len(slide)
    draw_attention(folder / f"{slide.slide_id}.png", slide, even, title=title)
    render_heatmap(
        folder / f"{slide.slide_id}.score.png",
        slide,
        scores.outputs[scores.shown],
        title=title,
        unit=f"added to {scores.shown}",
    )


def write_tile_shapes(path: Path, slide: SlideFeatures, scores: TileScores) -> None:
    """Write the tiles with all scores for QuPath, coloured by tenths of the shown score."""
    first = {scores.shown: scores.outputs[scores.shown]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_geojson(path, slide, first | scores.outputs | {"attention": scores.attention})


def write_top_tiles(
    folder: Path,
    path: Path,
    slide: SlideFeatures,
    scores: TileScores,
    *,
    plan: TilePlan,
    mpp: float | None,
    count: int,
) -> None:
    """Write the tiles with the highest shown score as PNG: RANK_xX_yY.png, corners at level 0.

    Raises SlideError where the slide cannot be read; single damaged tiles are left out.
    """
    best = np.argsort(-scores.outputs[scores.shown], kind="stable")[:count]
    with open_slide(path, mpp=mpp) as opened, TileReader(opened, plan) as reader:
        batch = reader.read(slide.xy0[best])
    folder.mkdir(parents=True, exist_ok=True)
    for rank, row in enumerate(best):
        if batch.valid[rank]:
            x, y = slide.xy0[row].tolist()
            target = folder / f"{rank + 1:02d}_x{x}_y{y}.png"
            aside = aside_of(target)
            Image.fromarray(batch.pixels[rank]).save(aside, format="png")
            aside.replace(target)
