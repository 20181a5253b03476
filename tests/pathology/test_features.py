import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tifffile
from PIL import Image

from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.slides import find_slides
from pipelines.pathology.store import check_content, read_index, read_slide, slide_folder
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.errors import InputError

PLAN = TilePlan(64)


class Spy:
    """An encoder that counts its calls, and can be told to fail or to die."""

    name, dim, fingerprint, in_workers = "spy", 1, "spy-1", True
    feature_dtype, batch_size = np.dtype(np.float32), 64

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


def test_current_features_are_kept_and_those_of_a_changed_file_replaced(tissue_slide, tmp_path):
    slides, store = tissue_slide.parent, tmp_path / "store"
    encoder = Spy()
    report = extract(slides, store, encoder)
    assert (report.num_reused, [r.num_tiles for r in report.read]) == (0, [24])
    first = encoder.calls
    report = extract(slides, store, encoder)
    assert (report.num_reused, report.read) == (1, [])
    assert encoder.calls == first
    assert extract(slides, store, encoder, mpps={"tissue": 0.5}).num_reused == 0
    with tissue_slide.open("ab") as file:
        file.write(b"\0")
    assert extract(slides, store, encoder, mpps={"tissue": 0.5}).num_reused == 0


def test_features_of_another_encoder_or_plan_are_refused(tissue_slide, tmp_path):
    slides, store = tissue_slide.parent, tmp_path / "store"
    extract(slides, store)
    before = store_bytes(store)
    other = Spy()
    other.fingerprint = "spy-2"
    cases = [
        ((other, PLAN), "encoder spy .fingerprint spy-1., not of encoder spy .fingerprint spy-2."),
        ((StatsEncoder(), TilePlan(128)), "of encoder spy, of tiles cut .* tile_px 64 -> 128"),
        ((Spy(), TilePlan(128)), "tile_px 64 -> 128"),
        ((Spy(), TilePlan(64, mpp=1.0)), "mpp 0.5 -> 1.0"),
        ((Spy(), TilePlan(64, min_tissue=0.1)), "min_tissue 0.5 -> 0.1"),
    ]
    for (encoder, plan), words in cases:
        with pytest.raises(InputError, match=words):
            extract(slides, store, encoder, plan)
    with pytest.raises(InputError, match="tile_px"):
        extract(slides, store, Spy(), TilePlan(128), new_thresholds=True)
    assert store_bytes(store) == before


def test_encoders_share_the_tiles_of_a_slide(tissue_slide, tmp_path):
    slides, encoders = tissue_slide.parent, [Spy(), StatsEncoder(), StatsEncoder(grey=True)]
    store = tmp_path / "store"
    for number, encoder in enumerate(encoders):
        before = store_bytes(store / "tissue.zarr")
        assert extract(slides, store, encoder).num_reused == 0
        after = store_bytes(store / "tissue.zarr")
        assert [p for p in before if after[p] != before[p]] == [store / "tissue.zarr/zarr.json"] * (
            number > 0
        )
        assert extract(slides, store, encoders[0]).num_reused == 1
    check_content(store / "tissue.zarr")
    other = tmp_path / "other"
    for encoder in encoders[::-1]:
        extract(slides, other, encoder)
    one, two = (read_slide(slide_folder(s, "tissue")).attributes for s in (store, other))
    assert one["digest"] == two["digest"]
    assert list(one["encoders"]) == ["spy", "stats", "stats_grey"]
    alone = tmp_path / "alone"
    extract(slides, alone, StatsEncoder())
    expected = read_slide(slide_folder(alone, "tissue"))
    for named in ("stats", StatsEncoder().fingerprint):
        found = read_slide(slide_folder(store, "tissue"), named)
        assert (found.encoder, found.num_features) == ("stats", expected.num_features)
        assert np.array_equal(found.features(), expected.features())
    with pytest.raises(InputError, match="spy, stats, stats_grey: say of which encoder"):
        read_slide(slide_folder(store, "tissue")).features()
    with pytest.raises(InputError, match="none of encoder uni"):
        read_slide(slide_folder(store, "tissue"), "uni")
    index = read_index(store)
    assert index[["slide_id", "encoder"]].to_numpy().tolist() == [
        ["tissue", name] for name in ("spy", "stats", "stats_grey")
    ]


