"""Read many tiles of one slide: from the file's own JPEG tiles where it has them, else OpenSlide.

OpenSlide paints every region on a canvas with transparency, which costs several times the decoding.
A TIFF whose level is stored as JPEG tiles is therefore decoded directly, with the colour space that
the file states and a decoder that takes damage for an error, as OpenSlide does.
"""

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
import simplejpeg
import tifffile
from PIL import Image

from pipelines.pathology.slides import SlideError, SlideReader
from pipelines.pathology.tiling import TilePlan, choose_level

FILTERS = {
    "lanczos": Image.Resampling.LANCZOS,
    "bicubic": Image.Resampling.BICUBIC,
    "hamming": Image.Resampling.HAMMING,
    "box": Image.Resampling.BOX,
}
"""Names of Pillow's filters; their support widens with the reduction, so none of them aliases."""

DAMAGED_REMEDY = "the file is damaged or cut off there; copy it again"

_CACHE_BYTES = 64 << 20
_VENDORS = ("aperio", "generic-tiff")  # whose levels are plain TIFF directories
_SAME_PIXELS = 2  # grey levels that two JPEG decoders may differ by
_COLOUR_TRANSFORM = {tifffile.PHOTOMETRIC.RGB: 0, tifffile.PHOTOMETRIC.YCBCR: 1}

Source = Literal["auto", "jpeg_tiles", "openslide"]


@dataclass(frozen=True, slots=True)
class TileBatch:
    """Tiles that were read together.

    `pixels` uint8 RGB [n, tile_px, tile_px, 3]; `valid` bool [n] is False where the file is damaged
    (pixels are zeros there and mean nothing); `damage` says what the first of these ran into.
    """

    pixels: np.ndarray
    valid: np.ndarray
    damage: str | None = None


class RegionSource(Protocol):
    """Where pixels of one level come from: `name` tells which source it is, `why` the reason."""

    name: str
    why: str

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read uint8 RGB [height, width, 3] from (x, y) in pixels of the level.

        Raises SlideError `unreadable` where the file is damaged; a later call may succeed.
        """
        ...

    def close(self) -> None:
        """Release what was opened for it."""
        ...


class TileReader:
    """Reads the tiles of a plan from an open slide; use it in a `with` statement.

    Pixels come from the coarsest level that is fine enough and are reduced by a named filter
    (`level`); where that level has the plan's resolution already they stay untouched. A tile's
    pixels depend on the slide and its own square alone, not on the tiles read with it.

    `source` names what to read with; `auto` takes the file's own JPEG tiles where it has them.
    Raises SlideError `too_coarse`, and `unreadable` when `jpeg_tiles` is asked for and the level
    has none.
    """

    def __init__(self, reader: SlideReader, plan: TilePlan, *, source: Source = "auto") -> None:
        self.tile_px = plan.tile_px
        self.level = choose_level(reader, plan.mpp)
        self._untouched = self.level.filter == "none"
        self._limit = np.array(reader.level_dimensions[self.level.level])
        self._size = float(self.tile_px) if self._untouched else self.tile_px * self.level.shrink
        self.source = _open_source(reader, self.level.level, source)

    def read(self, xy0: np.ndarray) -> TileBatch:
        """Read the tiles whose corners stand at `xy0` [n, 2], in level-0 pixels.

        Damage makes single tiles invalid. Raises ValueError for a tile outside the slide.
        """
        corners = self._corners(xy0)
        pixels = np.zeros((len(xy0), self.tile_px, self.tile_px, 3), dtype=np.uint8)
        valid = np.ones(len(xy0), dtype=bool)
        damage = None
        for row, (x, y) in enumerate(corners.tolist()):
            try:
                pixels[row] = self._read_one(x, y)
            except SlideError as error:
                valid[row] = False
                damage = damage or error.reason
        return TileBatch(pixels, valid, damage)

    def close(self) -> None:
        """Release the source; the slide stays open."""
        self.source.close()

    def __enter__(self) -> "TileReader":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _corners(self, xy0: np.ndarray) -> np.ndarray:
        corners = np.asarray(xy0, dtype=np.float64).reshape(-1, 2) / self.level.downsample
        if self._untouched:
            corners = np.rint(corners)
        inside = np.clip(corners, 0, np.maximum(0, self._limit - self._size))
        if np.abs(inside - corners).max(initial=0.0) > 1.5:  # more than rounding explains
            row = int(np.abs(inside - corners).max(axis=1).argmax())
            raise ValueError(f"tile {row} at {xy0[row].tolist()} lies outside the slide")
        return inside

    def _read_one(self, x: float, y: float) -> np.ndarray:
        left, top = int(x), int(y)
        right, bottom = (
            int(min(np.ceil(corner + self._size - 1e-6), limit))
            for corner, limit in zip((x, y), self._limit, strict=True)
        )
        region = self.source.read(left, top, right - left, bottom - top)
        if self._untouched:
            return region
        box = (x - left, y - top, min(x - left + self._size, right - left),
               min(y - top + self._size, bottom - top))  # fmt: skip
        side = (self.tile_px, self.tile_px)
        return np.asarray(Image.fromarray(region).resize(side, FILTERS[self.level.filter], box=box))


class OpenSlideRegions:
    """Regions of a level as OpenSlide paints them."""

    name = "openslide"

    def __init__(self, reader: SlideReader, level: int, why: str) -> None:
        self._reader, self._level, self.why = reader, level, why
        self._downsample = reader.level_downsamples[level]

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read a region; the reader opens a fresh handle after an error."""
        x0, y0 = round(x * self._downsample), round(y * self._downsample)
        return self._reader.read_region(x0, y0, width, height, self._level)

    def close(self) -> None:
        """Leave the slide to its owner."""


