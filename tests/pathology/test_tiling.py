import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from pipelines.pathology.ordering import hilbert_index
from pipelines.pathology.reading import TileReader
from pipelines.pathology.slides import SlideError, open_slide
from pipelines.pathology.tiling import (
    TilePlan,
    choose_level,
    make_plan,
    plan_tiles,
    survey_tiles,
)
from pipelines.shared.errors import InputError


def tiles_of(path, plan, mpp=None):
    with open_slide(path, mpp=mpp) as reader:
        tiles = plan_tiles(reader, plan)
        with TileReader(reader, plan) as source:
            batch = source.read(tiles.xy0)
    assert batch.valid.all()
    return tiles, batch.pixels


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


def test_a_survey_holds_every_cell_and_thresholds_choose(tissue_slide):
    with open_slide(tissue_slide) as reader:
        survey = survey_tiles(reader, TilePlan(96))
        loose = survey.choose(TilePlan(96, min_tissue=0.0))
        strict = survey.choose(TilePlan(96, min_tissue=0.95))
        direct = plan_tiles(reader, TilePlan(96, min_tissue=0.95))
    assert len(loose) == len(survey) > len(strict) > 0
    assert np.array_equal(strict.index, np.flatnonzero(survey.tissue >= 0.95))
    assert np.array_equal(strict.grid, direct.grid)
    assert TilePlan(96).grid_hash == TilePlan(96, min_tissue=0.9, leave_out=("pen",)).grid_hash
    assert TilePlan(96).grid_hash != TilePlan(64).grid_hash


def test_flagged_tiles_are_left_out_and_counted(tmp_path, write_tiff, paint):
    image = paint(640, 640, (slice(64, 576), slice(64, 576)))
    image[64:192, 64:320] = (40, 120, 70)  # green ink over 4 x 2 tiles
    image[448:576, 448:576] = 5  # a black mark over 2 x 2
    with open_slide(write_tiff(tmp_path / "a.tiff", image)) as reader:
        survey = survey_tiles(reader, TilePlan(64))
    everything = survey.choose(TilePlan(64, min_tissue=0))
    without_pen = survey.choose(TilePlan(64, min_tissue=0, leave_out=["pen"]))
    pen = {tuple(cell) for cell in everything.grid.tolist()} - set(
        map(tuple, without_pen.grid.tolist())
    )
    assert pen == {(col, row) for col in range(1, 5) for row in range(1, 3)}
    dark = survey.flagged["dark"]
    assert {tuple(c) for c in survey.grid[dark > 0.25].tolist()} <= {(7, 7), (7, 8), (8, 7), (8, 8)}
    assert "blur" not in survey.flagged


def blob_slide(path, write_tiff, *, mpp, levels):
    """Irregular tissue of 0.5 mm a side at 0.25 um per pixel, or the same scan reduced."""
    rng = np.random.default_rng(3)
    relief = ndimage.gaussian_filter(rng.normal(size=(96, 96)), 8)
    tissue = Image.fromarray(relief > np.quantile(relief, 0.6)).resize((2048, 2048))
    image = rng.integers(241, 246, size=(2048, 2048, 3)).astype(np.uint8)
    stained = rng.integers(-25, 25, size=(2048, 2048, 1)) + np.array([200, 110, 170])
    image[np.asarray(tissue)] = stained[np.asarray(tissue)]
    if mpp != 0.25:
        side = round(2048 * 0.25 / mpp)
        image = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BOX))
    return write_tiff(path, image, mpp=mpp, levels=levels)


def test_one_scan_at_two_resolutions_has_the_same_cells(tmp_path, write_tiff):
    plan = TilePlan(16, mpp=1.0, min_tissue=0.5)
    cells = []
    for mpp, levels in ((0.25, (1, 4)), (0.5, (1, 2))):
        path = blob_slide(tmp_path / f"{mpp}.tiff", write_tiff, mpp=mpp, levels=levels)
        with open_slide(path) as reader:
            cells.append({tuple(c) for c in plan_tiles(reader, plan).grid.tolist()})
    assert len(cells[0]) > 300
    assert len(cells[0] & cells[1]) / len(cells[0] | cells[1]) >= 0.99


def test_the_grid_starts_where_the_scanners_picture_does(tissue_slide):
    with open_slide(tissue_slide) as reader:
        reader.bounds = (100, 50, 520, 400)
        tiles = plan_tiles(reader, TilePlan(64))
    assert np.array_equal(tiles.xy0, tiles.grid * 64 + [100, 50])
    assert (tiles.xy0 + 64 <= [620, 450]).all()


LEVELS = [  # downsamples of the slide, wanted um/px at 0.25, level, filter
    ((1, 2, 4), 0.25, 0, "none"),
    ((1, 2, 4), 0.5, 1, "none"),
    ((1, 2, 4), 0.499, 1, "lanczos"),  # 0.2 % coarser than wanted: within the tolerance of 1 %
    ((1, 2, 4), 0.49, 0, "lanczos"),
    ((1, 2, 4), 0.9, 1, "lanczos"),
    ((1, 2, 4), 8.0, 2, "lanczos"),
]


@pytest.mark.parametrize(("levels", "mpp", "level", "name"), LEVELS)
def test_the_coarsest_level_that_is_fine_enough_is_read(
    tmp_path, write_tiff, levels, mpp, level, name
):
    path = write_tiff(tmp_path / "a.tiff", gradient(512, 512), mpp=0.25, levels=levels)
    with open_slide(path) as reader:
        chosen = choose_level(reader, mpp)
    assert (chosen.level, chosen.filter) == (level, name)
    assert chosen.downsample * chosen.shrink == pytest.approx(mpp / 0.25, rel=1e-3)


def test_a_side_in_micrometres_must_be_whole_pixels():
    plan = make_plan({"tile_px": 256, "tile_um": 256, "mpp": 2, "min_tissue": 0.5})
    assert (plan.tile_px, plan.mpp, plan.leave_out) == (128, 2, ())
    for wrong, words in (
        ({"tile_um": 256, "mpp": 1.14}, "224.561 pixels; give mpp=1.13778, at which it is 225"),
        ({"tile_um": -1}, "tile_um must be a positive number"),
        ({"leave_out": ["folds"]}, "leave_out takes pen, dark, blur; got 'folds'"),
        ({"max_flagged": 2}, "max_flagged must lie between 0 and 1"),
    ):
        with pytest.raises(InputError, match=words.replace("(", r"\(")):
            make_plan({"tile_px": 256, "mpp": 0.5, "min_tissue": 0.5} | wrong)


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
