"""Make a cohort of slides whose classes differ in the arrangement of their tiles alone.

Real pyramidal JPEG TIFF files with tissue drawn after H&E. Slides come in pairs of two patients:
one of each class, made of the same tiles in another order. JPEG blocks (8 px, no chroma
subsampling) never straddle a tile, on no level of the pyramid, so both slides of a pair give the
same tile features bit for bit.

    near   class 1: every tumour nest (A) has lymphocytes (B) beside it    . . A B . .
           class 0: none lie within 3 tiles                                A . . . . B
    far    class 1: the A-rich island lies left of the B-rich one          AA.A      B.BB
           class 0: right of it; the glass between stops any local window  B.BB      AA.A

A third kind of cohort is for models that pool: here the arrangement says nothing.

    bag    class 1: many B, anywhere; class 0: few                         B..B      ...B
"""

import functools
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import tifffile
from PIL import Image
from scipy import ndimage

from pipelines.pathology.progress import track
from pipelines.shared.asides import aside_of
from pipelines.shared.errors import InputError

Variant = Literal["near", "far", "bag"]
TILE_PX = 64
MPP = 0.5
_PYRAMID = (1, 2, 4)
_JPEG_TILE_PX = 256
_JPEG_QUALITY = 88
_REVISION = 1
# last part of each seed; never 0, which NumPy's seeding drops at the end
_TABLE, _ARRANGEMENT, _STAIN, _TILES = range(1, 5)

GLASS, STROMA, MUSCLE, MUCOSA, NEST, LYMPHOCYTES = range(6)
BACKGROUND = (STROMA, MUSCLE, MUCOSA)
TILES_PER_KIND = 16
# haematoxylin and eosin as they look on a scanner: optical density of red, green, blue
_STAINS = np.array([[0.62, 0.74, 0.36], [0.10, 0.86, 0.46]])
_GLASS_WHITE = np.array([244.0, 243.0, 245.0])

NEAR_SIDE = 16  # tiles; the outermost ring is glass
NEAR_TISSUE = (105, 140)
NEAR_MARKERS = 5  # of each kind
NEAR_APART = 3  # in class 0 no A lies within this distance of a B

FAR_ISLAND = (8, 6)  # rows, columns
FAR_SHIFT = 20  # columns between the two islands' left edges
FAR_TISSUE = (30, 40)  # tiles of one island
FAR_MARKER_SHARE = 0.45

BAG_MARKERS = (3.0, 9.0)  # of B in class 0 and class 1, means of Poisson's distribution


@dataclass(frozen=True, slots=True)
class CohortParams:
    """What a cohort is made from; equal values give equal files."""

    variant: Variant
    num_pairs: int
    test_pairs: int
    val_pairs: int
    seed: int
    revision: int = _REVISION


@dataclass(frozen=True, slots=True)
class _Slide:
    path: Path
    variant: Variant
    seed: int
    pair: int
    label: int


@dataclass(frozen=True, slots=True)
class _Look:
    """How a kind of tile is drawn: densities, streaks, and nuclei (long and short half axis)."""

    haematoxylin: float
    eosin: float
    fibre_length: float
    fibre_contrast: float
    num_nuclei: tuple[int, int]
    nucleus_px: tuple[float, float]
    nucleus_haematoxylin: float


_LOOKS = {
    GLASS: _Look(0.0, 0.0, 2.0, 0.0, (0, 1), (1.0, 1.0), 0.0),
    STROMA: _Look(0.05, 0.17, 6.0, 0.28, (3, 7), (5.5, 1.9), 0.60),
    MUSCLE: _Look(0.05, 0.30, 7.0, 0.14, (2, 5), (7.0, 1.8), 0.55),
    MUCOSA: _Look(0.13, 0.17, 2.5, 0.18, (6, 11), (5.5, 4.0), 0.45),
    NEST: _Look(0.26, 0.20, 2.5, 0.15, (11, 16), (8.0, 6.0), 0.70),
    LYMPHOCYTES: _Look(0.06, 0.10, 3.0, 0.25, (28, 40), (4.0, 3.7), 0.90),
}


