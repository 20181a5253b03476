"""Find slides and read them through OpenSlide, with every refusal explained."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import openslide
from PIL import Image, UnidentifiedImageError

from pipelines.pathology.resolution import Resolution, SlideError, find_resolution
from pipelines.shared.errors import InputError

SLIDE_ENDINGS = frozenset(
    (
        ".svs",
        ".tif",
        ".tiff",
        ".ndpi",
        ".mrxs",
        ".scn",
        ".bif",
        ".vms",
        ".vmu",
        ".svslide",
        ".dcm",
        ".czi",
        ".qptiff",
    )
)
IMAGE_ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".tif", ".tiff"))
"""Plain images: slides where a table names them and gives their resolution."""
CONVERT_REMEDY = (
    "check that the file is complete and that it is a slide; formats that OpenSlide cannot read "
    "must first be converted to a pyramidal JPEG TIFF"
)
_SAMPLE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class SlideFile:
    """A slide on disk.

    `slide_id` comes from a table, or is the file's name without its ending; it is unique in a run.
    `mpp` is what a table says of the resolution, in micrometres per pixel, and outweighs the file.
    """

    slide_id: str
    path: Path
    mpp: float | None = None


def find_slides(folder: str | Path) -> list[SlideFile]:
    """List the slides in `folder` and its subfolders, ordered by slide id.

    Other files are ignored. DICOM files of one series in one folder are one slide; where the
    series has a folder of its own, the slide bears that folder's name.

    Raises InputError for a missing or empty folder and for two slides with one id.
    """
    root = Path(folder)
    if not root.exists():
        raise InputError(f"slide folder {root} does not exist; check slides=FOLDER")
    if not root.is_dir():
        raise InputError(f"{root} is a file, not a folder; give the folder that holds the slides")
    slides: dict[str, SlideFile] = {}
    for slide in walk_slides(root):
        earlier = slides.setdefault(slide.slide_id, slide)
        if earlier is not slide:
            raise InputError(
                f"two slides have the id {slide.slide_id!r}: {earlier.path} and {slide.path}; "
                "rename one of them, or give slides=TABLE with slide_id and path of each"
            )
    if not slides:
        raise InputError(
            f"no slides in {root}; looked in all subfolders for "
            f"{', '.join(sorted(SLIDE_ENDINGS))}; "
            "PNG and JPEG need slides=TABLE with the columns slide_id, path and mpp"
        )
    return [slides[slide_id] for slide_id in sorted(slides)]


def walk_slides(root: Path) -> Iterator[SlideFile]:
    """Yield the slides in a folder and its subfolders as they come; ids may repeat."""
    visited: set[Path] = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        here = Path(parent)
        if here.resolve() in visited:  # a link back into the tree
            folders.clear()
            continue
        visited.add(here.resolve())
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not f.endswith(".zarr"))
        names = sorted(
            name
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in SLIDE_ENDINGS
        )
        yield from (
            SlideFile(Path(name).stem, here / name)
            for name in names
            if not name.lower().endswith(".dcm")
        )
        yield from _dicom_slides(
            [here / name for name in names if name.lower().endswith(".dcm")], is_root=here == root
        )


def open_slide(path: str | Path, *, mpp: float | None = None) -> "SlideReader":
    """Open a slide for reading; use it in a `with` statement.

    `mpp`, in micrometres per pixel at level 0, overrides what the file says. Raises SlideError
    `unreadable`, `missing_mpp` or `mpp_suspect`; a resolution is never guessed.
    """
    return SlideReader(Path(path), mpp=mpp)


def slide_fingerprint(path: Path) -> str:
    """Digest of a slide's files: names, sizes and samples of their bytes, in milliseconds."""
    digest = hashlib.sha256()
    for member in _members(path):
        size = member.stat().st_size
        digest.update(f"{member.name}:{size}:".encode())
        with member.open("rb") as file:
            for start in sorted({0, size // 2, max(0, size - _SAMPLE_BYTES)}):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


class SlideReader:
    """Pixels and geometry of one open slide; sizes are (width, height) in pixels.

    `bounds` (x, y, width, height) is the part that the scanner filled, in level-0 pixels: the whole
    slide, unless the format says otherwise (MIRAX, Leica, Ventana). `mpp` is micrometres per
    level-0 pixel, `resolution` tells where it comes from.
    """

    def __init__(self, path: Path, *, mpp: float | None) -> None:
        self.path = path
        self._handle = _open_handle(path)
        try:
            self.level_dimensions: tuple[tuple[int, int], ...] = self._handle.level_dimensions
            self.level_downsamples: tuple[float, ...] = self._handle.level_downsamples
            properties = self._handle.properties
            self.vendor: str = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
            self.quickhash: str | None = properties.get(openslide.PROPERTY_NAME_QUICKHASH1)
            self.bounds = _bounds(properties, self.level_dimensions[0])
            self.resolution: Resolution = find_resolution(properties, given=mpp)
        except SlideError:
            self._handle.close()
            raise

    @property
    def mpp(self) -> float:
        """Micrometres per pixel at level 0."""
        return self.resolution.mpp

    @property
    def mpp_source(self) -> str:
        """Where `mpp` comes from: `given`, `openslide`, a vendor's key, or `tiff_resolution`."""
        return self.resolution.source

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height at level 0."""
        return self.level_dimensions[0]

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> np.ndarray:
        """Read uint8 RGB [height, width, 3] from (x, y) in level-0 pixels.

        What the scanner left out is white. OpenSlide handles stay in error after a failed read,
        so a second attempt runs on a fresh one; then SlideError `unreadable`.
        """
        for attempt in (1, 2):
            try:
                region = self._handle.read_region((x, y), level, (width, height))
            except openslide.OpenSlideError as error:
                if attempt == 2:
                    raise _read_error(self.path, (x, y, width, height, level), error) from error
                self._handle.close()
                self._handle = _open_handle(self.path)
            else:
                return _on_white(np.asarray(region))
        raise AssertionError("unreachable")

    def probe(self) -> None:
        """Read a corner of each level: SlideError `unreadable` where not even that succeeds."""
        for level, (width, height) in enumerate(self.level_dimensions):
            self.read_region(0, 0, min(width, 16), min(height, 16), level)

    def close(self) -> None:
        """Release the file."""
        self._handle.close()

    def __enter__(self) -> "SlideReader":
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _dicom_slides(files: list[Path], *, is_root: bool) -> Iterator[SlideFile]:
    series: dict[bytes, list[Path]] = {}
    for path in files:
        series.setdefault(_series_uid(path) or str(path).encode(), []).append(path)
    for members in series.values():
        own_folder = len(members) > 1 and len(series) == 1 and not is_root
        name = members[0].parent.name if own_folder else members[0].stem
        yield SlideFile(name, members[0])


def _series_uid(path: Path) -> bytes | None:
    """Read tag (0020,000E) from a DICOM file's head; None where it is not found."""
    with path.open("rb") as file:
        head = file.read(_SAMPLE_BYTES)
    at = head.find(b"\x20\x00\x0e\x00UI")
    if at < 0:
        return None
    length = int.from_bytes(head[at + 6 : at + 8], "little")
    return head[at + 8 : at + 8 + length].rstrip(b"\0 ")


def _members(path: Path) -> list[Path]:
    """Return the files that make up a slide: itself, its DICOM series or its MRXS folder."""
    if path.suffix.lower() == ".dcm":
        uid = _series_uid(path)
        siblings = sorted(path.parent.glob("*.dcm")) if uid else []
        return [p for p in siblings if _series_uid(p) == uid] or [path]
    companion = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and companion.is_dir():
        return [path, *sorted(p for p in companion.rglob("*") if p.is_file())]
    return [path]


def _bounds(properties: Mapping[str, str], size: tuple[int, int]) -> tuple[int, int, int, int]:
    names = (
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
    )
    found = [properties.get(name) for name in names]
    if any(value is None for value in found):
        return 0, 0, *size
    x, y, width, height = (int(float(value or 0)) for value in found)
    return x, y, min(width, size[0] - x), min(height, size[1] - y)


def _open_handle(path: Path) -> openslide.AbstractSlide:
    try:
        size = path.stat().st_size
        if path.is_dir():
            reason = "it is a folder that does not hold exactly one slide"
            raise SlideError("unreadable", reason, "name the slides in it one by one")
        if size == 0:
            raise SlideError("unreadable", "the file is empty (0 bytes)", CONVERT_REMEDY)
        return openslide.OpenSlide(path)
    except FileNotFoundError as error:
        reason = f"there is no such file: {path} ({error.strerror})"
        raise SlideError("no_file", reason, "correct the path, or put the file there") from error
    except OSError as error:
        reason = f"cannot open the file: {error.strerror or error}"
        raise SlideError("unreadable", reason, "check the path and its permissions") from error
    except openslide.OpenSlideUnsupportedFormatError as error:
        image = _open_image(path)
        if image is not None:
            return image
        if path.suffix.lower() == ".mrxs" and not path.with_suffix("").is_dir():
            reason = (
                f"a MIRAX slide is kept in the folder {path.stem!r} beside it, which is missing"
            )
            raise SlideError("unreadable", reason, "copy the folder, too") from error
        reason = f"OpenSlide does not know this format ({size:,} bytes, {_first_bytes(path)})"
        raise SlideError("unreadable", reason, CONVERT_REMEDY) from error
    except openslide.OpenSlideError as error:
        reason = f"OpenSlide cannot open it: {error} ({size:,} bytes)"
        raise SlideError("unreadable", reason, CONVERT_REMEDY) from error


def _open_image(path: Path) -> openslide.ImageSlide | None:
    """Open a plain RGB image; None for what is none: another format, grey, more than 8 bits."""
    if path.suffix.lower() not in IMAGE_ENDINGS:
        return None
    try:
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA", "P", "CMYK", "YCbCr"):
                return None
            pixels = image.convert("RGBA" if image.mode == "RGBA" else "RGB")
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        remedy = "convert it to a pyramidal JPEG TIFF, which is read in parts"
        raise SlideError("unreadable", f"a plain image is read whole: {error}", remedy) from error
    except (OSError, SyntaxError, ValueError) as error:
        reason = f"the image cannot be decoded: {error} ({path.stat().st_size:,} bytes)"
        raise SlideError("unreadable", reason, CONVERT_REMEDY) from error
    return openslide.ImageSlide(pixels)


def _first_bytes(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "a TIFF, but not of a layout that OpenSlide reads"
    return "a text file" if head.isascii() and b"\0" not in head else f"begins with {head[:8]!r}"


def _read_error(
    path: Path, region: tuple[int, int, int, int, int], error: openslide.OpenSlideError
) -> SlideError:
    x, y, width, height, level = region
    reason = f"reading {width} x {height} px at ({x}, {y}), level {level}, fails: {error}"
    remedy = f"the file ({path.stat().st_size:,} bytes) is damaged or cut off; copy it again"
    return SlideError("unreadable", reason, remedy)


def _on_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgba[..., :3])
    opaque = alpha.astype(np.uint16)
    blended = (rgba[..., :3] * opaque + 255 * (255 - opaque) + 127) // 255
    return blended.astype(np.uint8)
