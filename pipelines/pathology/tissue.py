"""Find tissue on a small overview of the slide: deterministic, on the CPU.

Tissue is what is denser than glass (Otsu on optical density, held between limits) and coloured or
textured; specks go and small holes close, by area. Ink, darkness and blur are flagged apart and
left in the mask, for a plan to leave out. A model of your own or an outline drawn by hand can take
the place of the thresholds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

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
COLOURLESS = 0.02
"""Spread of density over R, G, B below which nothing is stained: shadows, grease, cover slips."""
SMOOTH = 0.02
"""Local deviation of density below which there is no texture."""
FLAGS = ("pen", "dark", "blur")
PEN_DENSITY = 0.2
PEN_GREEN = 0.75
"""Blue and green ink absorb red and let green through; haematoxylin, eosin and DAB do not."""
DARK = 40
BLUR_MPP = 2.0
BLUR_SHARPNESS = 0.1
"""Mean Laplacian over mean density at 2 um per pixel: 0.3 to 1.5 in focus, below 0.08 when blurred
by a Gaussian of 4 um (measured on four H&E slides)."""
TISSUE_REVISION = 2
_BLUR_WINDOW_UM = 64.0
_STRIP_PIXELS = 1 << 24


class TissueModel(Protocol):
    """A network or rule of your own that finds tissue; equal `fingerprint` means equal masks.

    It is called with the whole slide at `mpp` um per pixel (at least 1, or the memory for the image
    gives out), uint8 RGB [h, w, 3], and returns the share of tissue in each pixel, bool or float
    [h, w] between 0 and 1. What lies above one half is tissue; specks and holes are kept.
    """

    mpp: float
    fingerprint: str

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Share of tissue [h, w] of an image [h, w, 3]."""
        ...


@dataclass(frozen=True, slots=True)
class TissueMask:
    """Tissue of one slide on its overview.

    `mask` bool [h, w], the masks of `flags` and `overview` uint8 [h, w, 3] share one grid whose
    pixel measures `scale` (x, y) level-0 pixels. `threshold` is the optical density used (NaN where
    none was), `threshold_source` says whether Otsu chose it (`otsu`), it was held to a limit
    (`all glass`, `all tissue`), or the mask comes from elsewhere (`model`, `outline`).
    """

    mask: np.ndarray
    overview: np.ndarray
    scale: tuple[float, float]
    threshold: float
    threshold_source: str
    flags: dict[str, np.ndarray] = field(default_factory=dict)


def find_tissue(
    reader: SlideReader, *, model: TissueModel | None = None, blur: bool = False
) -> TissueMask:
    """Mask the tissue on an overview of 8 um per pixel, finer where the slide is small.

    With `model`, that decides instead of the thresholds. With `blur`, the slide is read once more
    at 2 um per pixel to flag what is out of focus.
    """
    overview = read_overview(reader)
    height, width = overview.shape[:2]
    scale = (reader.dimensions[0] / width, reader.dimensions[1] / height)
    stain = _stain_density(overview)
    flags = {"pen": _pen(stain), "dark": overview.max(axis=2) < DARK}
    if model is None:
        mask, threshold, source = _threshold_mask(stain, flags["dark"], reader.mpp, scale)
    else:
        mask, threshold, source = _model_mask(reader, model, (width, height)), np.nan, "model"
    if blur:
        flags["blur"] = _blurred(reader, mask, scale)
    return TissueMask(mask, overview, scale, float(threshold), source, flags)


def read_overview(reader: SlideReader, mpp: float | None = None) -> np.ndarray:
    """Read the whole slide as a small uint8 RGB image, in strips of bounded memory.

    At `mpp` um per pixel; by default at 8, finer where the shorter side would have fewer than 256
    pixels. Never finer than the slide.
    """
    width0, height0 = reader.dimensions
    finest = reader.mpp * max(1.0, min(width0, height0) / OVERVIEW_MIN_PX)
    wanted = min(OVERVIEW_MPP, finest) if mpp is None else mpp
    size = _size_at(reader, wanted)
    return np.concatenate([pixels for _, pixels in _strips(reader, size)])


def area_share(
    mask: np.ndarray, scale: tuple[float, float], xy0: np.ndarray, size0: float
) -> np.ndarray:
    """Share of `mask` [h, w], float32 [N], in squares of `size0` level-0 pixels at `xy0` [N, 2].

    A pixel of the mask measures `scale` (x, y) level-0 pixels. Exact areas: the integral image is
    read between its nodes by bilinear interpolation.
    """
    height, width = mask.shape
    integral = np.zeros((height + 1, width + 1), dtype=np.float64)
    integral[1:, 1:] = mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    left, top = xy0[:, 0] / scale[0], xy0[:, 1] / scale[1]
    right = np.minimum(left + size0 / scale[0], width)
    bottom = np.minimum(top + size0 / scale[1], height)
    inside = (
        _between(integral, bottom, right)
        - _between(integral, top, right)
        - _between(integral, bottom, left)
        + _between(integral, top, left)
    )
    area = (right - left) * (bottom - top)
    return np.clip(inside / area, 0.0, 1.0).astype(np.float32)


def tissue_fraction(tissue: TissueMask, xy0: np.ndarray, size0: float) -> np.ndarray:
    """Share of tissue, float32 [N], in squares of `size0` level-0 pixels at `xy0` [N, 2]."""
    return area_share(tissue.mask, tissue.scale, xy0, size0)


def _size_at(reader: SlideReader, mpp: float) -> tuple[int, int]:
    """Width and height of the slide at `mpp`, or at its own resolution if that is coarser."""
    downsample = max(1.0, mpp / reader.mpp)
    width0, height0 = reader.dimensions
    return max(1, round(width0 / downsample)), max(1, round(height0 / downsample))


