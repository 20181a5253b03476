"""Draw what a plan makes of a slide: its tissue, its tiles, and what is left out for what."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from pipelines.pathology.outlines import TISSUE_COLOUR
from pipelines.pathology.tiling import Survey, TilePlan
from pipelines.shared.asides import aside_of

SIDE_PX = (900, 2000)
"""The longer side of a preview: small slides are enlarged, large ones are shrunk."""
COLOURS = {
    "tiles": (20, 20, 20),
    "tissue": TISSUE_COLOUR,
    "pen": (30, 90, 230),
    "dark": (240, 140, 0),
    "blur": (170, 40, 200),
}
_LEGEND_PX = 22


def draw_preview(path: Path, survey: Survey, plan: TilePlan, *, title: str) -> None:
    """Write a PNG, aside and renamed.

    The edge of the tissue is green, chosen tiles are framed, and cells that pass `min_tissue` but
    bear a flag on more than `max_flagged` are tinted in the flag's colour, left out or not.
    """
    overview = Image.fromarray(survey.mask.overview)
    side = max(overview.size)
    zoom = np.clip(side, *SIDE_PX) / side
    size = tuple(max(1, round(s * zoom)) for s in overview.size)
    image = _with_edge(overview.resize(size, Image.Resampling.BICUBIC), survey.mask.mask)
    tint = Image.new("RGBA", size)
    counts = _draw_cells(ImageDraw.Draw(tint), survey, plan, zoom)
    image = Image.alpha_composite(image.convert("RGBA"), tint).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    _with_legend(image, title, counts).save(aside, format="png")
    os.replace(aside, path)


def _with_edge(image: Image.Image, mask: np.ndarray) -> Image.Image:
    scaled = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    edge = scaled & ~ndimage.binary_erosion(scaled, iterations=2, border_value=1)
    pixels = np.array(image)
    pixels[edge] = COLOURS["tissue"]
    return Image.fromarray(pixels)


def _draw_cells(
    draw: ImageDraw.ImageDraw, survey: Survey, plan: TilePlan, zoom: float
) -> dict[str, int]:
    """Draw cells and return how many there are of each kind."""
    scale = np.array(survey.mask.scale) / zoom
    boxes = np.concatenate([survey.xy0, survey.xy0 + survey.pitch0], axis=1) / np.tile(scale, 2)
    counts = {}
    for name, share in survey.flagged.items():
        rows = np.flatnonzero((share > plan.max_flagged) & (survey.tissue >= plan.min_tissue))
        counts[name] = len(rows)
        for box in boxes[rows].tolist():
            draw.rectangle(box, fill=(*COLOURS[name], 110))
    chosen = survey.choose(plan).index
    for box in boxes[chosen].tolist():
        draw.rectangle(box, outline=(*COLOURS["tiles"], 150))
    return {"tiles": len(chosen)} | counts


def _with_legend(image: Image.Image, title: str, counts: dict[str, int]) -> Image.Image:
    """Put the title and the counts, each in its colour, above the picture."""
    canvas = Image.new("RGB", (image.width, image.height + 2 * _LEGEND_PX), "white")
    canvas.paste(image, (0, 2 * _LEGEND_PX))
    draw = ImageDraw.Draw(canvas)
    draw.text((6, 4), title, fill="black", font_size=13)
    at = 6.0
    for name, count in counts.items():
        text = f"{name} {count:,}"
        draw.text((at, 4 + _LEGEND_PX), text, fill=COLOURS[name], font_size=13)
        at += draw.textlength(text, font_size=13) + 18
    return canvas
