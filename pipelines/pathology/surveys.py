"""Keep surveys on disk, one file per slide: complete or absent, and the same bytes every time.

Masks are kept as bits and the overview, which is only looked at, as a JPEG: a slide of 100,000
pixels a side takes a second and ten megabytes.
"""

import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.pathology.tiling import Survey
from pipelines.pathology.tissue import TissueMask
from pipelines.shared.asides import aside_of
from pipelines.shared.errors import InputError

SCHEMA = 1
_ENDING = ".npz"
_JPEG_QUALITY = 92
_FLAG, _WHERE = "flagged_", "where_"


def survey_file(folder: Path, slide_id: str) -> Path:
    """Return where a slide's survey stands."""
    return folder / f"{slide_id}{_ENDING}"


def survey_folder(tiles: str | None) -> Path | None:
    """Return where the surveys of a run of `tile` are, `tiles` being its out=; None gives None.

    Raises InputError where there are none.
    """
    if tiles is None:
        return None
    folder = Path(tiles) / "surveys"
    if not folder.is_dir():
        raise InputError(f"tiles={tiles} holds no surveys; give the out= folder of a run of `tile`")
    return folder


def write_survey(path: Path, survey: Survey, made_from: Mapping[str, object]) -> None:
    """Write a survey, aside and renamed, with the values that it depends on."""
    mask = survey.mask
    about = {
        "schema": SCHEMA,
        "made_from": dict(made_from),
        "pitch0": survey.pitch0,
        "scale": list(mask.scale),
        "threshold": mask.threshold,
        "threshold_source": mask.threshold_source,
    }
    arrays = {
        "about": np.array(json.dumps(about, sort_keys=True)),
        "grid": survey.grid,
        "xy0": survey.xy0,
        "tissue": survey.tissue,
        "mask": np.packbits(mask.mask),
        "overview": _to_jpeg(mask.overview),
    }
    arrays |= {_FLAG + name: share for name, share in survey.flagged.items()}
    arrays |= {_WHERE + name: np.packbits(where) for name, where in mask.flags.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    with aside.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(aside, path)


def read_survey(path: Path, made_from: Mapping[str, object]) -> Survey | None:
    """Read a survey that was made from these very values; None where there is none."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            about = json.loads(str(arrays["about"]))
            if about["schema"] != SCHEMA or about["made_from"] != dict(made_from):
                return None
            kept = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # absent or damaged: it is made again
    overview = _from_jpeg(kept["overview"])
    shape = overview.shape[:2]
    mask = TissueMask(
        _unpack(kept["mask"], shape),
        overview,
        (about["scale"][0], about["scale"][1]),
        about["threshold"],
        about["threshold_source"],
        {
            name.removeprefix(_WHERE): _unpack(kept[name], shape)
            for name in kept
            if name.startswith(_WHERE)
        },
    )
    flagged = {name.removeprefix(_FLAG): kept[name] for name in kept if name.startswith(_FLAG)}
    return Survey(kept["grid"], kept["xy0"], kept["tissue"], flagged, about["pitch0"], mask)


def _to_jpeg(image: np.ndarray) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="jpeg", quality=_JPEG_QUALITY)
    return np.frombuffer(buffer.getvalue(), dtype=np.uint8)


def _from_jpeg(content: np.ndarray) -> np.ndarray:
    with Image.open(io.BytesIO(content.tobytes())) as image:
        return np.asarray(image)


def _unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.unpackbits(bits, count=shape[0] * shape[1]).reshape(shape).astype(bool)
