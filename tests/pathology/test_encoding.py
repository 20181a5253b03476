import numpy as np
import pytest
from PIL import Image

from pipelines.pathology.encoding import StatsEncoder, build_encoder
from pipelines.shared.errors import InputError


def random_tiles(n, side=64):
    rng = np.random.default_rng(n)
    tiles = rng.integers(0, 256, size=(n, side, side, 3), dtype=np.uint8)
    tiles[::3] //= 7
    return tiles


def stripes(period, side=64):
    wave = 128 + 100 * np.sin(np.arange(side) * 2 * np.pi / period)
    return np.broadcast_to(wave[None, :, None], (1, side, side, 3)).astype(np.uint8)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("side", [24, 63, 64])
def test_a_tiles_features_do_not_depend_on_its_batch(grey, side):
    encoder = StatsEncoder(grey=grey)
    tiles = random_tiles(37, side)
    together = encoder(tiles)
    assert together.shape == (37, encoder.dim)
    assert together.dtype == np.float32
    assert np.isfinite(together).all()
    for rows in ([0], [36], [5, 3], list(range(36, -1, -1))):
        assert np.array_equal(encoder(tiles[rows]), together[rows])
    assert np.array_equal(encoder(np.asfortranarray(tiles)), together)


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_tiles_have_finite_features(grey, value):
    tile = np.full((1, 32, 32, 3), value, dtype=np.uint8)
    assert np.isfinite(StatsEncoder(grey=grey)(tile)).all()


def test_colour_tells_pink_from_purple_and_texture_fine_from_coarse():
    pink, purple = (np.full((1, 32, 32, 3), c, np.uint8) for c in ((220, 140, 180), (90, 60, 140)))
    stats = StatsEncoder()
    assert np.abs(stats(pink) - stats(purple)).max() > 0.2
    grey = StatsEncoder(grey=True)
    assert np.abs(grey(stripes(4)) - grey(stripes(16))).max() > 0.2


def test_grey_features_see_neither_colour_nor_brightness_nor_contrast():
    encoder = StatsEncoder(grey=True)
    rng = np.random.default_rng(0)
    grain = rng.integers(20, 236, size=(24, 24)).repeat(3, axis=0).repeat(3, axis=1)
    texture = np.repeat(grain[None, ..., None], 3, axis=3).astype(np.uint8)
    other = (texture * np.array([0.5, 0.5, 0.5]) + 60).astype(np.uint8)
    assert np.abs(encoder(texture) - encoder(other)).max() < 0.05
    flat = encoder(np.full((1, 32, 32, 3), (220, 140, 180), np.uint8))
    assert np.array_equal(flat, encoder(np.full((1, 32, 32, 3), (90, 60, 140), np.uint8)))


def test_equal_settings_mean_equal_fingerprints():
    assert build_encoder("stats").fingerprint == StatsEncoder().fingerprint
    assert build_encoder("stats", grey=True).fingerprint != StatsEncoder().fingerprint


@pytest.mark.parametrize("tiles", [np.zeros((1, 8, 8, 3), "u1"), np.zeros((1, 64, 64, 3), "f4")])
def test_wrong_tiles_are_refused(tiles):
    with pytest.raises(ValueError, match="tiles must be"):
        StatsEncoder()(tiles)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {}, "choose one of: stats, timm, huggingface, torch"),
        ("stats", {"gray": True}, "unknown option 'gray'.*grey"),
        ("timm", {}, "'model' is missing"),
        ("torch", {"factory": "no.such:thing"}, "cannot be called"),
        ("torch", {"factory": "math:pi"}, "cannot be called|no torch module"),
    ],
)
def test_unknown_names_and_options_list_the_right_ones(name, options, message):
    with pytest.raises(InputError, match=message):
        build_encoder(name, **options)


def plain_patterns(grey, above):
    """Shares of the uniform patterns of eight neighbours, pixel by pixel."""
    ring = [(-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1)]
    shares = np.zeros(10)
    for y in range(1, grey.shape[0] - 1):
        for x in range(1, grey.shape[1] - 1):
            bits = [int(grey[y + dy, x + dx] >= min(255, grey[y, x] + above)) for dy, dx in ring]
            changes = sum(bits[i] != bits[i - 1] for i in range(8))
            shares[sum(bits) if changes <= 2 else 9] += 1
    return shares / shares.sum()


def means_of_blocks(image, side):
    """Means of whole blocks, rounded half up."""
    height, width = (n // side for n in image.shape[:2])
    blocks = image[: height * side, : width * side].astype(np.int64)
    blocks = blocks.reshape(height, side, width, side, *image.shape[2:])
    return (2 * blocks.sum(axis=(1, 3)) + side * side) // (2 * side * side)


@pytest.mark.parametrize("shape", [(24, 24), (27, 41)])
def test_numbers_are_what_plain_loops_give(shape):
    rng = np.random.default_rng(5)
    tile = rng.integers(0, 256, size=(*shape, 3)).astype(np.uint8)
    tile[4:12] = tile[4:12] // 9 * 9
    found = StatsEncoder()(tile[None])[0]
    colours = means_of_blocks(tile, 4)
    for channel in range(3):
        values = colours[..., channel] / 255
        density = -np.log10((colours[..., channel] + 1.0) / 256)
        expected = [values.mean(), values.std(), density.mean(), density.std()]
        assert np.allclose(found[7 * channel + np.array([0, 1, 5, 6])], expected, atol=1e-6)
    grey = means_of_blocks(np.asarray(Image.fromarray(tile).convert("L")), 2).astype(np.float64)
    right, down = np.diff(grey, axis=1), np.diff(grey, axis=0)
    square = (np.square(right).mean() + np.square(down).mean()) / 2
    laplacian = grey[1:-1, 2:] + grey[1:-1, :-2] + grey[2:, 1:-1] + grey[:-2, 1:-1]
    laplacian = laplacian - 4 * grey[1:-1, 1:-1]
    expected = [
        grey.std() / 255,
        (np.abs(right).mean() + np.abs(down).mean()) / 2 / 255,
        np.sqrt(square) / 255,
        np.sqrt(np.square(laplacian).mean()) / 255,
        1 - min(square / 2 / grey.var(), 2),
        *plain_patterns(grey, int(grey.std() / 4 + 0.5)),
    ]
    texture = 3 * 7 + 2 * 5  # after three colours and two stains
    assert np.allclose(found[texture : texture + 15], expected, atol=1e-6)
