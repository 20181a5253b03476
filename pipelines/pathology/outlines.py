"""Tissue as GeoJSON: written for QuPath, edited there or anywhere, and read back.

Coordinates are level-0 pixels. What is written covers exactly the pixels of the mask, so that an
outline nobody touched gives the same mask again.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.draw import polygon as polygon_pixels
from skimage.measure import find_contours

from pipelines.pathology.slides import SlideError
from pipelines.pathology.tissue import TissueMask
from pipelines.shared.asides import aside_of

TISSUE_COLOUR = (46, 160, 67)
EXCLUDED = ("exclude", "ignore")
"""Beginnings of class names whose regions are cut out; all others are tissue."""
_REMEDY = "draw closed polygons in QuPath and export them as GeoJSON, or remove the file"

Ring = np.ndarray  # [n, 2]: x, y in level-0 pixels, the first point again at the end


def write_outline(path: Path, tissue: TissueMask) -> None:
    """Write one polygon with its holes per piece of tissue, aside and renamed."""
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring.tolist() for ring in rings]},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": "Tissue", "color": list(TISSUE_COLOUR)},
            },
        }
        for rings in trace(tissue.mask, tissue.scale)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    text = json.dumps({"type": "FeatureCollection", "features": features})
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, path)


def outlined_tissue(path: Path, found: TissueMask) -> TissueMask:
    """Put the regions of a GeoJSON file in the place of the mask that was found.

    Regions whose class begins with `exclude` or `ignore` are cut out of the others, and out of the
    found mask where there are no others. Raises SlideError `bad_outline` with file and feature.
    """
    drawn, cut = np.zeros_like(found.mask), np.zeros_like(found.mask)
    any_drawn = False
    regions = list(_read_regions(path))
    for name, polygons in regions:
        excluded = name.lower().startswith(EXCLUDED)
        any_drawn |= not excluded
        target = cut if excluded else drawn
        for rings in polygons:
            target |= _fill(rings, found.mask.shape, found.scale)
    kept = drawn if any_drawn or not regions else found.mask
    return replace(found, mask=kept & ~cut, threshold=float("nan"), threshold_source="outline")


def trace(mask: np.ndarray, scale: tuple[float, float]) -> Iterator[list[Ring]]:
    """Yield the rings of each 4-connected piece of a mask [h, w]: its edge, then its holes.

    Rings run between pixel centres, so that they enclose the centres of the piece and no others.
    """
    labels, _ = ndimage.label(mask)
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        piece = np.pad(labels[box] == label, 1)
        origin = np.array([box[1].start, box[0].start]) - 0.5  # pad: -1; centre to corner: +0.5
        rings = [
            (_without_straight_points(contour)[:, ::-1] + origin) * scale
            for contour in find_contours(piece.astype(np.float32), 0.5, fully_connected="low")
        ]
        yield [_turned(ring, hole=i > 0) for i, ring in enumerate(sorted(rings, key=_area)[::-1])]


def _read_regions(path: Path) -> Iterator[tuple[str, list[list[Ring]]]]:
    """Yield class name and polygons of each feature of a GeoJSON file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _bad(path, f"is no JSON text ({error})") from error
    if isinstance(content, dict) and content.get("type") == "Feature":
        content = [content]
    features = content.get("features") if isinstance(content, dict) else content
    if not isinstance(features, list):
        raise _bad(path, "is no GeoJSON FeatureCollection")
    for number, feature in enumerate(features, start=1):
        try:
            geometry = feature["geometry"]
            nested = {"Polygon": lambda c: [c], "MultiPolygon": lambda c: c}[geometry["type"]]
            polygons = [[_ring(r) for r in rings] for rings in nested(geometry["coordinates"])]
            name = ((feature.get("properties") or {}).get("classification") or {}).get("name")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _bad(path, f"feature {number} is no polygon of closed rings ({error})") from error
        yield str(name or ""), polygons


def _ring(points: object) -> Ring:
    ring = np.asarray(points, dtype=np.float64)
    if ring.ndim != 2 or ring.shape[1] < 2 or len(ring) < 4 or not np.isfinite(ring).all():
        raise ValueError("a ring needs at least four points (x, y)")
    if (ring[0] != ring[-1]).any():
        raise ValueError("a ring's last point must be its first")
    return ring[:, :2]


def _fill(rings: list[Ring], shape: tuple[int, ...], scale: tuple[float, float]) -> np.ndarray:
    """Pixels whose centre lies in the first ring and in none of the holes, bool [h, w]."""
    inside = np.zeros(shape, dtype=bool)
    for ring in rings:
        cols, rows = (ring / scale - 0.5).T
        inside[polygon_pixels(rows, cols, shape)] ^= True
    return inside


def _without_straight_points(ring: np.ndarray) -> np.ndarray:
    """Drop the points of a closed ring [n, 2] in which it does not turn."""
    steps = np.diff(ring, axis=0)
    before = np.roll(steps, 1, axis=0)
    turns = steps[:, 0] * before[:, 1] != steps[:, 1] * before[:, 0]
    kept = ring[:-1][turns]
    return np.concatenate([kept, kept[:1]])


def _turned(ring: Ring, *, hole: bool) -> Ring:
    """Let edges and holes run in opposite directions, as GeoJSON wants it."""
    return ring if (_signed_area(ring) < 0) == hole else ring[::-1]


def _signed_area(ring: Ring) -> float:
    x, y = ring.T
    return float((x[:-1] * y[1:] - x[1:] * y[:-1]).sum()) / 2


def _area(ring: Ring) -> float:
    return abs(_signed_area(ring))


def _bad(path: Path, reason: str) -> SlideError:
    return SlideError("bad_outline", f"{path} {reason}", _REMEDY)
