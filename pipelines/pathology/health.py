"""What the doctor asks of this pipeline: its libraries, by trying them, and its stores."""

import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import openslide
import tifffile

from pipelines.pathology.reading import TileReader
from pipelines.pathology.slides import open_slide
from pipelines.pathology.store import SCHEMA, check_content
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.doctor import Finding

STORES: dict[str, Callable[[Path], None]] = {SCHEMA.split("/")[0]: check_content}

_SIDE, _TILE = 128, 64
_ALIKE = 24  # grey levels: JPEG at quality 95 of a smooth picture


def parts() -> Iterator[Finding]:
    """Yield how OpenSlide and the codecs do on a slide made on the spot."""
    versions = [f"OpenSlide {openslide.__library_version__}"]
    for name in ("tifffile", "simplejpeg", "imagecodecs", "PIL"):
        versions.append(f"{name} {importlib.import_module(name).__version__}")
    yield Finding("ok", "slide libraries", ", ".join(versions))
    with tempfile.TemporaryDirectory() as folder:
        for source in ("openslide", "jpeg_tiles"):
            try:
                problem = _try_reading(Path(folder) / f"{source}.tiff", source)
            except Exception as error:  # whatever a broken library raises is the finding
                problem = f"{type(error).__name__}: {error}"
            text = problem or "tiles come out as they should"
            yield Finding("missing" if problem else "ok", f"slides by {source}", text)


def _try_reading(path: Path, source: str) -> str | None:
    """Write a slide, read its tiles, and say what is wrong with them."""
    ramp = np.linspace(60, 220, _SIDE)
    image = np.stack([*np.meshgrid(ramp, ramp), np.full((_SIDE, _SIDE), 140.0)], axis=-1)
    image = image.round().astype(np.uint8)
    tifffile.imwrite(
        path, image, tile=(_TILE, _TILE), compression="jpeg", compressionargs={"level": 95},
        photometric="rgb", resolution=(20_000, 20_000), resolutionunit="CENTIMETER", metadata=None,
    )  # fmt: skip
    corners = np.array([(x, y) for y in (0, _TILE) for x in (0, _TILE)])
    plan = TilePlan(_TILE, 0.5)
    with open_slide(path) as slide, TileReader(slide, plan, source=source) as tiles:  # type: ignore[arg-type]
        batch = tiles.read(corners)
    expected = [image[y : y + _TILE, x : x + _TILE] for x, y in corners]
    if not batch.valid.all():
        return f"a sound slide is called damaged: {batch.damage}"
    apart = int(np.abs(batch.pixels.astype(np.int16) - np.stack(expected)).max())
    return None if apart <= _ALIKE else f"pixels come out wrong, by {apart} grey levels"
