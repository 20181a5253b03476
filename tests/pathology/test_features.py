import os
import shutil

import numpy as np
import pytest

from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.slides import find_slides
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.pathology.tiling import TilePlan

PLAN = TilePlan(64)


class Spy:
    """An encoder that counts its calls, and can be told to fail or to die."""

    name, dim, fingerprint, in_workers = "spy", 1, "spy-1", True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        self.calls += 1
        return tiles.mean(axis=(1, 2, 3), dtype=np.float64)[:, None].astype(np.float32)


class FailingEncoder(Spy):
    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        raise RuntimeError("out of luck")


def extract(slides, store, encoder=None, plan=PLAN, **options):
    options = {"workers": 1, "progress": False} | options
    return extract_features(
        find_slides(slides), store=store, plan=plan, encoder=encoder or Spy(), **options
    )


def test_bad_slides_are_listed_and_the_rest_is_done(tissue_slide, tmp_path, write_tiff, paint):
    slides = tissue_slide.parent
    good = paint(384, 384, (slice(64, 384), slice(64, 384)))
    (slides / "text.svs").write_text("not a slide")
    (slides / "zero.ndpi").touch()
    (slides / "cut.tiff").write_bytes(tissue_slide.read_bytes()[:-200_000])
    write_tiff(slides / "glass.tiff", paint(256, 256))
    write_tiff(slides / "unmeasured.tiff", good, mpp=None)
    write_tiff(slides / "coarse.tiff", good, mpp=2.0)
    write_tiff(slides / "zz_last.tiff", good)
    report = extract(slides, tmp_path / "store")
    assert report.done == ["tissue", "zz_last"]
    assert [(f.id, f.status) for f in report.failures] == [
        ("coarse", "too_coarse"),
        ("cut", "unreadable"),
        ("glass", "empty"),
        ("text", "unreadable"),
        ("unmeasured", "missing_mpp"),
        ("zero", "unreadable"),
    ]
    assert all(f.reason and f.remedy and f.path for f in report.failures)
    assert len(list((tmp_path / "store").iterdir())) == 2


def test_given_resolution_mends_a_slide_without_one(tmp_path, write_tiff, paint):
    write_tiff(tmp_path / "a.tiff", paint(384, 384, (slice(0, 384), slice(0, 256))), mpp=None)
    report = extract(tmp_path, tmp_path / "store", mpps={"a": 0.5})
    assert report.done == ["a"]
    attributes = read_slide(slide_folder(tmp_path / "store", "a")).attributes
    assert (attributes["mpp"], attributes["mpp_source"]) == (0.5, "given")


def test_current_features_are_kept_and_stale_ones_replaced(tissue_slide, tmp_path):
    slides, store = tissue_slide.parent, tmp_path / "store"
    encoder = Spy()
    assert extract(slides, store, encoder).num_reused == 0
    first = encoder.calls
    assert extract(slides, store, encoder).num_reused == 1
    assert encoder.calls == first
    assert extract(slides, store, encoder, TilePlan(128)).num_reused == 0
    assert extract(slides, store, encoder, TilePlan(128), mpps={"tissue": 0.5}).num_reused == 0
    with tissue_slide.open("ab") as file:
        file.write(b"\0")
    assert extract(slides, store, encoder, TilePlan(128)).num_reused == 0


def test_an_unexpected_exception_is_a_failure_with_its_text(tissue_slide, tmp_path):
    (failure,) = extract(tissue_slide.parent, tmp_path / "store", FailingEncoder()).failures
    assert failure.status == "failed"
    assert failure.reason == "RuntimeError: out of luck"


def test_processes_give_the_same_features_in_the_same_order(tissue_slide, tmp_path):
    slides = tissue_slide.parent
    shutil.copy(tissue_slide, slides / "again.tiff")
    (slides / "text.svs").write_text("not a slide")
    alone = extract(slides, tmp_path / "a", StatsEncoder())
    together = extract(slides, tmp_path / "b", StatsEncoder(), workers=2)
    assert alone == together
    for slide_id in alone.done:
        one, two = (read_slide(slide_folder(tmp_path / s, slide_id)) for s in "ab")
        assert np.array_equal(one.features(), two.features())
        assert np.array_equal(one.grid, two.grid)


def test_progress_is_plain_lines_without_a_terminal(tissue_slide, tmp_path, capsys):
    extract(tissue_slide.parent, tmp_path / "store", progress=True)
    assert capsys.readouterr().err == "features: 1/1 slides, 0 s\n"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
def test_a_slide_without_permission_is_unreadable(tissue_slide, tmp_path):
    tissue_slide.chmod(0)
    (failure,) = extract(tissue_slide.parent, tmp_path / "store").failures
    assert failure.status == "unreadable"


@pytest.mark.real_data
def test_real_folder_runs_past_its_bad_slides(real_data, tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for path in (real_data / "slides").iterdir():
        if path.is_file():
            (slides / path.name).symlink_to(path)
    for name in ("crc_AC_00.tiff", "crc_H_05.tiff"):
        (slides / name).symlink_to(real_data / "slides" / "colorectal" / name)
    report = extract(slides, tmp_path / "store", StatsEncoder(), TilePlan(256))
    assert report.done == ["CMU-1-Small-Region", "crc_AC_00", "crc_H_05"]
    assert {f.id: f.status for f in report.failures} == {
        "CMU-1-Small-Region.jp2": "unreadable",
        "CMU-1-Small-Region.jpeg": "mpp_suspect",
        "TCGA-CR-7395-01A-01-TS1": "missing_mpp",
        "boxes": "mpp_suspect",
        "broken": "unreadable",
        "camelyon_multiframe": "too_coarse",
        "sm_image": "too_small",
        "small": "too_small",
        "small_vectra": "unreadable",
        "unopenable": "unreadable",
        "unreadable": "unreadable",
        "wsi2dcm_jpeg2000": "too_coarse",
        "wsi2dcm_raw": "too_coarse",
    }
