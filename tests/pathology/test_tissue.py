import numpy as np
import pytest
from scipy import ndimage

from pipelines.pathology import tissue
from pipelines.pathology.slides import open_slide
from pipelines.pathology.tissue import find_tissue, read_overview, tissue_fraction

INNER = (slice(128, 384), slice(128, 512))


def mask_of(path):
    with open_slide(path) as reader:
        return find_tissue(reader)


def test_tissue_is_separated_from_glass(tissue_slide):
    found = mask_of(tissue_slide)
    scale_x, scale_y = found.scale
    assert found.threshold_source == "otsu"
    height, width = found.mask.shape
    rows = (np.arange(height) + 0.5) * scale_y
    cols = (np.arange(width) + 0.5) * scale_x
    expected = ((rows > 128) & (rows < 384))[:, None] & ((cols > 128) & (cols < 512))
    assert (found.mask != expected).mean() < 0.03


def test_a_slide_of_glass_or_of_tissue_alone_is_not_split(tmp_path, write_tiff, paint):
    glass = mask_of(write_tiff(tmp_path / "glass.tiff", paint(512, 512)))
    everything = (slice(None), slice(None))
    full = mask_of(write_tiff(tmp_path / "full.tiff", paint(512, 512, everything)))
    assert (glass.threshold_source, glass.mask.mean()) == ("all glass", 0.0)
    assert (full.threshold_source, full.mask.mean()) == ("all tissue", 1.0)


def test_black_scan_border_is_no_tissue(tmp_path, write_tiff, paint):
    image = paint(512, 512, (slice(200, 400), slice(200, 400)))
    image[:100] = 0
    found = mask_of(write_tiff(tmp_path / "a.tiff", image))
    assert found.mask[: found.mask.shape[0] // 6].mean() == 0
    assert found.mask[found.mask.shape[0] * 3 // 5, found.mask.shape[1] * 3 // 5]


def test_specks_go_and_small_holes_close(tmp_path, write_tiff, paint):
    image = paint(1024, 1024, (slice(200, 800), slice(200, 800)))
    image[50:60, 50:60] = (150, 80, 150)
    image[500:530, 500:530] = 243
    found = mask_of(write_tiff(tmp_path / "a.tiff", image))
    scale = found.scale[0]
    assert not found.mask[int(55 / scale), int(55 / scale)]
    assert found.mask[int(515 / scale), int(515 / scale)]


def test_a_grey_smear_is_no_tissue_but_textured_grey_is(tmp_path, write_tiff, paint):
    image = paint(1024, 1024)
    image[100:400, 100:900] = 170  # a shadow: dense, colourless, smooth
    rng = np.random.default_rng(0)
    spots = rng.integers(0, 2, size=(38, 100, 1)).repeat(8, 0).repeat(8, 1)
    image[600:904, 100:900] = 120 + 100 * spots
    found = mask_of(write_tiff(tmp_path / "a.tiff", image))
    unit = 1024 / found.mask.shape[0]
    assert not found.mask[
        int(150 / unit) : int(350 / unit), int(200 / unit) : int(800 / unit)
    ].any()
    textured = found.mask[int(650 / unit) : int(850 / unit), int(200 / unit) : int(800 / unit)]
    assert textured.mean() > 0.95


def test_what_is_out_of_focus_is_flagged(tmp_path, write_tiff):
    rng = np.random.default_rng(0)
    nuclei = ndimage.gaussian_filter((rng.random((1024, 1024)) < 0.004).astype(float), 5)
    nuclei = np.clip(nuclei * 120, 0, 1)[..., None]
    image = (1 - nuclei) * [225, 160, 200] + nuclei * [90, 60, 140]
    image[:, 512:] = ndimage.gaussian_filter(image, (16, 16, 0))[:, 512:]
    path = write_tiff(tmp_path / "a.tiff", image.astype(np.uint8))
    with open_slide(path) as reader:
        found = find_tissue(reader, blur=True)
    blurred = found.flags["blur"]
    assert found.mask.mean() > 0.95
    middle, margin = blurred.shape[1] // 2, blurred.shape[1] // 8
    assert blurred[:, : middle - margin].mean() < 0.02
    assert blurred[:, middle + margin :].mean() > 0.98


class UpperHalf:
    """A tissue model: the upper half of the slide."""

    mpp, fingerprint = 4.0, "upper-half-1"

    def __call__(self, image: np.ndarray) -> np.ndarray:
        share = np.zeros(image.shape[:2], dtype=np.float32)
        share[: len(share) // 2] = 1
        return share


class Wrong(UpperHalf):
    def __call__(self, image: np.ndarray) -> np.ndarray:
        return np.full(image.shape[:2], 7.0)


def test_a_model_of_your_own_takes_the_place_of_the_thresholds(tissue_slide):
    with open_slide(tissue_slide) as reader:
        found = find_tissue(reader, model=UpperHalf())
        height = len(found.mask)
        assert found.mask[: height // 2].all()
        assert not found.mask[height // 2 + 1 :].any()
        assert found.threshold_source == "model"
        with pytest.raises(ValueError, match="between 0 and 1"):
            find_tissue(reader, model=Wrong())


def test_equal_slides_have_equal_masks(tissue_slide):
    one, two = mask_of(tissue_slide), mask_of(tissue_slide)
    assert np.array_equal(one.mask, two.mask)
    assert all(np.array_equal(one.flags[name], two.flags[name]) for name in one.flags)


@pytest.mark.parametrize(("height", "levels"), [(1030, (1,)), (1024, (1, 2))])
def test_strips_give_the_same_overview(tmp_path, write_tiff, paint, monkeypatch, height, levels):
    image = paint(height, 1200, INNER)
    path = write_tiff(tmp_path / "a.tiff", image, levels=levels)
    with open_slide(path) as reader:
        whole = read_overview(reader)
        monkeypatch.setattr(tissue, "_STRIP_PIXELS", 20_000)
        strips = read_overview(reader)
    assert min(whole.shape[:2]) >= 256
    assert np.array_equal(whole, strips)


def test_overview_is_at_most_as_fine_as_the_slide(tmp_path, write_tiff, paint):
    path = write_tiff(tmp_path / "a.tiff", paint(64, 100), mpp=0.25)
    with open_slide(path) as reader:
        assert read_overview(reader).shape == (64, 100, 3)


def test_tissue_fraction_is_the_exact_area(tissue_slide):
    found = mask_of(tissue_slide)
    square = tissue.TissueMask(np.zeros((4, 4), bool), found.overview, (10.0, 10.0), 0.1, "otsu")
    square.mask[1, 1] = True
    corners = np.array([[10, 10], [5, 5], [0, 0], [15, 10], [30, 30]])
    fractions = tissue_fraction(square, corners, 10.0)
    assert fractions == pytest.approx([1.0, 0.25, 0.0, 0.5, 0.0])
    assert tissue_fraction(square, np.array([[0, 0]]), 25.0) == pytest.approx([100 / 625])


@pytest.mark.real_data
def test_real_tissue_is_found_and_blank_glass_is_not(real_data):
    slides = real_data / "slides"
    cmu = mask_of(slides / "CMU-1-Small-Region.svs")
    assert 0.33 < cmu.mask.mean() < 0.45
    height, width = cmu.mask.shape
    assert cmu.mask[int(0.6 * height), int(0.5 * width)]
    assert not cmu.mask[: height // 3, : width // 4].any()
    assert 0.18 < mask_of(slides / "camelyon_multiframe.dcm").mask.mean() < 0.27
    assert mask_of(slides / "sm_image.dcm").threshold_source == "all glass"