def make_cohort(
    folder: str | Path,
    *,
    variant: Variant = "near",
    num_pairs: int = 110,
    test_pairs: int = 30,
    val_pairs: int = 15,
    seed: int = 0,
    workers: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Write `slides/<slide_id>.tiff` and `labels.csv`, and return that table, all of it text.

    Columns: slide_id, patient_id, label (0 or 1), pair, split (train, val, test). A pair keeps to
    one split. A complete cohort of the same parameters is kept as it is. Raises InputError
    for a folder that holds something else.
    """
    params = CohortParams(variant, num_pairs, test_pairs, val_pairs, seed)
    _check(params)
    folder = Path(folder)
    table = _labels(params)
    if _is_complete(folder, params):
        return table
    (folder / "slides").mkdir(parents=True, exist_ok=True)
    _write_aside(folder / "cohort.json", json.dumps(asdict(params), indent=2) + "\n")
    slides = [
        _Slide(folder / "slides" / f"{row.slide_id}.tiff", variant, seed, index // 2, label)
        for index, (row, label) in enumerate(
            zip(table.itertuples(), table["label"].astype(int), strict=True)
        )
    ]
    written = _write_all(slides, workers)
    for _ in track(written, total=len(slides), label="slides", enabled=progress):
        pass
    _write_aside(folder / "labels.csv", table.to_csv(index=False))
    return table


def arrange_pair(variant: Variant, *, seed: int, pair: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both slides of a pair, class 0 first, as indices into `draw_tiles`.

    Each is int64 [rows, cols]; `index // TILES_PER_KIND` is the kind of the tile.
    """
    arrange = {"near": _arrange_near, "far": _arrange_far, "bag": _arrange_bag}[variant]
    return arrange(np.random.default_rng([seed, pair, _ARRANGEMENT]))


def _check(params: CohortParams) -> None:
    if params.variant not in get_args(Variant):
        raise InputError(
            f"unknown cohort variant {params.variant!r}; choose one of: "
            f"{', '.join(get_args(Variant))}"
        )
    train = params.num_pairs - params.test_pairs - params.val_pairs
    if min(train, params.test_pairs, params.val_pairs) < 1:
        raise InputError(
            f"{params.num_pairs} pairs leave {train} to train on beside {params.test_pairs} test "
            f"and {params.val_pairs} validation pairs; every split needs at least one"
        )


def _is_complete(folder: Path, params: CohortParams) -> bool:
    record, labels = folder / "cohort.json", folder / "labels.csv"
    if not record.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(f"{folder} holds other files; give an empty folder for the cohort")
        return False
    if json.loads(record.read_text()) != asdict(params):
        raise InputError(
            f"{folder} holds a cohort of other parameters ({record}); delete it or choose another"
        )
    return labels.exists()


def _labels(params: CohortParams) -> pd.DataFrame:
    rng = np.random.default_rng([params.seed, 0, _TABLE])
    num_train = params.num_pairs - params.test_pairs - params.val_pairs
    splits = ["test"] * params.test_pairs + ["val"] * params.val_pairs + ["train"] * num_train
    rng.shuffle(splits)
    rows = []
    for pair, split in enumerate(splits):
        for side, label in enumerate(rng.permutation(2)):
            number = 2 * pair + side
            slide_id = f"{params.variant}_{number:04d}"
            rows.append((slide_id, f"patient_{number:04d}", str(label), f"pair_{pair:04d}", split))
    return pd.DataFrame(rows, columns=["slide_id", "patient_id", "label", "pair", "split"])


def _write_all(slides: list[_Slide], workers: int | None) -> Iterator[None]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, max(1, len(slides) // 16))
    if workers == 1:
        yield from map(_write_slide, slides)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        yield from pool.map(_write_slide, slides, chunksize=8)


def _write_slide(slide: _Slide) -> None:
    grid = arrange_pair(slide.variant, seed=slide.seed, pair=slide.pair)[slide.label]
    stain = np.random.default_rng([slide.seed, slide.pair, _STAIN]).uniform(0.85, 1.15)
    # Beer and Lambert: more stain multiplies the optical density
    shade = np.rint(255 * (np.arange(256) / 255) ** stain).astype(np.uint8)
    mosaic = shade[draw_tiles(slide.seed)][grid].swapaxes(1, 2)
    height, width = grid.shape[0] * TILE_PX, grid.shape[1] * TILE_PX
    _write_tiff(slide.path, mosaic.reshape(height, width, 3))


def _write_tiff(path: Path, image: np.ndarray) -> None:
    aside = aside_of(path)
    with tifffile.TiffWriter(aside) as tiff:
        for reduction in _PYRAMID:
            pixels_per_cm = round(1e4 / (MPP * reduction))
            tiff.write(
                np.asarray(Image.fromarray(image).reduce(reduction)),
                photometric="rgb",  # of the array; the file holds YCbCr
                tile=(_JPEG_TILE_PX, _JPEG_TILE_PX),
                compression="jpeg",
                compressionargs={"level": _JPEG_QUALITY},
                subsampling=(1, 1),
                resolution=(pixels_per_cm, pixels_per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=int(reduction > 1),
                metadata=None,
                software=False,
            )
    os.replace(aside, path)


def _write_aside(path: Path, text: str) -> None:
    aside = aside_of(path)
    aside.write_text(text)
    os.replace(aside, path)


def _arrange_near(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Put A and B on one set of dominoes (class 1), or swap the B's with a twin set (class 0).

    Both sets are drawn alike, so where A lies, where B lies, and how each lies among its own kind
    is distributed equally in both classes. Only how B lies to A differs.
    """
    dominoes = None
    while dominoes is None:
        tissue = np.pad(_blob(rng, (NEAR_SIDE - 2, NEAR_SIDE - 2), NEAR_TISSUE), 1)
        dominoes = _draw_dominoes(rng, tissue)
    first, second = dominoes  # [K, 2, 2]: domino, half, (row, column)
    kinds = _backdrop(rng, tissue)
    kinds[tuple(first[:, 0].T)] = NEST
    kinds[tuple(first[:, 1].T)] = LYMPHOCYTES
    touching = _choose_tiles(rng, kinds)
    apart = touching.copy()
    here, there = tuple(first[:, 1].T), tuple(second[:, 1].T)
    apart[here], apart[there] = touching[there], touching[here]
    return apart, touching


def _draw_dominoes(
    rng: np.random.Generator, tissue: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Two sets of NEAR_MARKERS pairs of neighbours on tissue, the sets more than NEAR_APART apart.

    None where the draw runs into a corner.
    """
    cells = np.argwhere(tissue)
    steps = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
    halves = (cells[:, None] + steps).reshape(-1, 2)
    candidates = np.stack([np.repeat(cells, 4, axis=0), halves], axis=1)  # [M, 2, 2]
    candidates = candidates[tissue[tuple(halves.T)]]
    free = [np.ones(len(candidates), dtype=bool) for _ in range(2)]
    drawn: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for turn in range(2 * NEAR_MARKERS):
        side = turn % 2
        choices = np.flatnonzero(free[side])
        if len(choices) == 0:
            return None
        domino = candidates[rng.choice(choices)]
        drawn[side].append(domino)
        distance = np.abs(candidates[:, :, None] - domino).max(axis=-1).min(axis=(1, 2))
        free[side] &= distance > 0
        free[1 - side] &= distance > NEAR_APART
    first = int(rng.integers(2))  # a set may profit from being drawn first: toss for it
    return np.stack(drawn[first]), np.stack(drawn[1 - first])


def _arrange_far(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two islands of one shape, moved as they are: only their order differs."""
    rows, cols = FAR_ISLAND
    tissue = _blob(rng, FAR_ISLAND, FAR_TISSUE)
    islands = [_choose_tiles(rng, _far_island(rng, tissue, kind)) for kind in (NEST, LYMPHOCYTES)]
    top, left = rng.integers(1, 4, size=2)
    glass = _choose_tiles(rng, np.full((rows + 4, FAR_SHIFT + cols + 4), GLASS))
    pair = []
    for order in ((1, 0), (0, 1)):
        grid = glass.copy()
        for place, island in enumerate(order):
            start = left + place * FAR_SHIFT
            window = grid[top : top + rows, start : start + cols]
            window[tissue] = islands[island][tissue]
        pair.append(grid)
    return pair[0], pair[1]


def _arrange_bag(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two slides of their own, few or many of their tiles B."""
    pair = []
    for markers in BAG_MARKERS:
        tissue = np.pad(_blob(rng, (NEAR_SIDE - 2, NEAR_SIDE - 2), NEAR_TISSUE), 1)
        kinds = _backdrop(rng, tissue)
        cells = rng.permutation(np.argwhere(tissue))
        kinds[tuple(cells[: rng.poisson(markers)].T)] = LYMPHOCYTES
        pair.append(_choose_tiles(rng, kinds))
    return pair[0], pair[1]


def _far_island(rng: np.random.Generator, tissue: np.ndarray, marker: int) -> np.ndarray:
    kinds = _backdrop(rng, tissue)
    cells = rng.permutation(np.argwhere(tissue))
    kinds[tuple(cells[: round(FAR_MARKER_SHARE * len(cells))].T)] = marker
    return kinds


def _blob(
    rng: np.random.Generator, shape: tuple[int, int], num_cells: tuple[int, int]
) -> np.ndarray:
    """One connected piece of tissue without holes, bool `shape`, of about `num_cells` cells."""
    axes = [np.linspace(-1, 1, side) for side in shape]
    radius = np.hypot(*np.meshgrid(*axes, indexing="ij"))
    while True:
        relief = ndimage.gaussian_filter(rng.normal(size=shape), 1.5, mode="nearest")
        height = 0.35 * relief / relief.std() - radius
        wanted = rng.integers(num_cells[0], num_cells[1] + 1)
        labels, _ = ndimage.label(height >= np.sort(height, axis=None)[-wanted])
        largest = labels == np.bincount(labels[labels > 0]).argmax()
        tissue = ndimage.binary_fill_holes(largest)
        if num_cells[0] <= tissue.sum() <= num_cells[1]:
            return tissue


def _backdrop(rng: np.random.Generator, tissue: np.ndarray) -> np.ndarray:
    """Kinds int64 [rows, cols]: patches of the three background tissues, glass around."""
    fields = [ndimage.gaussian_filter(rng.normal(size=tissue.shape), 1.2) for _ in BACKGROUND]
    return np.where(tissue, np.array(BACKGROUND)[np.argmax(fields, axis=0)], GLASS)


def _choose_tiles(rng: np.random.Generator, kinds: np.ndarray) -> np.ndarray:
    """Index into `draw_tiles` for each cell: any of its kind."""
    return kinds * TILES_PER_KIND + rng.integers(TILES_PER_KIND, size=kinds.shape)


@functools.cache
def draw_tiles(seed: int) -> np.ndarray:
    """Draw the cohort's stock of tiles, uint8 RGB [kinds * TILES_PER_KIND, 64, 64, 3]."""
    rng = np.random.default_rng([seed, 0, _TILES])
    tiles = [_draw_tile(rng, kind) for kind in range(6) for _ in range(TILES_PER_KIND)]
    return np.stack(tiles)


def _draw_tile(rng: np.random.Generator, kind: int) -> np.ndarray:
    look = _LOOKS[kind]
    fibres = _fibres(rng, look.fibre_length)
    haematoxylin = look.haematoxylin * (1 + 0.35 * fibres)
    eosin = look.eosin * (1 + look.fibre_contrast * fibres)
    for x, y in _nucleus_centres(rng, int(rng.integers(*look.num_nuclei)), look.nucleus_px[0]):
        inside = _nucleus(rng, x, y, look.nucleus_px)
        chromatin = look.nucleus_haematoxylin * (1 + 0.25 * _fibres(rng, 1.5))
        haematoxylin += inside * (chromatin - haematoxylin)
        eosin += inside * (0.35 * look.eosin - eosin)
    density = np.stack([haematoxylin, eosin], axis=-1).clip(0) @ _STAINS
    grain = rng.normal(scale=1.2, size=(TILE_PX, TILE_PX, 1))
    return np.clip(np.rint(_GLASS_WHITE * 10**-density + grain), 0, 255).astype(np.uint8)


def _fibres(rng: np.random.Generator, length: float) -> np.ndarray:
    """Wavy streaks of zero mean and unit spread, float64 [64, 64]."""
    noise = ndimage.gaussian_filter(rng.normal(size=(96, 96)), (1.0, length), mode="wrap")
    turned = ndimage.rotate(noise, rng.uniform(15, 45), reshape=False, mode="wrap", order=1)
    streaks = turned[16:80, 16:80]
    return (streaks - streaks.mean()) / streaks.std()


def _nucleus_centres(
    rng: np.random.Generator, count: int, radius: float
) -> list[tuple[float, float]]:
    """Up to `count` centres that keep about a diameter apart."""
    centres: list[tuple[float, float]] = []
    for x, y in rng.uniform(0.8 * radius, TILE_PX - 0.8 * radius, size=(8 * count, 2)):
        near = any(np.hypot(x - u, y - v) < 1.7 * radius for u, v in centres)
        if not near and len(centres) < count:
            centres.append((x, y))
    return centres


def _nucleus(rng: np.random.Generator, x: float, y: float, size: tuple[float, float]) -> np.ndarray:
    """Soft mask of one slightly irregular ellipse, float64 [64, 64]."""
    angle = rng.uniform(0, np.pi)
    long, short = np.array(size) * rng.uniform(0.85, 1.15, size=2)
    rows, cols = np.mgrid[:TILE_PX, :TILE_PX]
    along = (cols - x) * np.cos(angle) + (rows - y) * np.sin(angle)
    across = (rows - y) * np.cos(angle) - (cols - x) * np.sin(angle)
    turn = np.arctan2(across, along)
    wobble = 1 + 0.08 * np.sin(3 * turn + rng.uniform(0, 2 * np.pi))
    radius = np.hypot(along / long, across / short) / wobble
    return 1 / (1 + np.exp((radius - 1) * 3 * short))
