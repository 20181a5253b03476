"""Turn tiles into feature vectors: what an encoder is, and the built-in statistics."""

import importlib
import inspect
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from pipelines.shared.errors import InputError

ENCODERS = {
    "stats": "pipelines.pathology.encoding:StatsEncoder",
    "timm": "pipelines.pathology.tile_networks:TimmEncoder",
    "huggingface": "pipelines.pathology.tile_networks:HuggingFaceEncoder",
    "torch": "pipelines.pathology.tile_networks:TorchEncoder",
}
"""Encoders by the `name` of their configuration; imported when they are used."""

_STATS_REVISION = 2
_MIN_SIDE = 24  # the coarsest scale keeps a pixel with all its neighbours
_QUANTILES = (0.05, 0.5, 0.95)
_NUM_SCALES = 3  # the first of 2 x 2 pixels, each half the one before
_COLOUR_BLOCK = 4  # pixels a side that colours are averaged over
_TOLERANCE = 4  # of a pattern: one part in so many of the spread of grey values
_STAIN_BINS = 256
# Ruifrok and Johnston 2001: haematoxylin and eosin in optical density, and their residual
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_STAIN_RANGE = (-0.3, 1.2)
# the eight neighbours of a pixel, once around
_RING = ((-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1))


class TileEncoder(Protocol):
    """Maps tiles to vectors; equal `name` and `fingerprint` mean equal features.

    `in_workers` tells whether copies may run in worker processes (cheap to send, one thread);
    `feature_dtype` how its features are kept, `batch_size` how many tiles it takes at once.
    """

    name: str
    dim: int
    fingerprint: str
    in_workers: bool
    feature_dtype: np.dtype
    batch_size: int

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Encode uint8 RGB [n, h, w, 3] as float32 [n, dim]."""
        ...


def build_encoder(name: str, **options: object) -> TileEncoder:
    """Make an encoder by name, one of `ENCODERS`, with its own options.

    Raises InputError for an unknown name or option, and lists the right ones.
    """
    if name not in ENCODERS:
        raise InputError(f"unknown encoder {name!r}; choose one of: {', '.join(ENCODERS)}")
    module, _, kind = ENCODERS[name].partition(":")
    encoder = getattr(importlib.import_module(module), kind)
    known = inspect.signature(encoder).parameters
    wrong = [option for option in options if option not in known]
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in options]
    if wrong or missing:
        found = f"unknown option {wrong[0]!r}" if wrong else f"option {missing[0]!r} is missing"
        raise InputError(f"encoder {name!r}: {found}; its options are: {', '.join(known)}")
    made: TileEncoder = encoder(**options)
    return made


class StatsEncoder:
    """Stain and texture statistics; needs no weights and no download.

    Colour: mean, spread and quantiles of R, G, B and of the haematoxylin and eosin densities
    (Ruifrok and Johnston 2001), optical densities. Texture at three scales: gradient and Laplacian
    energy, local spread, correlation of neighbours, rotation-invariant local binary patterns
    (Ojala et al. 2002), in which a neighbour counts as brighter from a quarter of the spread on
    (a threshold as that of Heikkila and Pietikainen 2006, here in proportion).

    What a scan holds at the size of single pixels is the scanner's sharpness and what JPEG made of
    it, its colours being stored at half the resolution. Texture is therefore taken from means of
    2 x 2 pixels on, colour from means of 4 x 4, so that a slide has nearly the same numbers
    whichever resolution it was scanned at.

    With `grey` each tile is reduced to grey values of zero mean and unit spread, and only the
    texture numbers are given: nothing of colour, brightness or contrast enters.

    A tile's numbers come from its own integer sums, so they do not depend on its batch.
    """

    in_workers = True
    feature_dtype = np.dtype(np.float32)
    batch_size = 64

    def __init__(self, grey: bool = False) -> None:
        self.grey = bool(grey)
        self.name = "stats_grey" if grey else "stats"
        self.fingerprint = f"{self.name}-{_STATS_REVISION}"
        self.dim = self(np.zeros((1, 32, 32, 3), dtype=np.uint8)).shape[1]

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Encode uint8 RGB [n, h, w, 3], h and w at least 24, as float32 [n, dim]."""
        _check_tiles(tiles)
        # tile by tile while its pixels are at hand, then the few numbers of all tiles together
        counts = [_count(tile, colour=not self.grey) for tile in tiles]
        blocks = [] if self.grey else _colour(counts)
        blocks += _texture(counts, standardise=self.grey)
        return np.stack(blocks, axis=1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class _Counts:
    """What is counted of one tile, whole numbers or ratios of two.

    Histograms `channels` [3 * 256] and `stains` [2, 256], empty for grey; by scale `means` [3, 7]
    and, but for the last, histograms `patterns` [2, 256].
    """

    channels: list[int]
    stains: list[list[int]]
    means: list[list[float]]
    patterns: list[list[int]]


def _count(tile: np.ndarray, *, colour: bool) -> _Counts:
    image = Image.fromarray(np.ascontiguousarray(tile))
    scales = [_halve(np.asarray(image.convert("L")))]
    while len(scales) < _NUM_SCALES:
        scales.append(_halve(scales[-1]))
    means = [_means(grey) for grey in scales]
    above = _tolerance(*means[0][:2])
    small = _smooth(image) if colour else None
    return _Counts(
        channels=small.histogram() if small else [],
        stains=_stain_histograms(small) if small else [],
        means=means,
        patterns=[_histogram(_pattern_codes(grey, above)) for grey in scales[:-1]],
    )


def _smooth(image: Image.Image) -> Image.Image:
    """Means of whole blocks of pixels."""
    width, height = image.width // _COLOUR_BLOCK, image.height // _COLOUR_BLOCK
    return image.reduce(_COLOUR_BLOCK).crop((0, 0, width, height))


def _tolerance(mean: float, square: float) -> int:
    """Grey levels that a neighbour must be brighter by, of mean and mean square."""
    return int(np.sqrt(max(square - mean * mean, 0.0)) / _TOLERANCE + 0.5)


def _check_tiles(tiles: np.ndarray) -> None:
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
        raise ValueError(f"tiles must be uint8 [n, h, w, 3]; got {tiles.dtype} {tiles.shape}")
    if min(tiles.shape[1:3]) < _MIN_SIDE:
        raise ValueError(f"tiles must be at least {_MIN_SIDE} px a side; got {tiles.shape}")


def _density_tables() -> np.ndarray:
    """What a channel's value adds to each stain's density, int32 [2, 3, 256].

    Fixed point, so that no rounding depends on how a loop is vectorised.
    """
    unmix = np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True))
    return np.rint(unmix.T[:2, :, None] * _DENSITY / _STAIN_STEP).astype(np.int32)