def test_tiles_that_several_encoders_share_are_not_changed_for_one(tissue_slide, tmp_path):
    slides, store = tissue_slide.parent, tmp_path / "store"
    extract(slides, store, Spy())
    extract(slides, store, StatsEncoder())
    looser = TilePlan(64, min_tissue=0.1)
    for encoder in (Spy(), StatsEncoder(grey=True)):
        with pytest.raises(InputError, match=r"encoder spy and stats, .*min_tissue 0.5 -> 0.1"):
            extract(slides, store, encoder, looser, new_thresholds=True)
    image = np.asarray(Image.open(tissue_slide)).copy()
    image[:8] = 0
    tifffile.imwrite(tissue_slide, image, tile=(64, 64), photometric="rgb",
                     resolution=(20_000, 20_000), resolutionunit="CENTIMETER")  # fmt: skip
    with pytest.raises(InputError, match="an earlier file or another mpp"):
        extract(slides, store, StatsEncoder())


def test_an_encoder_whose_adding_was_interrupted_is_added_again(tissue_slide, tmp_path):
    slides, store = tissue_slide.parent, tmp_path / "store"
    extract(slides, store, Spy())
    unfinished = store / "tissue.zarr" / "features" / "stats"
    shutil.copytree(store / "tissue.zarr" / "features" / "spy", unfinished)
    check_content(store / "tissue.zarr")
    assert extract(slides, store, StatsEncoder()).num_reused == 0
    check_content(store / "tissue.zarr")
    assert read_slide(store / "tissue.zarr", "stats").num_features == StatsEncoder().dim


def test_damaged_features_are_one_failure_among_others(tissue_slide, tmp_path):
    slides, store = tissue_slide.parent, tmp_path / "store"
    shutil.copy(tissue_slide, slides / "other.tiff")
    extract(slides, store, Spy())
    chunk = store / "tissue.zarr" / "features" / "spy" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:-4])
    looser = TilePlan(64, min_tissue=0.01)
    report = extract(slides, store, Spy(), looser, new_thresholds=True)
    assert report.done == ["other"]
    assert [failure.status for failure in report.failures] == ["damaged"]


def store_bytes(store):
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_looser_thresholds_encode_only_the_missing_tiles(tmp_path, write_tiff, paint):
    image = paint(512, 640, (slice(100, 400), slice(100, 500)))
    write_tiff(tmp_path / "a.tiff", image)
    strict, loose = TilePlan(64, min_tissue=0.9), TilePlan(64, min_tissue=0.1)
    first = extract(tmp_path, tmp_path / "store", plan=strict).read[0]
    report = extract(tmp_path, tmp_path / "store", plan=loose, new_thresholds=True).read[0]
    assert report.num_reused == first.num_tiles < report.num_tiles
    extract(tmp_path, tmp_path / "fresh", plan=loose)
    grown, fresh = (read_slide(slide_folder(tmp_path / s, "a")) for s in ("store", "fresh"))
    assert np.array_equal(grown.grid, fresh.grid)
    assert np.array_equal(grown.features(), fresh.features())
    assert grown.attributes["digest"] == fresh.attributes["digest"]
    back = extract(tmp_path, tmp_path / "store", plan=strict, new_thresholds=True).read[0]
    assert (back.num_tiles, back.num_reused) == (first.num_tiles, first.num_tiles)


def jpeg_pyramid(path, image):
    """A slide whose overview is whole when tiles of its first level are damaged."""
    with tifffile.TiffWriter(path) as tiff:
        for level in (1, 4):
            tiff.write(
                image[::level, ::level],
                photometric="rgb",
                tile=(64, 64),
                compression="jpeg",
                resolution=(20_000 / level, 20_000 / level),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 1),
                metadata=None,
            )
    return path


def damage(path, *tiles):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        places = [(page.dataoffsets[tile], page.databytecounts[tile]) for tile in tiles]
    with path.open("r+b") as file:
        for start, count in places:
            file.seek(start)
            file.write(bytes(count))


