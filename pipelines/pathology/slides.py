"""Find slides and read them through OpenSlide, with every refusal explained."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import openslide

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
MPP_RANGE = (0.05, 30.0)
MPP_ANISOTROPY = 0.02
MPP_REMEDY = (
    "add a column `mpp` (micrometres per pixel) to the label table, "
    "or give one value for all slides with slide_mpp=VALUE"
)
CONVERT_REMEDY = (
    "check that the file is complete and that it is a slide; formats that OpenSlide cannot read "
    "must first be converted to a pyramidal JPEG TIFF"
)
_SAMPLE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class SlideFile:
    """A slide on disk; `slide_id` is the file's name without its ending."""

    slide_id: str
    path: Path


class SlideError(Exception):
    """One slide cannot be used; a batch records it and goes on.

    `status` is a short word for tables (`missing_mpp`, `mpp_suspect`, `unreadable`, `empty`,
    `too_coarse`, `too_small`), `reason` what was found, `remedy` what to do about it.
    """

    def __init__(self, status: str, reason: str, remedy: str) -> None:
        super().__init__(f"{status}: {reason}; {remedy}")
        self.status = status
        self.reason = reason
        self.remedy = remedy


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
    for slide in _walk(root):
        earlier = slides.setdefault(slide.slide_id, slide)
        if earlier is not slide:
            raise InputError(
                f"two slides have the id {slide.slide_id!r}: {earlier.path} and {slide.path}; "
                "rename one of them"
            )
    if not slides:
        raise InputError(
            f"no slides in {root}; looked in all subfolders for {', '.join(sorted(SLIDE_ENDINGS))}"
        )
    return [slides[slide_id] for slide_id in sorted(slides)]


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
    """Pixels and geometry of one open slide; sizes are (width, height) in pixels."""

    def __init__(self, path: Path, *, mpp: float | None) -> None:
        self.path = path
        self._handle = _open_handle(path)
        try:
            self.level_dimensions: tuple[tuple[int, int], ...] = self._handle.level_dimensions
            self.level_downsamples: tuple[float, ...] = self._handle.level_downsamples
            properties = self._handle.properties
            self.vendor: str = properties.get(openslide.PROPERTY_NAME_VENDOR, "unknown")
            self.quickhash: str | None = properties.get(openslide.PROPERTY_NAME_QUICKHASH1)
            self.mpp, self.mpp_source = _resolve_mpp(
                mpp,
                properties.get(openslide.PROPERTY_NAME_MPP_X),
                properties.get(openslide.PROPERTY_NAME_MPP_Y),
            )
        except SlideError:
            self._handle.close()
            raise

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


def _walk(root: Path) -> Iterator[SlideFile]:
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


def _open_handle(path: Path) -> openslide.OpenSlide:
    try:
        size = path.stat().st_size
        if size == 0:
            raise SlideError("unreadable", "the file is empty (0 bytes)", CONVERT_REMEDY)
        return openslide.OpenSlide(path)
    except OSError as error:
        reason = f"cannot open the file: {error.strerror or error}"
        raise SlideError("unreadable", reason, "check the path and its permissions") from error
    except openslide.OpenSlideUnsupportedFormatError as error:
        reason = f"OpenSlide does not know this format ({size:,} bytes, {_first_bytes(path)})"
        raise SlideError("unreadable", reason, CONVERT_REMEDY) from error
    except openslide.OpenSlideError as error:
        reason = f"OpenSlide cannot open it: {error} ({size:,} bytes)"
        raise SlideError("unreadable", reason, CONVERT_REMEDY) from error


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


def _resolve_mpp(given: float | None, mpp_x: str | None, mpp_y: str | None) -> tuple[float, str]:
    if given is not None:
        return _plausible(float(given), "the given value"), "given"
    try:
        x, y = float(mpp_x or "nan"), float(mpp_y or "nan")
    except ValueError:
        x = y = float("nan")
    if not (np.isfinite(x) and np.isfinite(y)):
        reason = "the file does not say how many micrometres a pixel measures"
        raise SlideError("missing_mpp", reason, MPP_REMEDY)
    if abs(x - y) > MPP_ANISOTROPY * max(x, y):
        reason = f"pixels are not square: {x:g} x {y:g} um"
        raise SlideError("mpp_suspect", reason, MPP_REMEDY)
    return _plausible((x + y) / 2, "the file's value"), "openslide"


def _plausible(mpp: float, origin: str) -> float:
    low, high = MPP_RANGE
    if not low <= mpp <= high:
        reason = f"{origin}, {mpp:.4g} um per pixel, lies outside {low:g} to {high:g}"
        raise SlideError("mpp_suspect", reason, MPP_REMEDY)
    return mpp