_DENSITY = -np.log10((np.arange(256) + 1) / 256)
_STAIN_STEP = (_STAIN_RANGE[1] - _STAIN_RANGE[0]) / _STAIN_BINS / 256
_DENSITY_TABLES = _density_tables()


def _colour(counts: list[_Counts]) -> list[np.ndarray]:
    """Columns [n] from histograms of R, G, B and of the two stains."""
    blocks: list[np.ndarray] = []
    channels = np.array([count.channels for count in counts]).reshape(-1, 3, 256)
    for channel in range(3):
        blocks += _summary(channels[:, channel], np.arange(256) / 255)
        blocks += _moments(channels[:, channel], _DENSITY)
    stains = np.array([count.stains for count in counts])
    low, high = _STAIN_RANGE
    centres = low + (np.arange(_STAIN_BINS) + 0.5) * (high - low) / _STAIN_BINS
    for stain in range(2):
        blocks += _summary(stains[:, stain], centres)
    return blocks


def _stain_histograms(image: Image.Image) -> list[list[int]]:
    """Counts [2, bins] of haematoxylin and of eosin."""
    channels = [np.asarray(channel) for channel in image.split()]
    counts = []
    for tables in _DENSITY_TABLES:
        value = tables[0].take(channels[0])
        value += tables[1].take(channels[1])
        value += tables[2].take(channels[2])
        value -= round(_STAIN_RANGE[0] / _STAIN_STEP)
        value >>= 8
        counts.append(_histogram(value.clip(0, _STAIN_BINS - 1, out=value).astype(np.uint8)))
    return counts


def _texture(counts: list[_Counts], *, standardise: bool) -> list[np.ndarray]:
    """Columns [n] of texture at three scales."""
    blocks: list[np.ndarray] = []
    unit = np.full(len(counts), 255.0)
    for scale in range(_NUM_SCALES):
        means = np.array([count.means[scale] for count in counts])
        variance = np.maximum(means[:, 1] - means[:, 0] ** 2, 0.0)
        if standardise and scale == 0:
            unit = np.sqrt(np.where(variance > 0, variance, 1.0))
        if scale > 0 or not standardise:  # the unit itself otherwise
            blocks.append(np.sqrt(variance) / unit)
        blocks += _energies(means[:, 2:], variance, unit)
        if scale < _NUM_SCALES - 1:
            blocks += _pattern_shares(np.array([count.patterns[scale] for count in counts]))
    return blocks


