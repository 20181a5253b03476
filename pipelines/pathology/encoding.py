"""Turn tiles into feature vectors: what an encoder is, and the built-in statistics."""

import importlib
import inspect
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

_STATS_REVISION = 1
_QUANTILES = (0.05, 0.5, 0.95)
_SCALES = (1, 2, 4)
_STAIN_BINS = 256
_GROUP = 3  # tiles at once: the scratch arrays of more are mapped anew for each group
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
    (Ojala et al. 2002).

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
        """Encode uint8 RGB [n, h, w, 3], h and w at least 16, as float32 [n, dim]."""
        _check_tiles(tiles)
        tiles = np.ascontiguousarray(tiles)
        groups = range(0, len(tiles), _GROUP)
        return np.concatenate([self._encode(tiles[start : start + _GROUP]) for start in groups])

    def _encode(self, tiles: np.ndarray) -> np.ndarray:
        grey = _luma(tiles)
        blocks = _texture(grey, standardise=self.grey)
        if not self.grey:
            blocks = _colour(tiles) + blocks
        return np.stack(blocks, axis=1).astype(np.float32)


def _check_tiles(tiles: np.ndarray) -> None:
    if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
        raise ValueError(f"tiles must be uint8 [n, h, w, 3]; got {tiles.dtype} {tiles.shape}")
    if min(tiles.shape[1:3]) < 16:
        raise ValueError(f"tiles must be at least 16 px a side; got {tiles.shape}")


def _luma(tiles: np.ndarray) -> np.ndarray:
    """Grey values uint8 [n, h, w]."""
    n, height, width, _ = tiles.shape
    column = Image.fromarray(tiles.reshape(n * height, width, 3))
    return np.asarray(column.convert("L")).reshape(n, height, width)


def _halve(grey: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels of [n, h, w]; an odd last row or column is left out."""
    height, width = grey.shape[1] // 2 * 2, grey.shape[2] // 2 * 2
    wide = grey[:, :height, :width].astype(np.uint16)
    total = wide[:, ::2, ::2] + wide[:, 1::2, ::2] + wide[:, ::2, 1::2] + wide[:, 1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def _halve_rgb(tiles: np.ndarray) -> np.ndarray:
    """The same as `_halve` for [n, h, w, 3]."""
    size = tiles.shape[2], tiles.shape[1]
    images = [Image.frombuffer("RGB", size, t, "raw", "RGB", 0, 1).reduce(2) for t in tiles]
    return np.stack(images)[:, : size[1] // 2, : size[0] // 2]


def _colour(tiles: np.ndarray) -> list[np.ndarray]:
    """Columns [n] from histograms of R, G, B and of the two stains."""
    blocks: list[np.ndarray] = []
    density = -np.log10((np.arange(256) + 1) / 256)
    all_counts = _rgb_histograms(tiles)
    for channel in range(3):
        counts = all_counts[:, channel]
        blocks += _summary(counts, np.arange(256) / 255)
        blocks += _moments(counts, density)
    small = _halve_rgb(tiles)
    unmix = np.linalg.inv(_STAINS / np.linalg.norm(_STAINS, axis=1, keepdims=True))
    low, high = _STAIN_RANGE
    centres = low + (np.arange(_STAIN_BINS) + 0.5) * (high - low) / _STAIN_BINS
    for stain in range(2):
        # fixed point, so that no rounding depends on how the loop is vectorised
        step = (high - low) / _STAIN_BINS / 256
        tables = np.rint(density[:, None] * unmix[:, stain] / step).astype(np.int32)
        value = sum(np.take(tables[:, c], small[..., c]) for c in range(3)) - round(low / step)
        bins = np.clip(value >> 8, 0, _STAIN_BINS - 1).astype(np.uint8)
        blocks += _summary(_histogram(bins), centres)
    return blocks


def _texture(grey: np.ndarray, *, standardise: bool) -> list[np.ndarray]:
    """Columns [n] of texture of uint8 [n, h, w] at three scales."""
    blocks: list[np.ndarray] = []
    unit = np.full(len(grey), 255.0)
    for scale in _SCALES:
        if scale > 1:
            grey = _halve(grey)
        variance = _variance(grey)
        if standardise and scale == 1:
            unit = np.sqrt(np.where(variance > 0, variance, 1.0))
        if scale > 1 or not standardise:  # the unit itself otherwise
            blocks.append(np.sqrt(variance) / unit)
        blocks += _energies(grey, variance, unit)
        if scale < _SCALES[-1]:
            blocks += _binary_patterns(grey)
    return blocks


def _energies(grey: np.ndarray, variance: np.ndarray, unit: np.ndarray) -> list[np.ndarray]:
    right = _distance(grey[:, :, 1:], grey[:, :, :-1])
    down = _distance(grey[:, 1:], grey[:, :-1])
    square = (_mean_square(right) + _mean_square(down)) / 2
    return [
        (_mean(right) + _mean(down)) / 2 / unit,
        np.sqrt(square) / unit,
        np.sqrt(_mean_square(_laplacian(grey))) / unit,
        # correlation of neighbours, from E[(a - b)^2] = 2 var (1 - r)
        1 - np.minimum(square / 2 / np.maximum(variance, 1e-12), 2.0),
    ]


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Absolute difference of uint8, as uint8."""
    return np.maximum(a, b) - np.minimum(a, b)


def _laplacian(grey: np.ndarray) -> np.ndarray:
    """Sum of the four neighbours less four times the pixel, int16 [n, h - 2, w - 2]."""
    wide = grey.astype(np.int16)
    neighbours = wide[:, 1:-1, 2:] + wide[:, 1:-1, :-2]
    neighbours += wide[:, 2:, 1:-1]
    neighbours += wide[:, :-2, 1:-1]
    neighbours -= wide[:, 1:-1, 1:-1] << 2
    return neighbours


def _binary_patterns(grey: np.ndarray) -> list[np.ndarray]:
    """Shares of the ten uniform rotation-invariant patterns of eight neighbours."""
    height, width = grey.shape[1:]
    centre = grey[:, 1:-1, 1:-1]
    code = np.zeros(centre.shape, dtype=np.uint8)
    for dy, dx in reversed(_RING):
        neighbour = grey[:, 1 + dy : height - 1 + dy, 1 + dx : width - 1 + dx]
        code += code  # a shift by one bit, which NumPy does faster as a sum
        code += (neighbour >= centre).view(np.uint8)
    shares = _histogram(code) / (centre.shape[1] * centre.shape[2])
    return [_row_sum(shares[:, kind == _UNIFORM]) for kind in range(10)]


def _uniform_patterns() -> np.ndarray:
    """Class of each code: number of set bits if they are one run, else 9."""
    codes = np.arange(256)
    bits = codes[:, None] >> np.arange(8) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), 9)


