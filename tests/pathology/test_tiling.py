import numpy as np
import pytest
from PIL import Image

from pipelines.pathology.ordering import hilbert_index
from pipelines.pathology.slides import SlideError, open_slide
from pipelines.pathology.tiling import TilePlan, plan_tiles, read_tiles


def tiles_of(path, plan, mpp=None):
    with open_slide(path, mpp=mpp) as reader:
        tiles = plan_tiles(reader, plan)
        pixels = np.zeros((len(tiles), plan.tile_px, plan.tile_px, 3), dtype=np.uint8)
        seen = np.zeros(len(tiles), dtype=int)
        for rows, block in read_tiles(reader, tiles, plan):
            pixels[rows] = block
            seen[rows] += 1
    assert (seen == 1).all()
    return tiles, pixels


def gradient(height, width):
    """Tissue whose red and blue tell where a pixel lies."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 200 // width, 40 + 0 * x, y * 200 // height], axis=-1).astype(np.uint8)


def test_tiles_lie_on_the_grid_over_tissue_in_hilbert_order(tissue_slide):
    tiles, _ = tiles_of(tissue_slide, TilePlan(64))
    assert {tuple(cell) for cell in tiles.grid.tolist()} == {
        (col, row) for col in range(2, 8) for row in range(2, 6)
    }
    assert (tiles.grid.dtype, tiles.xy0.dtype, tiles.tissue.dtype) == (np.int32, np.int64, "f4")
    assert np.array_equal(tiles.xy0, tiles.grid * 64)
    assert (np.diff(hilbert_index(tiles.grid)) > 0).all()
    assert (tiles.tissue >= 0.5).all()


def test_pixels_at_the_plans_resolution_are_untouched(tissue_slide):
    with open_slide(tissue_slide) as reader:
        slide = reader.read_region(0, 0, *reader.dimensions, 0)
    tiles, pixels = tiles_of(tissue_slide, TilePlan(48, min_tissue=0))
    for (x, y), tile in zip(tiles.xy0, pixels, strict=True):
        assert np.array_equal(tile, slide[y : y + 48, x : x + 48])


def test_a_pyramid_level_of_the_plans_resolution_is_untouched(tmp_path, write_tiff):
    image = gradient(1024, 768)
    path = write_tiff(tmp_path / "a.tiff", image, levels=(1, 2))
    half = np.asarray(Image.fromarray(image).reduce(2))
    tiles, pixels = tiles_of(path, TilePlan(64, mpp=1.0))
    assert len(tiles) == 8 * 6
    for (col, row), tile in zip(tiles.grid, pixels, strict=True):
        assert np.array_equal(tile, half[row * 64 : row * 64 + 64, col * 64 : col * 64 + 64])


@pytest.mark.parametrize(("slide_mpp", "levels"), [(0.499, (1,)), (0.25, (1, 2)), (0.23, (1, 2))])
def test_resampled_tiles_show_the_right_place(tmp_path, write_tiff, slide_mpp, levels):
    side = round(500 / slide_mpp)
    path = write_tiff(tmp_path / "a.tiff", gradient(side, side), mpp=slide_mpp, levels=levels)
    tiles, pixels = tiles_of(path, TilePlan(64, mpp=0.5))
    assert len(tiles) == 15 * 15
    pitch = 64 * 0.5 / slide_mpp
    assert tiles.pitch0 == pytest.approx(pitch, rel=1e-3)
    assert np.abs(tiles.xy0 - tiles.grid * pitch).max() <= 0.6  # nothing drifts
    centre = (tiles.grid + 0.5) * pitch * 200 / side
    assert np.abs(pixels[..., 0].mean(axis=(1, 2)) - centre[:, 0]).max() < 1.5
    assert np.abs(pixels[..., 2].mean(axis=(1, 2)) - centre[:, 1]).max() < 1.5


def test_pixels_are_never_invented(tissue_slide):
    with pytest.raises(SlideError) as caught:
        tiles_of(tissue_slide, TilePlan(64, mpp=0.25))
    assert caught.value.status == "too_coarse"
    tiles, _ = tiles_of(tissue_slide, TilePlan(64, mpp=0.496))  # within the tolerance
    assert len(tiles) > 0


def test_slides_without_a_tissue_tile_are_empty_or_too_small(tmp_path, write_tiff, paint):
    glass = write_tiff(tmp_path / "glass.tiff", paint(256, 256))
    for plan, status in ((TilePlan(64), "empty"), (TilePlan(512), "too_small")):
        with pytest.raises(SlideError) as caught:
            tiles_of(glass, plan)
        assert caught.value.status == status


def test_min_tissue_decides(tissue_slide):
    strict, _ = tiles_of(tissue_slide, TilePlan(96, min_tissue=0.95))
    loose, _ = tiles_of(tissue_slide, TilePlan(96, min_tissue=0.0))
    assert 0 < len(strict) < len(loose)
    assert set(map(tuple, strict.grid.tolist())) < set(map(tuple, loose.grid.tolist()))


def test_hash_follows_the_parameters():
    assert TilePlan(64).hash == TilePlan(64).hash
    assert len({TilePlan().hash, TilePlan(64).hash, TilePlan(mpp=0.6).hash}) == 3


@pytest.mark.parametrize("wrong", [{"tile_px": 8}, {"mpp": 0.0}, {"min_tissue": 1.5}])
def test_impossible_plans_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TilePlan(**wrong)


@pytest.mark.real_data
def test_real_slides_are_tiled(real_data):
    slides = real_data / "slides"
    tiles, pixels = tiles_of(slides / "CMU-1-Small-Region.svs", TilePlan(256, 0.5))
    assert 25 <= len(tiles) <= 45
    assert pixels.mean() < 225
    tiles, _ = tiles_of(slides / "colorectal" / "crc_H_00.tiff", TilePlan(224, 0.5))
    assert 26 <= len(tiles) <= 28  # of the 28 patches that it was stitched from
    for name, status in (("camelyon_multiframe.dcm", "too_coarse"), ("small.svs", "too_small")):
        with pytest.raises(SlideError) as caught:
            tiles_of(slides / name, TilePlan())
        assert caught.value.status == status
    with pytest.raises(SlideError) as caught:
        tiles_of(slides / "unreadable.svs", TilePlan())
    assert caught.value.status == "unreadable"