@pytest.mark.parametrize("source", ["auto", "openslide"])
def test_damaged_tiles_are_left_out_and_counted(tmp_path, paint, source):
    path = jpeg_pyramid(tmp_path / "a.tiff", paint(1024, 1024, (slice(0, 1024), slice(0, 1024))))
    whole = extract(tmp_path, tmp_path / "whole", source=source).read[0]
    assert (whole.num_tiles, whole.num_damaged) == (256, 0)
    assert whole.source == ("jpeg_tiles" if source == "auto" else "openslide")
    damage(path, 17, 18, 200)  # columns 1, 2 and 8, rows 1, 1 and 12
    report = extract(tmp_path, tmp_path / "store", source=source).read[0]
    assert (report.num_tiles, report.num_damaged) == (253, 3)
    assert report.damage
    before, after = (read_slide(slide_folder(tmp_path / s, "a")) for s in ("whole", "store"))
    kept = [cell not in ([1, 1], [2, 1], [8, 12]) for cell in before.grid.tolist()]
    assert np.array_equal(after.grid, before.grid[kept])
    assert np.array_equal(after.features(), before.features()[kept])


def test_a_slide_with_too_much_damage_is_unreadable(tmp_path, paint):
    path = jpeg_pyramid(tmp_path / "a.tiff", paint(1024, 1024, (slice(0, 1024), slice(0, 1024))))
    damage(path, *range(32, 60))
    (failure,) = extract(tmp_path, tmp_path / "store").failures
    assert failure.status == "unreadable"
    assert "28 of 256 tiles are damaged" in failure.reason


class Half(Spy):
    """A costly encoder that stays in this process, of half precision."""

    in_workers, feature_dtype = False, np.dtype(np.float16)

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        self.calls += 1
        self.largest = max(getattr(self, "largest", 0), len(tiles))
        return super().__call__(tiles)


def test_tiles_of_one_slide_are_read_in_processes_alike(tmp_path, paint, monkeypatch):
    monkeypatch.setattr("pipelines.pathology.processes._TILES_PER_WORKER", 10)
    path = jpeg_pyramid(tmp_path / "a.tiff", paint(1024, 1024, (slice(0, 1024), slice(0, 1024))))
    damage(path, 17, 200)
    reports = [
        extract(tmp_path, tmp_path / f"{kind}{workers}", encoder, workers=workers).read
        for kind, encoder in (("stats", StatsEncoder()), ("half", Half()))
        for workers in (1, 2)
    ]
    assert reports[0] == reports[1] == reports[2] == reports[3]
    for kind, dtype in (("stats", np.float32), ("half", np.float16)):
        one, two = (read_slide(slide_folder(tmp_path / f"{kind}{n}", "a")) for n in (1, 2))
        assert one.features().dtype == dtype
        assert np.array_equal(one.features(), two.features())
        assert one.attributes["digest"] == two.attributes["digest"]


class Deadly(Spy):
    """Ends its process at the first tile."""

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        os._exit(1)


def test_a_process_that_dies_costs_its_slide_alone(tmp_path, paint, monkeypatch):
    monkeypatch.setattr("pipelines.pathology.processes._TILES_PER_WORKER", 1)
    jpeg_pyramid(tmp_path / "a.tiff", paint(256, 256, (slice(0, 256), slice(0, 256))))
    (failure,) = extract(tmp_path, tmp_path / "store", Deadly(), workers=None).failures
    assert failure.status == "failed"
    assert "died" in failure.reason


class Loud(Half):
    """Gives values that half precision cannot hold."""

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        return super().__call__(tiles) + np.float32(1e5)


def test_values_beyond_half_precision_are_kept_in_single(tissue_slide, tmp_path):
    extract(tissue_slide.parent, tmp_path / "store", Loud())
    features = read_slide(slide_folder(tmp_path / "store", "tissue")).features()
    assert features.dtype == np.float32
    assert features.min() > 1e5


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


def test_a_listed_slide_that_is_not_there_is_told_from_a_full_disk(tissue_slide, tmp_path):
    listed = find_slides(tissue_slide.parent)
    gone = replace(listed[0], slide_id="gone", path=tissue_slide.with_name("gone.svs"))
    report = extract_features(
        [*listed, gone], store=tmp_path / "store", plan=PLAN, encoder=Spy(), workers=1,
        progress=False,
    )  # fmt: skip
    assert report.done == ["tissue"]
    assert [(failure.id, failure.status) for failure in report.failures] == [("gone", "no_file")]
    assert "correct the path" in report.failures[0].remedy


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