_UNIFORM = _uniform_patterns()


def _histogram(values: np.ndarray) -> np.ndarray:
    """Counts int64 [n, 256] of uint8 [n, h, w]."""
    values = np.ascontiguousarray(values)
    size = values.shape[2], values.shape[1]
    # Pillow counts bytes as they are; NumPy would first make eight bytes of each
    counts = [Image.frombuffer("L", size, v, "raw", "L", 0, 1).histogram() for v in values]
    return np.array(counts, dtype=np.int64)


def _rgb_histograms(tiles: np.ndarray) -> np.ndarray:
    """Counts int64 [n, 3, 256] of uint8 [n, h, w, 3]."""
    size = tiles.shape[2], tiles.shape[1]
    counts = [Image.frombuffer("RGB", size, t, "raw", "RGB", 0, 1).histogram() for t in tiles]
    return np.array(counts, dtype=np.int64).reshape(len(tiles), 3, 256)


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


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean [n] of uint8 [n, h, w], from whole numbers."""
    rows = values.sum(axis=2, dtype=np.uint32)
    return rows.sum(axis=1, dtype=np.int64) / (values.shape[1] * values.shape[2])


def _mean_square(values: np.ndarray) -> np.ndarray:
    """Mean square [n] of uint8 or of int16 below 1,024 [n, h, w], from whole numbers."""
    kind = np.uint16 if values.dtype == np.uint8 else np.int32
    squares = np.multiply(values, values, dtype=kind)
    rows = squares.sum(axis=2, dtype=np.uint32)
    return rows.sum(axis=1, dtype=np.int64) / (values.shape[1] * values.shape[2])


def _variance(grey: np.ndarray) -> np.ndarray:
    return np.maximum(_mean_square(grey) - _mean(grey) ** 2, 0.0)
