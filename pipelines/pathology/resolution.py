"""How many micrometres a pixel measures: from a table, from the file, and never guessed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import openslide

MPP_RANGE = (0.05, 30.0)
TOLERANCE = 0.02
"""Relative difference beyond which two values of one slide contradict each other."""
PLACEHOLDER_DPI = (72, 96, 300)
"""What programs write into a TIFF when they know nothing."""
POWER_TIMES_MPP = (4.0, 25.0)
"""Objective power times um per pixel: 10 on most scanners, 4.6 on some MIRAX, 20 where halved."""
MPP_REMEDY = (
    "add a column `mpp` (micrometres per pixel) to the table of slides or labels, "
    "or give one value for all slides with slide_mpp=VALUE"
)
_VENDOR_KEYS = (
    ("aperio.MPP", "aperio.MPP"),
    (
        "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X",
        "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_Y",
    ),
    ("ventana.ScanRes", "ventana.ScanRes"),
)
_TEXT_KEYS = ("openslide.comment", "tiff.ImageDescription")
_MPP_TEXT = re.compile(r"\bMPP\s*[=:]\s*([0-9.]+)", re.IGNORECASE)
_OME_UM = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "μm": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}


class SlideError(Exception):
    """One slide cannot be used; a batch records it and goes on.

    `status` is a short word for tables (`no_file`, `unreadable`, `missing_mpp`, `mpp_suspect`,
    `bad_outline`, `too_coarse`, `too_small`, `empty`), `reason` what was found, `remedy` what to
    do about it.
    """

    def __init__(self, status: str, reason: str, remedy: str) -> None:
        super().__init__(f"{status}: {reason}; {remedy}")
        self.status = status
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Resolution:
    """`mpp` micrometres per level-0 pixel, by `source`.

    `in_file` is what the file itself says, whatever was given instead; None where it says nothing
    that could be used.
    """

    mpp: float
    source: str
    in_file: float | None


def find_resolution(properties: Mapping[str, str], *, given: float | None) -> Resolution:
    """Take the given value, else OpenSlide's, else a vendor's key, else the TIFF resolution.

    Raises SlideError `missing_mpp` where none of these says anything, and `mpp_suspect` for values
    that cannot be: outside of `MPP_RANGE`, a default of 72, 96 or 300 dpi, pixels that are not
    square, two sources that differ, or one that the objective's power contradicts.
    """
    if given is None:
        return _from_file(properties)
    _check_range(given, "the given value")
    try:
        in_file = _from_file(properties).mpp
    except SlideError:
        in_file = None
    return Resolution(given, "given", in_file)


def _from_file(properties: Mapping[str, str]) -> Resolution:
    found = _sources(properties)
    if not found:
        reason = "the file does not say how many micrometres a pixel measures"
        raise SlideError("missing_mpp", reason, MPP_REMEDY)
    (source, (x, y)), *others = found.items()
    if abs(x - y) > TOLERANCE * max(x, y):
        raise _suspect(f"pixels are not square: {x:g} x {y:g} um")
    mpp = (x + y) / 2
    if source == "tiff_resolution":
        _check_placeholder(mpp)
    _check_range(mpp, "the file's value")
    for name, (other, _) in others:
        plausible = MPP_RANGE[0] <= other <= MPP_RANGE[1]
        if plausible and abs(other - mpp) > TOLERANCE * max(other, mpp):
            raise _suspect(f"{source} says {mpp:.4g} um per pixel, {name} says {other:.4g}")
    _check_power(mpp, _number(properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)))
    return Resolution(mpp, source, mpp)


def _sources(properties: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """What the file says of x and y, by source, the most trusted first."""
    pairs: dict[str, tuple[float | None, float | None]] = {}
    standard = (
        _number(properties.get(openslide.PROPERTY_NAME_MPP_X)),
        _number(properties.get(openslide.PROPERTY_NAME_MPP_Y)),
    )
    # of a plain TIFF OpenSlide knows the resolution of printers and nothing better
    plain = properties.get(openslide.PROPERTY_NAME_VENDOR) == "generic-tiff"
    if not plain:
        pairs["openslide"] = standard
    for key_x, key_y in _VENDOR_KEYS:
        pairs[key_x] = _number(properties.get(key_x)), _number(properties.get(key_y))
    pairs["description"] = _from_text(" ".join(properties.get(key, "") for key in _TEXT_KEYS))
    if plain:
        pairs["tiff_resolution"] = standard
    return {name: (x, y) for name, (x, y) in pairs.items() if x is not None and y is not None}


def _from_text(text: str) -> tuple[float | None, float | None]:
    """Find `MPP = 0.25` (Aperio's way) or OME's PhysicalSizeX and PhysicalSizeY."""
    sizes = [_ome_size(text, axis) for axis in "XY"]
    if None not in sizes:
        return sizes[0], sizes[1]
    match = _MPP_TEXT.search(text)
    value = _number(match[1]) if match else None
    return value, value


def _ome_size(text: str, axis: str) -> float | None:
    size = re.search(rf'PhysicalSize{axis}="([^"]+)"', text)
    unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', text)
    factor = _OME_UM.get(unit[1]) if unit else 1.0
    value = _number(size[1]) if size else None
    return None if value is None or factor is None else value * factor


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "nan")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _check_placeholder(mpp: float) -> None:
    dpi = 25_400 / mpp
    for known in PLACEHOLDER_DPI:
        if abs(dpi - known) < 0.01 * known:
            reason = f"the TIFF resolution is {known} dpi, a program's default, or {mpp:.4g} um"
            raise _suspect(reason)


def _check_range(mpp: float, origin: str) -> None:
    low, high = MPP_RANGE
    if not low <= mpp <= high:
        raise _suspect(f"{origin}, {mpp:.4g} um per pixel, lies outside {low:g} to {high:g}")


def _check_power(mpp: float, power: float | None) -> None:
    low, high = POWER_TIMES_MPP
    if power is not None and not low <= power * mpp <= high:
        raise _suspect(f"{mpp:.4g} um per pixel contradicts an objective of {power:g}x")


def _suspect(reason: str) -> SlideError:
    return SlideError("mpp_suspect", reason, MPP_REMEDY)