def _strips(reader: SlideReader, size: tuple[int, int]) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows, uint8 RGB [n, width, 3]) of the whole slide at `size` (width, height)."""
    width, height = size
    downsample = min(reader.dimensions[0] / width, reader.dimensions[1] / height)
    level = max(
        i for i, d in enumerate(reader.level_downsamples) if i == 0 or d <= downsample * 1.01
    )
    level_width, level_height = reader.level_dimensions[level]
    rows_per_strip = max(1, int(_STRIP_PIXELS * height / (level_width * level_height)))
    for start in range(0, height, rows_per_strip):
        stop = min(height, start + rows_per_strip)
        top, bottom = start * level_height / height, stop * level_height / height
        first, last = int(top), min(level_height, int(np.ceil(bottom)))
        y0 = round(first * reader.level_downsamples[level])
        pixels = reader.read_region(0, y0, level_width, last - first, level)
        shrunk = _shrink(pixels, (width, stop - start), (top - first, bottom - first))
        yield slice(start, stop), shrunk


def _shrink(pixels: np.ndarray, size: tuple[int, int], rows: tuple[float, float]) -> np.ndarray:
    box = (0, rows[0], pixels.shape[1], rows[1])
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX, box=box))


def _stain_density(overview: np.ndarray) -> np.ndarray:
    """Optical density [3, h, w] of R, G, B against this slide's own glass, not smoothed."""
    channels = [np.ascontiguousarray(overview[..., channel]) for channel in range(3)]
    white = np.array([_percentile(channel, 99) for channel in channels])
    if white.min() < 190 or white.max() - white.min() > 20:  # no clean glass in sight
        white = np.full(3, 245.0)
    tables = np.log10((white[:, None] + 1) / (np.arange(256) + 1)).astype(np.float32)
    return np.stack([table[channel] for table, channel in zip(tables, channels, strict=True)])


def _percentile(values: np.ndarray, percent: float) -> int:
    """Smallest byte that `percent` of the bytes do not exceed."""
    counts = np.bincount(values.ravel(), minlength=256).cumsum()
    return int(np.searchsorted(counts, percent / 100 * counts[-1]))


def _threshold_mask(
    stain: np.ndarray, dark: np.ndarray, mpp: float, scale: tuple[float, float]
) -> tuple[np.ndarray, float, str]:
    strongest = stain.max(axis=0)
    density = _smooth(strongest)
    threshold, source = _threshold(density)
    coloured = _smooth(strongest - stain.min(axis=0)) > COLOURLESS
    textured = _local_deviation(stain.mean(axis=0)) > SMOOTH
    pixel_um2 = scale[0] * scale[1] * mpp**2
    stained = (density > threshold) & (coloured | textured) & ~dark
    mask = _drop_small(stained, MIN_OBJECT_UM2 / pixel_um2)
    mask = ~_drop_small(~mask, MAX_HOLE_UM2 / pixel_um2, keep_border=True)
    return mask, threshold, source


def _threshold(density: np.ndarray) -> tuple[float, str]:
    low, high = DENSITY_LIMITS
    if density.max() <= low:
        return low, "all glass"
    if density.min() > low:
        return low, "all tissue"
    return float(np.clip(threshold_otsu(density), low, high)), "otsu"


def _model_mask(reader: SlideReader, model: TissueModel, size: tuple[int, int]) -> np.ndarray:
    image = read_overview(reader, model.mpp)
    share = np.asarray(model(image), dtype=np.float32)
    if share.shape != image.shape[:2] or not (share.min() >= 0 and share.max() <= 1):
        raise ValueError(
            f"a tissue model must return {image.shape[:2]} values between 0 and 1; got shape "
            f"{share.shape} from {share.min()} to {share.max()}"
        )
    return np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BOX)) > 0.5


def _pen(stain: np.ndarray) -> np.ndarray:
    red, green = _smooth(stain[0]), _smooth(stain[1])
    return (red > PEN_DENSITY) & (green < PEN_GREEN * red)


def _blurred(reader: SlideReader, mask: np.ndarray, scale: tuple[float, float]) -> np.ndarray:
    """Where tissue [h, w] has no detail at 2 um per pixel, in windows of 64 um."""
    height, width = mask.shape
    fine = _size_at(reader, BLUR_MPP)
    size = max(fine[0], width), max(fine[1], height)
    detail, density = np.zeros((2, *mask.shape))
    for rows, pixels in _strips(reader, size):
        stain = -np.log10((pixels.mean(axis=2) + 1) / 256)
        # each row of the strip belongs to a row of the mask, each column to a column
        starts = np.arange(rows.start, rows.stop) * height // size[1]
        for total, values in ((detail, np.abs(ndimage.laplace(stain))), (density, stain)):
            columns = np.add.reduceat(values, _first_of(width, size[0]), axis=1)
            np.add.at(total, starts, columns)
    window = [max(1, round(_BLUR_WINDOW_UM / (reader.mpp * s))) for s in reversed(scale)]
    detail, density = (ndimage.uniform_filter(v, window, mode="nearest") for v in (detail, density))
    return mask & (detail < BLUR_SHARPNESS * density)


def _first_of(bins: int, count: int) -> np.ndarray:
    """First index of each of `bins` equal parts of `count` positions, as `i * bins // count`."""
    return -(-np.arange(bins) * count // bins)


def _smooth(values: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter(values, size=3, mode="nearest")


def _local_deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation in squares of 5 x 5 pixels."""
    mean = ndimage.uniform_filter(values, size=5, mode="nearest")
    mean_square = ndimage.uniform_filter(values**2, size=5, mode="nearest")
    return np.sqrt(np.maximum(0.0, mean_square - mean**2))


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
