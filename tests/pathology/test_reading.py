import numpy as np
import pytest
import tifffile

from pipelines.pathology.reading import TileReader
from pipelines.pathology.slides import SlideError, open_slide
from pipelines.pathology.tiling import TilePlan


def tissue(height, width):
    """Smooth colours with grain: what JPEG is made for, and red far from blue."""
    y, x = np.mgrid[:height, :width]
    grain = np.random.default_rng(0).integers(-8, 8, size=(height, width))
    channels = [150 + 60 * np.sin(x / 40) + grain, 90 + grain, 140 + 60 * np.cos(y / 50) + grain]
    return np.stack(channels, axis=-1).astype(np.uint8)


def write_jpeg(path, image, *, photometric="rgb", subsampling=(2, 2), levels=(1,)):
    with tifffile.TiffWriter(path) as tiff:
        for level in levels:
            # tifffile takes RGB and stores YCbCr unless it is told not to
            colours = {"outcolorspace": "rgb"} if photometric == "rgb" else {}
            options = {} if photometric == "rgb" else {"subsampling": subsampling}
            tiff.write(
                image[::level, ::level],
                photometric="rgb",
                tile=(64, 64),
                compression="jpeg",
                compressionargs={"level": 85, **colours},
                resolution=(20_000 / level, 20_000 / level),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 1),
                metadata=None,
                **options,
            )
    return path


def damage(path, index, *, half=False):
    """Overwrite a JPEG tile of the first directory, or its second half."""
    with tifffile.TiffFile(path) as tiff:
        start, count = tiff.pages[0].dataoffsets[index], tiff.pages[0].databytecounts[index]
    skip = count // 2 if half else 0
    with path.open("r+b") as file:
        file.seek(start + skip)
        file.write(bytes(count - skip))


def corners(columns, rows, pitch):
    return np.array([(c * pitch, r * pitch) for r in range(rows) for c in range(columns)])


def plan_of(pitch0, tile_px=48, mpp0=0.5):
    """The plan whose tiles measure `pitch0` level-0 pixels."""
    return TilePlan(tile_px, mpp0 * pitch0 / tile_px)


def read(path, xy0, *, pitch0=48.0, tile_px=48, **options):
    with (
        open_slide(path) as slide,
        TileReader(slide, plan_of(pitch0, tile_px), **options) as tiles,
    ):
        return tiles.source, tiles.read(xy0)


@pytest.mark.parametrize("subsampling", [None, (1, 1), (2, 1), (2, 2)])
def test_jpeg_tiles_give_what_openslide_gives(tmp_path, subsampling):
    kind = "rgb" if subsampling is None else "ycbcr"
    path = write_jpeg(
        tmp_path / "a.tiff", tissue(300, 420), photometric=kind, subsampling=subsampling
    )
    xy0 = corners(8, 6, 48)
    source, ours = read(path, xy0)
    reference, theirs = read(path, xy0, source="openslide")
    assert (source.name, reference.name) == ("jpeg_tiles", "openslide")
    assert kind.upper() in source.why
    assert ours.valid.all()
    assert theirs.valid.all()
    difference = np.abs(ours.pixels.astype(int) - theirs.pixels).max()
    assert difference <= (0 if kind == "rgb" else 2)
    image = tissue(300, 420).astype(int)
    expected = np.stack([image[y : y + 48, x : x + 48] for x, y in xy0])
    assert np.abs(ours.pixels - expected).mean() < 6  # the colours are those that were written