def _means(grey: np.ndarray) -> list[float]:
    """Mean and mean square of grey values and of steps right and down; Laplacian's mean square."""
    right = _distance(grey[:, 1:], grey[:, :-1])
    down = _distance(grey[1:], grey[:-1])
    pairs = [moment for values in (grey, right, down) for moment in _mean_and_square(values)]
    return [*pairs, _laplacian_square(grey)]


def _energies(means: np.ndarray, variance: np.ndarray, unit: np.ndarray) -> list[np.ndarray]:
    right, right_square, down, down_square, laplacian_square = means.T
    square = (right_square + down_square) / 2
    return [
        (right + down) / 2 / unit,
        np.sqrt(square) / unit,
        np.sqrt(laplacian_square) / unit,
        # correlation of neighbours, from E[(a - b)^2] = 2 var (1 - r)
        1 - np.minimum(square / 2 / np.maximum(variance, 1e-12), 2.0),
    ]


def _halve(grey: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels of [h, w]; an odd last row or column is left out."""
    height, width = grey.shape[0] // 2 * 2, grey.shape[1] // 2 * 2
    rows = np.add(grey[:height:2, :width], grey[1:height:2, :width], dtype=np.uint16)
    total = rows[:, ::2] + rows[:, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute difference of uint8, as uint8."""
    return np.maximum(a, b) - np.minimum(a, b)


def _laplacian_square(grey: np.ndarray) -> float:
    """Mean square of the four neighbours' sum less four times the pixel."""
    wide = grey.astype(np.int16)
    value = wide[1:-1, 2:] + wide[1:-1, :-2]
    value += wide[2:, 1:-1]
    value += wide[:-2, 1:-1]
    value -= wide[1:-1, 1:-1] << 2
    return _total(np.multiply(value, value, dtype=np.int32)) / value.size


def _pattern_shares(counts: np.ndarray) -> list[np.ndarray]:
    """Shares [n] of the ten uniform rotation-invariant patterns among codes [n, 256]."""
    shares = counts / counts.sum(axis=1, keepdims=True)
    return [_row_sum(shares[:, kind == _UNIFORM]) for kind in range(10)]


def _pattern_codes(grey: np.ndarray, above: int) -> np.ndarray:
    """Which neighbours of a pixel reach its value and `above`, as bits: uint8 [h - 2, w - 2].

    What would lie above white is white.
    """
    height, width = grey.shape
    pixels = grey.reshape(-1)
    wanted = np.minimum(pixels, 255 - above) + np.uint8(above)
    # without its first and last row the image is one run of pixels: one loop each, not one per row
    inner = slice(width + 1, height * width - width - 1)
    code = np.zeros((height - 2) * width, dtype=np.uint8)
    bits = code[: inner.stop - inner.start]
    for dy, dx in reversed(_RING):
        step = dy * width + dx
        bits += bits  # a shift by one bit, which NumPy does faster as a sum
        bits += (pixels[inner.start + step : inner.stop + step] >= wanted[inner]).view(np.uint8)
    return code.reshape(height - 2, width)[:, :-2]


def _uniform_patterns() -> np.ndarray:
    """Class of each code: number of set bits if they are one run, else 9."""
    codes = np.arange(256)
    bits = codes[:, None] >> np.arange(8) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), 9)


_UNIFORM = _uniform_patterns()


def _histogram(values: np.ndarray) -> list[int]:
    """Counts [256] of uint8 [h, w]."""
    # Pillow counts bytes as they are; NumPy would first make eight bytes of each
    return Image.fromarray(np.ascontiguousarray(values)).histogram()


def _summary(counts: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Mean, spread and quantiles [n] of a distribution `counts` [n, bins] over `values`."""
    cumulated = counts.cumsum(axis=1)
    total = cumulated[:, -1:]
    quantiles = [values[(cumulated < q * total).sum(axis=1)] for q in _QUANTILES]
    return [*_moments(counts, values), *quantiles]


def _moments(counts: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    total = counts.sum(axis=1)
    mean = _row_sum(counts * values) / total
    square = _row_sum(counts * (values - mean[:, None]) ** 2) / total
    return [mean, np.sqrt(square)]


def _row_sum(values: np.ndarray) -> np.ndarray:
    """Sum [n, m] along m from left to right: each row alike, whatever n is."""
    return values.cumsum(axis=1, dtype=np.float64)[:, -1]


def _mean_and_square(values: np.ndarray) -> tuple[float, float]:
    """Mean and mean square of uint8 [h, w], from whole numbers."""
    squares = np.multiply(values, values, dtype=np.uint16)
    return _total(values) / values.size, _total(squares) / values.size


def _total(values: np.ndarray) -> int:
    """Sum of whole numbers [h, w], rows first: they are short enough for 32 bits."""
    return int(values.sum(axis=1, dtype=np.uint32).sum(dtype=np.int64))
