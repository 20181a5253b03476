"""Small slides made on the spot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

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
