import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest

from pipelines.pathology.slides import (
    SlideError,
    SlideFile,
    find_slides,
    open_slide,
    slide_fingerprint,
)
from pipelines.shared.errors import InputError

GREY = np.full((128, 128, 3), 128, dtype=np.uint8)


class LatchedHandle:
    def read_region(self, *_: object) -> None:
        raise openslide.OpenSlideError("latched")

    def close(self) -> None:
        pass


def refusal(path: Path, **options: float) -> SlideError:
    with pytest.raises(SlideError) as caught, open_slide(path, **options) as reader:
        reader.read_region(0, 0, *reader.dimensions, 0)
    return caught.value


def test_slides_are_found_in_subfolders_and_other_files_ignored(tmp_path):
    for name in ("b.svs", "a.TIFF", "labels.csv", "a.png", "._a.svs", "x/c.1.ndpi", "y.zarr/z.tif"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert find_slides(tmp_path) == [
        SlideFile("a", tmp_path / "a.TIFF"),
        SlideFile("b", tmp_path / "b.svs"),
        SlideFile("c.1", tmp_path / "x/c.1.ndpi"),
    ]


def test_dicom_files_of_one_series_are_one_slide_named_after_their_folder(tmp_path):
    for name, uid in (("one/0.dcm", b"1.2"), ("one/1.dcm", b"1.2"), ("two/p.dcm", b"3")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"DICM\x20\x00\x0e\x00UI\x04\x00" + uid.ljust(4, b"\0"))
    assert [s.slide_id for s in find_slides(tmp_path)] == ["one", "p"]


def test_links_back_into_the_tree_end(tmp_path):
    (tmp_path / "a.svs").touch()
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert [s.slide_id for s in find_slides(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    ("name", "message"),
    [("absent", "does not exist"), ("file", "is a file"), ("empty", "no slide")],
)
def test_folder_without_slides_is_refused(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message):
        find_slides(tmp_path / name)


def test_two_slides_with_one_id_are_refused_with_both_paths(tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.svs").touch()
    with pytest.raises(InputError, match=r"'a'.*x/a\.svs and .*y/a\.svs"):
        find_slides(tmp_path)


def test_resolution_comes_from_the_file_or_from_the_caller(tmp_path, write_tiff):
    path = write_tiff(tmp_path / "a.tiff", GREY, mpp=0.25)
    with open_slide(path) as reader:
        assert (reader.mpp, reader.mpp_source) == (pytest.approx(0.25), "tiff_resolution")
    with open_slide(path, mpp=0.5) as reader:
        assert (reader.mpp, reader.mpp_source) == (0.5, "given")


def test_slide_without_resolution_names_the_remedy(tmp_path, write_tiff):
    error = refusal(write_tiff(tmp_path / "a.tiff", GREY, mpp=None))
    assert error.status == "missing_mpp"
    assert "column `mpp`" in error.remedy
    assert "slide_mpp=" in error.remedy


@pytest.mark.parametrize("size", [{"mpp": 0.01}, {"mpp": 352.8}, {"mpp": 0.5, "mpp_y": 0.52}])
def test_implausible_resolution_is_refused(tmp_path, write_tiff, size):
    path = write_tiff(tmp_path / "a.tiff", GREY, **size)
    assert refusal(path).status == "mpp_suspect"
    with open_slide(path, mpp=0.5) as reader:
        assert reader.mpp == 0.5


def test_implausible_given_resolution_is_refused(tmp_path, write_tiff):
    path = write_tiff(tmp_path / "a.tiff", GREY)
    assert refusal(path, mpp=float("nan")).status == "mpp_suspect"


def test_files_that_are_no_slides_are_unreadable_each_with_its_reason(tmp_path):
    (tmp_path / "text.svs").write_text("not a slide\n" * 20)
    (tmp_path / "zero.tiff").touch()
    (tmp_path / "bytes.ndpi").write_bytes(bytes(range(256)))
    found = {p.name: refusal(p) for p in tmp_path.iterdir()}
    assert {error.status for error in found.values()} == {"unreadable"}
    assert "a text file" in found["text.svs"].reason
    assert "0 bytes" in found["zero.tiff"].reason
    assert "begins with" in found["bytes.ndpi"].reason
    gone = refusal(tmp_path / "gone.svs")
    assert gone.status == "no_file"
    assert str(tmp_path / "gone.svs") in gone.reason


def test_truncated_slide_is_unreadable(tmp_path, write_tiff):
    noise = np.random.default_rng(0).integers(0, 255, size=(256, 256, 3), dtype=np.uint8)
    path = write_tiff(tmp_path / "a.tiff", noise)
    path.write_bytes(path.read_bytes()[:-100_000])
    error = refusal(path)
    assert error.status == "unreadable"
    assert "Short read" in error.reason


def test_damage_in_the_middle_is_unreadable_where_it_is_met(tmp_path, write_tiff):
    noise = np.random.default_rng(0).integers(0, 255, size=(256, 256, 3), dtype=np.uint8)
    path = write_tiff(tmp_path / "a.tiff", noise)
    content = bytearray(path.read_bytes())
    content[100_000:120_000] = bytes(20_000)
    path.write_bytes(content)
    error = refusal(path)
    assert error.status == "unreadable"
    assert "256 x 256 px at (0, 0)" in error.reason


def test_reader_recovers_from_a_failed_read(tmp_path, write_tiff, monkeypatch):
    path = write_tiff(tmp_path / "a.tiff", GREY)
    with open_slide(path) as reader:
        reader.close()
        monkeypatch.setattr(reader, "_handle", LatchedHandle())
        assert (reader.read_region(0, 0, 8, 8, 0) == 128).all()


def test_outside_of_the_slide_is_white(tmp_path, write_tiff):
    path = write_tiff(tmp_path / "a.tiff", GREY)
    with open_slide(path) as reader:
        region = reader.read_region(120, 0, 16, 4, 0)
    assert region.shape == (4, 16, 3)
    assert (region[:, :8] == 128).all()
    assert (region[:, 8:] == 255).all()


def test_fingerprint_follows_the_bytes(tmp_path, write_tiff):
    path = write_tiff(tmp_path / "a.tiff", GREY)
    first = slide_fingerprint(path)
    assert slide_fingerprint(path) == first
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert slide_fingerprint(path) != first


@pytest.mark.real_data
def test_real_slides_open_or_say_why_not(real_data):
    slides = {slide.slide_id: slide.path for slide in find_slides(real_data / "slides")}
    with open_slide(slides["CMU-1-Small-Region"]) as reader:
        assert (reader.dimensions, reader.mpp) == ((2220, 2967), 0.499)
    expected = {
        "TCGA-CR-7395-01A-01-TS1": ("missing_mpp", "does not say"),
        "CMU-1-Small-Region.jpeg": ("mpp_suspect", "0.00499"),
        "boxes": ("mpp_suspect", "352.8"),
        "broken": ("unreadable", "a text file"),
        "unreadable": ("unreadable", "16 x 16 px at (0, 0)"),
        "unopenable": ("unreadable", "compression: 52479"),
        "CMU-1-Small-Region.jp2": ("unreadable", "compression: 34712"),
        "small_vectra": ("unreadable", "a TIFF, but not"),
    }
    found = {slide_id: refusal(slides[slide_id]) for slide_id in expected}
    for slide_id, (status, reason) in expected.items():
        assert found[slide_id].status == status
        assert reason in found[slide_id].reason


@pytest.mark.real_data
def test_real_dicom_series_is_one_slide(real_data, tmp_path):
    shutil.copytree(real_data / "slides" / "boxes_dcm", tmp_path / "boxes_dcm")
    (slide,) = find_slides(tmp_path)
    assert slide.slide_id == "boxes_dcm"
    with open_slide(slide.path) as reader:
        assert reader.mpp == 0.499
