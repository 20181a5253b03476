"""Small slides made on the spot."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipelines.pathology.scale import draw_tissue
from pipelines.pathology.store import SCHEMA, Provenance, encoder_entry, slide_folder, write_group

SlideWriter = Callable[..., Path]


@pytest.fixture
def paint() -> Callable[..., np.ndarray]:
    """Paint glass with a pink, grainy rectangle of tissue."""

    def draw(height: int, width: int, tissue: tuple[slice, slice] | None = None) -> np.ndarray:
        rng = np.random.default_rng(0)
        image = rng.integers(241, 246, size=(height, width, 3))
        if tissue is not None:
            stained = rng.integers(-25, 25, size=(height, width, 1)) + np.array([200, 110, 170])
            image[tissue] = stained[tissue]
        return image.astype(np.uint8)

    return draw


@pytest.fixture
def write_tiff() -> SlideWriter:
    """Write an image as a tiled TIFF that OpenSlide reads: losslessly, with `mpp` if given."""

    def write(
        path: Path,
        image: np.ndarray,
        *,
        mpp: float | None = 0.5,
        mpp_y: float | None = None,
        levels: tuple[int, ...] = (1,),
    ) -> Path:
        with tifffile.TiffWriter(path) as tiff:
            for level in levels:
                options = {}
                if mpp is not None:
                    ratio = [round(1e7 / (v * level)) for v in (mpp, mpp_y or mpp)]
                    options = {
                        "resolution": tuple((value, 1000) for value in ratio),
                        "resolutionunit": "CENTIMETER",
                    }
                tiff.write(
                    np.asarray(Image.fromarray(image).reduce(level)),
                    photometric="rgb",
                    tile=(64, 64),
                    compression="deflate",
                    subfiletype=int(level > 1),
                    metadata=None,
                    **options,
                )
        return path

    return write


@pytest.fixture
def tissue_slide(tmp_path: Path, write_tiff: SlideWriter, paint: Callable[..., np.ndarray]) -> Path:
    """A slide of 640 x 512 px with tissue in x 128..512, y 128..384."""
    image = paint(512, 640, (slice(128, 384), slice(128, 512)))
    folder = tmp_path / "slides"
    folder.mkdir()
    return write_tiff(folder / "tissue.tiff", image)


def write_stored(store: Path, slide_id: str, grid: np.ndarray, features: np.ndarray) -> None:
    """Store cells [N, 2] with features [N, E] as a slide without a picture."""
    provenance = Provenance(slide_id, None, "drawn", "drawn", f"drawn-{features.shape[1]}")
    attributes = {
        "schema": SCHEMA,
        "slide_id": slide_id,
        "dimensions": [10_000, 10_000],
        "mpp": 0.5,
        "pitch0": 256.0,
        "encoders": {"drawn": encoder_entry(provenance.encoder_fingerprint, asdict(provenance))},
    }
    arrays = {
        "grid": grid.astype(np.int32),
        "xy0": grid.astype(np.int64) * 256,
        "tissue": np.ones(len(grid), dtype=np.float32),
        "features/drawn": features.astype(np.float32),
    }
    write_group(slide_folder(store, slide_id), attributes, arrays)


def draw_stored(
    store: Path, burdens: list[float], *, names: list[str] | None = None, seed: int = 0
) -> list[str]:
    """Store slides of 20 to 40 tiles, of which a share (the burden, 0 to 1) is tumour.

    Tumour tiles stand at 4 in the first of six normal features.
    """
    names = names or [f"s{number:03d}" for number in range(len(burdens))]
    for number, (name, burden) in enumerate(zip(names, burdens, strict=True)):
        rng = np.random.default_rng([seed, number])
        grid = draw_tissue(int(rng.integers(20, 40)), seed=seed + number)
        features = rng.normal(size=(len(grid), 6))
        features[rng.random(len(grid)) < burden, 0] += 4.0
        write_stored(store, name, grid, features)
    return names


@pytest.fixture(scope="session")
def store_slide() -> Callable[..., None]:
    return write_stored


@pytest.fixture(scope="session")
def draw_slides() -> Callable[..., list[str]]:
    return draw_stored