def test_coarser_tiles_come_from_the_fitting_level_through_a_named_filter(tmp_path):
    path = write_jpeg(tmp_path / "a.tiff", tissue(512, 512), levels=(1, 2))
    cases = ((96.0, 1, "none"), (72.0, 0, "lanczos"), (144.0, 1, "lanczos"))
    for pitch0, level, resampling in cases:
        xy0 = np.rint(corners(3, 3, pitch0)).astype(int)
        with open_slide(path) as slide, TileReader(slide, plan_of(pitch0)) as tiles:
            assert (tiles.level.level, tiles.level.filter) == (level, resampling)
            assert tiles.source.name == "jpeg_tiles"
            ours = tiles.read(xy0).pixels
        theirs = read(path, xy0, pitch0=pitch0, source="openslide")[1].pixels
        assert np.abs(ours.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize("pitch0", [48.0, 48.4, 72.0])
def test_a_tiles_pixels_do_not_depend_on_its_company(tmp_path, pitch0):
    path = write_jpeg(tmp_path / "a.tiff", tissue(300, 420))
    xy0 = np.rint(corners(4, 3, pitch0)).astype(int)
    together = read(path, xy0, pitch0=pitch0)[1].pixels
    for row in (0, 5, 11):
        assert np.array_equal(read(path, xy0[[row]], pitch0=pitch0)[1].pixels[0], together[row])
    assert np.array_equal(read(path, xy0[::-1], pitch0=pitch0)[1].pixels[::-1], together)


@pytest.mark.parametrize("source", ["auto", "openslide"])
@pytest.mark.parametrize("half", [False, True])
def test_damage_makes_its_tiles_invalid_and_no_others(tmp_path, source, half):
    path = write_jpeg(tmp_path / "a.tiff", tissue(320, 320))
    xy0 = corners(5, 5, 64)
    intact = read(path, xy0, pitch0=64.0, tile_px=64)[1].pixels
    damage(path, 7, half=half)
    batch = read(path, xy0, pitch0=64.0, tile_px=64, source=source)[1]
    assert np.flatnonzero(~batch.valid).tolist() == [7]
    assert not batch.pixels[7].any()  # neither white nor grey
    others = np.delete(np.arange(25), 7)
    assert np.array_equal(batch.pixels[others], intact[others])
    assert batch.damage
    again = read(path, xy0[[7, 8, 7]], pitch0=64.0, tile_px=64, source=source)[1]
    assert again.valid.tolist() == [False, True, False]


def test_a_file_that_ends_early_says_so(tmp_path):
    path = write_jpeg(tmp_path / "a.tiff", tissue(320, 320))
    with tifffile.TiffFile(path) as tiff:
        last = max(tiff.pages[0].dataoffsets)
    with open_slide(path) as slide, TileReader(slide, plan_of(64.0, 64)) as tiles:
        with path.open("r+b") as file:
            file.truncate(last + 10)
        batch = tiles.read(corners(5, 5, 64))
    assert np.flatnonzero(~batch.valid).tolist() == [24]
    assert "ends after 10" in batch.damage


def test_other_files_are_left_to_openslide_with_the_reason(tmp_path, write_tiff):
    deflated = write_tiff(tmp_path / "deflated.tiff", tissue(256, 256))
    grey = tmp_path / "absent.tiff"
    write_jpeg(grey, tissue(256, 256))
    with tifffile.TiffFile(grey, mode="r+b") as tiff:  # a tile that was never written
        counts = list(tiff.pages[0].databytecounts)
        counts[3] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
    for path, word in ((deflated, "DEFLATE"), (grey, "absent")):
        source, batch = read(path, corners(2, 2, 48))
        assert source.name == "openslide"
        assert word in source.why
        assert batch.valid.all()
    with pytest.raises(SlideError, match=r"no JPEG tiles.*DEFLATE"):
        read(deflated, corners(1, 1, 48), source="jpeg_tiles")


def test_tiles_that_contradict_the_files_colour_space_are_left_to_openslide(tmp_path):
    path = write_jpeg(tmp_path / "a.tiff", tissue(256, 256), photometric="ycbcr")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(2)
    source, batch = read(path, corners(2, 2, 48))
    assert source.name == "openslide"
    assert "do not give OpenSlide's pixels" in source.why
    assert batch.valid.all()


def test_a_tile_outside_the_slide_is_refused_and_rounding_is_not(tmp_path):
    path = write_jpeg(tmp_path / "a.tiff", tissue(128, 128))
    inside = read(path, np.array([[81, 80]]))[1].pixels
    assert np.array_equal(inside, read(path, np.array([[80, 80]]))[1].pixels)
    with pytest.raises(ValueError, match="outside the slide"):
        read(path, np.array([[0, 0], [90, 0]]))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "source", "level0_mpp"),
    [
        ("CMU-1-Small-Region.svs", "jpeg_tiles", 0.499),
        ("colorectal/crc_H_00.tiff", "jpeg_tiles", 0.5),
        ("TCGA-CR-7395-01A-01-TS1.svs", "openslide", 0.5),
    ],
)
def test_real_slides_read_alike_by_either_way(real_data, name, source, level0_mpp):
    with open_slide(real_data / "slides" / name, mpp=level0_mpp) as slide:
        for pitch0 in (256.0, 512.0, 1024.0):
            columns, rows = (min(4, int(side / pitch0)) for side in slide.dimensions)
            xy0 = corners(columns, rows, pitch0)
            with (
                TileReader(slide, plan_of(pitch0, 256, level0_mpp)) as tiles,
                TileReader(
                    slide, plan_of(pitch0, 256, level0_mpp), source="openslide"
                ) as reference,
            ):
                assert tiles.source.name == source
                ours, theirs = tiles.read(xy0), reference.read(xy0)
            assert ours.valid.all()
            assert np.array_equal(ours.pixels, theirs.pixels)
