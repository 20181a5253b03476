import importlib.util
import sys
import types

import numpy as np
import pytest
import torch

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
@pytest.mark.parametrize("side", [16, 63, 64])
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
    texture = stripes(8)
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


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_without_its_package_names_the_extra():
    with pytest.raises(InputError, match=r"\[encoders\]"):
        build_encoder("timm", model="resnet18")


class MeanColour(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) * self.gain


@pytest.fixture
def own_network(monkeypatch):
    module = types.ModuleType("own_network")
    module.make = MeanColour
    monkeypatch.setitem(sys.modules, "own_network", module)
    return "own_network:make"


def test_own_torch_network_encodes_normalised_tiles(own_network):
    encoder = build_encoder(
        "torch", factory=own_network, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=2
    )
    tiles = random_tiles(5)
    expected = (tiles.mean(axis=(1, 2)) / 255 - 0.5) / 0.5
    assert encoder.dim == 3
    assert encoder(tiles) == pytest.approx(expected, abs=1e-5)


def test_own_weights_are_loaded_and_fingerprinted(own_network, tmp_path):
    torch.save({"gain": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "good.pt")
    torch.save({"other": torch.zeros(3)}, tmp_path / "bad.pt")
    plain = build_encoder("torch", factory=own_network)
    loaded = build_encoder("torch", factory=own_network, weights=tmp_path / "good.pt")
    tiles = random_tiles(2)
    assert loaded(tiles) == pytest.approx(plain(tiles) * [1, 2, 3], rel=1e-5)
    assert loaded.fingerprint != plain.fingerprint
    for name, message in (("bad.pt", "do not fit"), ("absent.pt", "do not exist")):
        with pytest.raises(InputError, match=message):
            build_encoder("torch", factory=own_network, weights=tmp_path / name)
