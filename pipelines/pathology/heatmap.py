"""Draw one score per tile over the slide."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.pathology.store import SlideFeatures
from pipelines.shared.asides import aside_of

_PANEL_INCHES = (7.0, 5.0)  # at most, width and height
_DPI = 110
_CLIPPED_PERCENT = 1.0


def render_heatmap(
    path_png: str | Path,
    slide: SlideFeatures,
    scores: np.ndarray,
    *,
    title: str,
    unit: str = "score",
    overview: np.ndarray | None = None,
    limits: tuple[float, float] | None = None,
) -> None:
    """Write a PNG: the slide at the left, `scores` [N] over it at the right, with their scale.

    `unit` labels the colour bar. Colours span `limits`, by default the middle 98 % of the scores.
    `overview` uint8 RGB [h, w, 3] shows the whole slide in place of the stored picture. The file is
    written aside and renamed. Raises ValueError for scores that do not match the tiles.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.shape != (len(slide),):
        raise ValueError(
            f"scores must be [{len(slide)}] for slide {slide.slide_id!r}; got {scores.shape}"
        )
    # on first use: importing matplotlib takes longer than all else here
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    overview = slide.overview() if overview is None else overview
    height, width = overview.shape[:2]
    inches = min(_PANEL_INCHES[0] / width, _PANEL_INCHES[1] / height)
    size = (max(2 * inches * width, 4.0) + 1.6, max(inches * height, 1.5) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title.replace("$", r"\$"), fontsize=11, wrap=True)  # no formula
    left, right = figure.subplots(1, 2)
    extent = _extent_um(slide)
    left.imshow(overview, extent=extent)
    right.imshow(_pale(overview), extent=extent)
    raster, raster_extent = _raster(slide, scores)
    low, high = clipped_range(scores) if limits is None else limits
    tiles = right.imshow(
        np.ma.masked_invalid(raster),
        extent=raster_extent,
        cmap="viridis",
        vmin=low,
        vmax=high if high > low else low + 1,
        alpha=0.75,
        interpolation="nearest",
    )
    for axes in (left, right):
        axes.set(xlim=extent[:2], ylim=extent[2:], xlabel="µm", ylabel="")
        axes.tick_params(labelsize=8)
    right.set_yticks([])
    bar = figure.colorbar(tiles, ax=right, extend="both", shrink=0.9)
    bar.set_label(unit)
    path = Path(path_png)
    aside = aside_of(path)
    figure.savefig(aside, format="png", dpi=_DPI)
    os.replace(aside, path)


def clipped_range(scores: np.ndarray) -> tuple[float, float]:
    """Return what the middle 98 % of scores span."""
    low, high = np.nanpercentile(scores, [_CLIPPED_PERCENT, 100 - _CLIPPED_PERCENT])
    return float(low), float(high)


def caption(slide_id: str, said: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> str:
    """Say in a line what is known of a slide and what the model says of it.

    `known` and `said` are rows of a table of predictions; of several classes the predicted one is
    named with its probability.
    """
    words = [f"{key} {_short(value)}" for key, value in (known or {}).items()]
    for key in ("prediction", "risk", "group"):
        if key in said:
            words.append(f"{key} {_short(said[key])}")
            share = said.get(f"probability_{said[key]}")
            words[-1] += "" if share is None else f" ({share:.3f})"
    return f"{slide_id}: {', '.join(words)}"


def draw_attention(path: Path, slide: SlideFeatures, weights: np.ndarray, *, title: str) -> None:
    """Draw how much each tile counts in the slide's pooling, relative to an even share."""
    path.parent.mkdir(parents=True, exist_ok=True)
    render_heatmap(path, slide, weights, title=title, unit="attention / even share")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _extent_um(slide: SlideFeatures) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of the slide in micrometres."""
    width, height = slide.dimensions
    return 0.0, width * slide.mpp, height * slide.mpp, 0.0


def _pale(overview: np.ndarray) -> np.ndarray:
    grey = overview.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return (255 - 0.5 * (255 - grey)).astype(np.uint8)


def _raster(
    slide: SlideFeatures, scores: np.ndarray
) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """Scores on the tile grid, NaN where there is no tile, and its extent in micrometres."""
    first = slide.grid.min(axis=0)
    cols, rows = slide.grid.max(axis=0) - first + 1
    raster = np.full((rows, cols), np.nan)
    raster[slide.grid[:, 1] - first[1], slide.grid[:, 0] - first[0]] = scores
    pitch = slide.pitch0 * slide.mpp
    x, y = slide.xy0.min(axis=0) * slide.mpp  # not first * pitch: a grid may start off the corner
    return raster, (x, x + cols * pitch, y + rows * pitch, y)
