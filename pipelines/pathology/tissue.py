"""Find tissue on a small overview of the slide: deterministic, on the CPU."""

from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.filters import threshold_otsu

from pipelines.pathology.slides import SlideReader

OVERVIEW_MPP = 8.0
OVERVIEW_MIN_PX = 256
MIN_OBJECT_UM2 = 10_000.0
MAX_HOLE_UM2 = 10_000.0
# optical density: glass with its noise lies below the first, stained tissue above the second
DENSITY_LIMITS = (0.04, 0.12)
TISSUE_REVISION = 1
_INK_BLACK = 40
_STRIP_PIXELS = 1 << 24


@dataclass(frozen=True, slots=True)
class TissueMask:
    """Tissue of one slide on its overview.

    `mask` bool [h, w] and `overview` uint8 [h, w, 3] share one grid whose pixel measures `scale`
    (x, y) level-0 pixels. `threshold` is the optical density used, `threshold_source` says
    whether Otsu chose it (`otsu`) or it was held to a limit (`all glass`, `all tissue`).
    """

    mask: np.ndarray
    overview: np.ndarray
    scale: tuple[float, float]
    threshold: float
    threshold_source: str


def find_tissue(reader: SlideReader) -> TissueMask:
    """Mask the tissue on an overview of 8 um per pixel, finer where the slide is small."""
    overview = read_overview(reader)
    height, width = overview.shape[:2]
    scale = (reader.dimensions[0] / width, reader.dimensions[1] / height)
    density = _stain_density(overview)
    threshold, source = _threshold(density)
    dark_border = overview.max(axis=2) < _INK_BLACK
    pixel_um2 = scale[0] * scale[1] * reader.mpp**2
    mask = _drop_small((density > threshold) & ~dark_border, MIN_OBJECT_UM2 / pixel_um2)
    mask = ~_drop_small(~mask, MAX_HOLE_UM2 / pixel_um2, keep_border=True)
    return TissueMask(mask, overview, scale, threshold, source)


def read_overview(reader: SlideReader) -> np.ndarray:
    """Read the whole slide as a small uint8 RGB image, in strips of bounded memory."""
    width0, height0 = reader.dimensions
    finest = reader.mpp * max(1.0, min(width0, height0) / OVERVIEW_MIN_PX)
    downsample = max(1.0, min(OVERVIEW_MPP, finest) / reader.mpp)
    width, height = max(1, round(width0 / downsample)), max(1, round(height0 / downsample))
    level = max(
        i for i, d in enumerate(reader.level_downsamples) if i == 0 or d <= downsample * 1.01
    )
    level_width, level_height = reader.level_dimensions[level]
    rows_per_strip = max(1, int(_STRIP_PIXELS * height / (level_width * level_height)))
    strips = []
    for start in range(0, height, rows_per_strip):
        stop = min(height, start + rows_per_strip)
        top, bottom = start * level_height / height, stop * level_height / height
        first, last = int(top), min(level_height, int(np.ceil(bottom)))
        y0 = round(first * reader.level_downsamples[level])
        pixels = reader.read_region(0, y0, level_width, last - first, level)
        strips.append(_shrink(pixels, (width, stop - start), (top - first, bottom - first)))
    return np.concatenate(strips)


def tissue_fraction(tissue: TissueMask, xy0: np.ndarray, size0: float) -> np.ndarray:
    """Share of tissue, float32 [N], in squares of `size0` level-0 pixels at `xy0` [N, 2].

    Exact areas: the integral image is read between its nodes by bilinear interpolation.
    """
    height, width = tissue.mask.shape
    integral = np.zeros((height + 1, width + 1), dtype=np.float64)
    integral[1:, 1:] = tissue.mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    left, top = xy0[:, 0] / tissue.scale[0], xy0[:, 1] / tissue.scale[1]
    right = np.minimum(left + size0 / tissue.scale[0], width)
    bottom = np.minimum(top + size0 / tissue.scale[1], height)
    inside = (
        _between(integral, bottom, right)
        - _between(integral, top, right)
        - _between(integral, bottom, left)
        + _between(integral, top, left)
    )
    area = (right - left) * (bottom - top)
    return np.clip(inside / area, 0.0, 1.0).astype(np.float32)


def _shrink(pixels: np.ndarray, size: tuple[int, int], rows: tuple[float, float]) -> np.ndarray:
    box = (0, rows[0], pixels.shape[1], rows[1])
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, box=box))


def _stain_density(overview: np.ndarray) -> np.ndarray:
    """Optical density [h, w] of the strongest channel, against this slide's own glass."""
    white = np.percentile(overview, 99, axis=(0, 1))
    if white.min() < 190 or white.max() - white.min() > 20:  # no clean glass in sight
        white = np.full(3, 245.0)
    density = np.log10((white + 1) / (overview.astype(np.float64) + 1)).max(axis=2)
    return ndimage.uniform_filter(density, size=3, mode="nearest")


def _threshold(density: np.ndarray) -> tuple[float, str]:
    low, high = DENSITY_LIMITS
    if density.max() <= low:
        return low, "all glass"
    if density.min() > low:
        return low, "all tissue"
    return float(np.clip(threshold_otsu(density), low, high)), "otsu"


def _drop_small(mask: np.ndarray, min_pixels: float, *, keep_border: bool = False) -> np.ndarray:
    """Remove 4-connected pieces below `min_pixels`, but none at the border if `keep_border`."""
    labels, _ = ndimage.label(mask)
    keep = np.bincount(labels.ravel()) >= min_pixels
    if keep_border:
        keep[np.unique(np.r_[labels[0], labels[-1], labels[:, 0], labels[:, -1]])] = True
    keep[0] = False
    return keep[labels]


def _between(integral: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    r = np.minimum(rows.astype(np.int64), integral.shape[0] - 2)
    c = np.minimum(cols.astype(np.int64), integral.shape[1] - 2)
    dr, dc = rows - r, cols - c
    upper = integral[r, c] * (1 - dc) + integral[r, c + 1] * dc
    lower = integral[r + 1, c] * (1 - dc) + integral[r + 1, c + 1] * dc
    return upper * (1 - dr) + lower * dr
