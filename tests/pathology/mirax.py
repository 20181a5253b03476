"""Writes slides as MIRAX stores them, so that OpenSlide's own reader can be asked.

Format: https://openslide.org/formats/mirax/ (an INI file, an index of pages of records, JPEG tiles
in data files; what the scanner left out has no record).
"""

import struct
from pathlib import Path

import numpy as np
import simplejpeg

_VERSION, _SLIDE_ID = "01.02", "5f0c1d8e3b7a4c2d9e6f1a2b3c4d5e6f"


def write_mirax(
    path: Path,
    image: np.ndarray,
    *,
    at: tuple[int, int],
    grid: tuple[int, int],
    side: int = 128,
    levels: int = 3,
    mpp: float = 0.5,
) -> None:
    """Write `image` (uint8 RGB, whole tiles) at tile (column, row) of an else empty `grid`."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True)
    picture = np.ascontiguousarray(image[::8, ::8])
    path.write_bytes(simplejpeg.encode_jpeg(picture))
    columns, _ = grid
    data, records = bytearray(), []
    for level in range(levels):
        factor, found = 1 << level, []
        height, width = (n // side for n in image.shape[:2])
        for row in range(0, height, factor):
            for column in range(0, width, factor):
                piece = image[
                    row * side : (row + factor) * side, column * side : (column + factor) * side
                ]
                small = piece.reshape(side, factor, side, factor, 3).mean((1, 3)).astype(np.uint8)
                jpeg = simplejpeg.encode_jpeg(small, quality=95, colorsubsampling="444")
                number = (at[1] + row) * columns + at[0] + column
                found.append((number, len(data), len(jpeg), 0))
                data += jpeg
        records.append(found)
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(_index(records))
    (folder / "Slidedat.ini").write_text(_slidedat(grid, side, levels, mpp), encoding="utf-8-sig")


def _index(records: list[list[tuple[int, int, int, int]]]) -> bytes:
    """The version and id, where the tables of levels begin, and a page of records for each."""
    head = _VERSION.encode() + _SLIDE_ID.encode()
    root = len(head) + 8
    place = root + 4 * len(records)
    table, pages = b"", b""
    for found in records:
        table += struct.pack("<i", place + len(pages))
        start = place + len(pages) + 8
        pages += struct.pack("<ii", 0, start) + struct.pack("<ii", len(found), 0)
        pages += b"".join(struct.pack("<iiii", *record) for record in found)
    return head + struct.pack("<ii", root, 0) + table + pages


def _slidedat(grid: tuple[int, int], side: int, levels: int, mpp: float) -> str:
    lines = [
        "[GENERAL]", f"SLIDE_VERSION={_VERSION}", f"SLIDE_ID={_SLIDE_ID}",
        f"IMAGENUMBER_X={grid[0]}", f"IMAGENUMBER_Y={grid[1]}", "OBJECTIVE_MAGNIFICATION=20",
        "[HIERARCHICAL]", "HIER_COUNT=1", "HIER_0_NAME=Slide zoom level", f"HIER_0_COUNT={levels}",
    ]  # fmt: skip
    for level in range(levels):
        lines += [
            f"HIER_0_VAL_{level}=ZoomLevel_{level}", f"HIER_0_VAL_{level}_SECTION=LEVEL_{level}",
        ]  # fmt: skip
    lines += ["NONHIER_COUNT=0", "INDEXFILE=Index.dat"]
    lines += ["[DATAFILE]", "FILE_COUNT=1", "FILE_0=Data0000.dat"]
    for level in range(levels):
        lines += [
            f"[LEVEL_{level}]", "OVERLAP_X=0", "OVERLAP_Y=0",
            f"MICROMETER_PER_PIXEL_X={mpp * 2**level}", f"MICROMETER_PER_PIXEL_Y={mpp * 2**level}",
            "IMAGE_FORMAT=JPEG", "IMAGE_FILL_COLOR_BGR=16777215",
            f"DIGITIZER_WIDTH={side}", f"DIGITIZER_HEIGHT={side}",
            f"IMAGE_CONCAT_FACTOR={min(level, 1)}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"
