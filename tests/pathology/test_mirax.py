"""MIRAX: slides in a folder beside them, with the tissue somewhere on a grid that is else empty."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.slides import open_slide
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.shared.cli import main
from tests.pathology.mirax import write_mirax

LEFT, TOP = 4 * 128, 8 * 128


@pytest.fixture
def image(paint: Callable[..., np.ndarray]) -> np.ndarray:
    return paint(512, 1024, (slice(128, 384), slice(128, 640)))


@pytest.fixture
def slide(tmp_path: Path, image: np.ndarray) -> Path:
    path = tmp_path / "slides" / "case_1.mrxs"
    write_mirax(path, image, at=(4, 8), grid=(16, 16))
    return path


def run(*arguments: str) -> int:
    return main("pathology", VERBS, ["embed", "tile_um=32", "mpp=0.5", *arguments])


def test_the_filled_part_is_known_and_read(slide: Path, image: np.ndarray) -> None:
    with open_slide(slide) as reader:
        assert (reader.vendor, reader.mpp, reader.mpp_source) == ("mirax", 0.5, "openslide")
        assert reader.dimensions == (2048, 2048)
        assert reader.bounds == (LEFT, TOP, 1024, 512)
        found = reader.read_region(LEFT, TOP, 1024, 512, 0)
        assert np.abs(found.astype(int) - image).mean() < 4
        assert (reader.read_region(0, 0, 64, 64, 0) == 255).all()


def test_tiles_count_from_the_filled_part(slide: Path, tmp_path: Path) -> None:
    assert run(f"slides={slide.parent}", f"out={tmp_path / 'out'}") == 0
    stored = read_slide(slide_folder(tmp_path / "out" / "features", "case_1"))
    assert len(stored) >= 28  # 8 x 4 tiles of tissue
    assert (stored.xy0 == stored.grid * 64 + (LEFT, TOP)).all()
    assert stored.grid.min(0).tolist() == [2, 2]
    assert stored.grid.max(0).tolist() == [9, 5]
    assert stored.attributes["bounds"] == [LEFT, TOP, 1024, 512]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("folder", "in the folder 'case_1' beside it"),
        ("data", "Short read of file"),
    ],
)
def test_a_slide_without_its_files_is_listed_and_the_others_are_done(
    slide: Path, image: np.ndarray, tmp_path: Path, lost: str, message: str
) -> None:
    write_mirax(slide.with_name("case_2.mrxs"), image, at=(0, 0), grid=(8, 8))
    if lost == "folder":
        shutil.rmtree(slide.with_suffix(""))
    else:
        (slide.with_suffix("") / "Data0000.dat").write_bytes(b"cut off")
    assert run(f"slides={slide.parent}", f"out={tmp_path / 'out'}") == 3
    failures = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert failures[["slide_id", "status"]].to_numpy().tolist() == [["case_1", "unreadable"]]
    assert message in " ".join(failures.loc[0, ["reason", "remedy"]])
    assert len(read_slide(slide_folder(tmp_path / "out" / "features", "case_2"))) >= 28