class JpegTileRegions:
    """Regions of a level put together from the JPEG tiles of a TIFF directory.

    Decoded tiles are kept up to 64 MiB, so that neighbours in tissue order decode nothing twice.
    """

    name = "jpeg_tiles"

    def __init__(self, path: Path, page: tifffile.TiffPage) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDONLY)
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        self._tile_width, self._tile_height = page.tilewidth, page.tilelength
        self._columns = -(-page.imagewidth // page.tilewidth)
        # an Adobe marker is how a JPEG states its colour space; a tile of a TIFF has none
        adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
        tables = page.jpegtables[2:-2] if page.jpegtables else b""
        transform = bytes([_COLOUR_TRANSFORM[page.photometric]])
        self._head = b"\xff\xd8" + adobe + transform + tables
        self._decoded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._kept = max(1, _CACHE_BYTES // (page.tilewidth * page.tilelength * 3))
        self.why = f"JPEG tiles of the file, {page.photometric.name}"

    def read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Read a region that lies inside the level."""
        region = np.empty((height, width, 3), dtype=np.uint8)
        for row in range(y // self._tile_height, -(-(y + height) // self._tile_height)):
            for column in range(x // self._tile_width, -(-(x + width) // self._tile_width)):
                tile = self._tile(row * self._columns + column)
                left, top = column * self._tile_width - x, row * self._tile_height - y
                _paste(region, tile, left, top)
        return region

    def close(self) -> None:
        """Close the file and forget the tiles."""
        self._decoded.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _tile(self, index: int) -> np.ndarray:
        tile = self._decoded.get(index)
        if tile is None:
            tile = self._decoded[index] = self._decode(index)
            if len(self._decoded) > self._kept:
                self._decoded.popitem(last=False)
        else:
            self._decoded.move_to_end(index)
        return tile

    def _decode(self, index: int) -> np.ndarray:
        count = self._counts[index]
        data = os.pread(self._file, count, self._offsets[index])
        try:
            if len(data) < count:
                raise ValueError(f"the file ends after {len(data):,} of its {count:,} bytes")
            tile = simplejpeg.decode_jpeg(self._head + data[2:], "RGB", strict=True)
            if tile.shape != (self._tile_height, self._tile_width, 3):
                raise ValueError(f"it measures {tile.shape[1]} x {tile.shape[0]} px")
        except ValueError as error:
            reason = f"JPEG tile {index:,} at byte {self._offsets[index]:,} is damaged: {error}"
            raise SlideError("unreadable", reason, DAMAGED_REMEDY) from error
        return tile


def _paste(region: np.ndarray, tile: np.ndarray, left: int, top: int) -> None:
    """Copy what of `tile`, whose corner lies at (left, top) of `region`, falls inside it."""
    height, width = region.shape[:2]
    x, y = max(left, 0), max(top, 0)
    right, bottom = min(left + tile.shape[1], width), min(top + tile.shape[0], height)
    region[y:bottom, x:right] = tile[y - top : bottom - top, x - left : right - left]


def _open_source(reader: SlideReader, level: int, wanted: Source) -> RegionSource:
    if wanted == "openslide":
        return OpenSlideRegions(reader, level, "asked for")
    found = _open_jpeg_tiles(reader, level)
    if isinstance(found, JpegTileRegions):
        return found
    if wanted == "jpeg_tiles":
        raise SlideError("unreadable", f"no JPEG tiles to decode: {found}", "read with OpenSlide")
    return OpenSlideRegions(reader, level, found)


def _open_jpeg_tiles(reader: SlideReader, level: int) -> JpegTileRegions | str:
    """Return the level's JPEG tiles, or why they cannot stand for OpenSlide's picture of it."""
    if reader.vendor not in _VENDORS:
        return f"format {reader.vendor}"
    try:
        with tifffile.TiffFile(reader.path) as tiff:
            page = _find_page(tiff, reader.level_dimensions[level])
            obstacle = page if isinstance(page, str) else _obstacle(page)
            if obstacle is not None:
                return obstacle
            regions = JpegTileRegions(reader.path, page)
    except (tifffile.TiffFileError, OSError, ValueError, TypeError, IndexError, KeyError) as error:
        return f"tifffile cannot read its directories: {error}"
    if not _agrees(regions, reader, level):
        regions.close()
        return "its JPEG tiles do not give OpenSlide's pixels"
    return regions


def _find_page(tiff: tifffile.TiffFile, size: tuple[int, int]) -> tifffile.TiffPage | str:
    pages = [
        page for page in tiff.pages if page.is_tiled and (page.imagewidth, page.imagelength) == size
    ]
    return pages[0] if len(pages) == 1 else f"{len(pages)} tiled directories of {size} px"


def _obstacle(page: tifffile.TiffPage) -> str | None:
    if page.compression != tifffile.COMPRESSION.JPEG:
        return f"tiles compressed by {getattr(page.compression, 'name', page.compression)}"
    if page.photometric not in _COLOUR_TRANSFORM or page.planarconfig != 1:
        return f"colours stored as {getattr(page.photometric, 'name', page.photometric)}"
    if (page.samplesperpixel, page.bitspersample) != (3, 8):
        return f"{page.samplesperpixel} samples of {page.bitspersample} bits"
    return "some tiles are absent" if 0 in page.databytecounts else None


def _agrees(regions: JpegTileRegions, reader: SlideReader, level: int) -> bool:
    """Compare the corner of the level with OpenSlide's, so that no oddity of a file passes."""
    width, height = (min(side, 256) for side in reader.level_dimensions[level])
    try:
        ours = regions.read(0, 0, width, height).astype(np.int16)
        theirs = reader.read_region(0, 0, width, height, level)
    except SlideError:
        return False
    return bool(np.abs(ours - theirs).max() <= _SAME_PIXELS)
