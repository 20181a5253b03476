"""Networks as encoders. What needs timm or transformers runs where they are."""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from pipelines.pathology.encoding import build_encoder
from pipelines.pathology.tile_networks import NetworkEncoder, load_weights, module_digest
from pipelines.shared.conf_tree import conf_folder
from pipelines.shared.errors import InputError

PUBLISHED = {  # millions of parameters, features
    "uni": (303, 1024),
    "uni2": (681, 1536),
    "virchow": (631, 2560),
    "virchow2": (631, 2560),
    "gigapath": (1135, 1536),
    "h_optimus_0": (1135, 1536),
    "h_optimus_1": (1135, 1536),
}


def require(package):
    """Import a package of the extra `encoders`, or skip with the reason."""
    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError, OSError) as error:
        return pytest.skip(f"{package} cannot be imported here: {error}")


def random_tiles(n, side=64):
    return np.random.default_rng(n).integers(0, 256, size=(n, side, side, 3), dtype=np.uint8)


class MeanColour(torch.nn.Module):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((3,), gain))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(dim=(2, 3)) * self.gain

    def tokens(self, x: torch.Tensor, *, extra: int) -> torch.Tensor:
        """A class token of ones, `extra` registers, and each quarter's mean colour."""
        quarters = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        first = torch.ones(len(x), 1 + extra, 3, device=x.device, dtype=x.dtype)
        return torch.cat([first, quarters], dim=1)


@pytest.fixture
def own_network(monkeypatch):
    module = types.ModuleType("own_network")
    module.make = MeanColour
    module.make_two = lambda: (MeanColour(), "and what else it gives")
    monkeypatch.setitem(sys.modules, "own_network", module)
    return "own_network:make"


def test_own_network_encodes_normalised_tiles(own_network):
    encoder = build_encoder(
        "torch", factory=own_network, mean=(0.5,) * 3, std=(0.5,) * 3, batch_size=2
    )
    tiles = random_tiles(5)
    expected = (tiles.mean(axis=(1, 2)) / 255 - 0.5) / 0.5
    assert encoder.dim == 3
    assert encoder(tiles) == pytest.approx(expected, abs=1e-5)


def test_own_networks_take_arguments_and_another_method(own_network):
    plain = build_encoder("torch", factory=own_network)
    louder = build_encoder("torch", factory=own_network, arguments={"gain": 2.0})
    tiles = random_tiles(2)
    assert louder(tiles) == pytest.approx(2 * plain(tiles), rel=1e-5)
    options = {"method": "tokens", "method_arguments": {"extra": 0}}
    both = build_encoder("torch", factory="own_network:make_two", pool="token_mean", **options)
    found = both(tiles)
    assert found.shape == (2, 6)
    assert (found[:, :3] == 1).all()
    assert found[:, 3:] == pytest.approx(plain(tiles), abs=1e-5)
    with pytest.raises(InputError, match="no such method"):
        build_encoder("torch", factory=own_network, method="absent")
    with pytest.raises(InputError, match=r"need encoder.pool= one of token, mean, token_mean"):
        build_encoder("torch", factory=own_network, **options)


def network(module=None, **options):
    settings = {"mean": (0.0,) * 3, "std": (1.0,) * 3, "input_px": None, "device": "cpu"}
    return NetworkEncoder(module or MeanColour(), "own/net", **(settings | options))


class Tokens(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return MeanColour().tokens(x, extra=2)


def test_registers_count_neither_as_class_nor_as_patches():
    tiles = random_tiles(3)
    colour = tiles.mean(axis=(1, 2)) / 255
    for pool, dim in (("token", 3), ("mean", 3), ("token_mean", 6)):
        encoder = network(Tokens(), pool=pool, num_prefix=3)
        assert encoder.dim == dim
        if pool != "token":
            assert encoder(tiles)[:, -3:] == pytest.approx(colour, abs=1e-5)


def test_the_middle_of_a_resized_tile_is_taken():
    tiles = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    tiles[:, 16:48, 16:48] = 255
    assert network(input_px=16, resize_px=32)(tiles) == pytest.approx(1.0, abs=0.02)
    assert network(input_px=32)(tiles) == pytest.approx(0.25, abs=0.02)


def test_half_precision_is_near_and_another_encoder():
    tiles = random_tiles(4)
    full = network()
    for precision in ("float16", "bfloat16"):
        half = network(precision=precision)
        assert half(tiles).dtype == np.float32
        assert half(tiles) == pytest.approx(full(tiles), abs=2e-2)
        assert half.feature_dtype == np.float16
        assert half.fingerprint != full.fingerprint
    assert full.feature_dtype == np.float32


class Small(MeanColour):
    """Has memory for eight tiles."""

    def __init__(self, room: int = 8) -> None:
        super().__init__()
        self.room, self.sizes = room, []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("no room")
        return super().forward(x)


def test_a_batch_that_does_not_fit_is_halved_and_one_that_grew_too_far_too():
    module = Small()
    encoder = network(module, batch_size=32)
    tiles = random_tiles(40)
    assert encoder(tiles) == pytest.approx(network()(tiles), abs=1e-5)
    assert module.sizes[1:] == [32, 16, 8, 8, 8, 8, 8]
    assert encoder.batch_size == 8
    module = Small(room=16)
    encoder = network(module, batch_size=4)
    encoder._grows = True  # as on a GPU
    assert encoder(tiles) == pytest.approx(network()(tiles), abs=1e-5)
    assert module.sizes[1:] == [4, 8, 16, 12]
    assert encoder(tiles).shape == (40, 3)
    assert module.sizes[5:8] == [32, 16, 16]
    with pytest.raises(InputError, match="one tile does not fit"):
        network(Small(room=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float8"}, "encoder.precision=float8: choose one of float32"),
        ({"pool": "max"}, "encoder.pool=max: choose one of none"),
        ({"device": "gpu"}, "encoder.device=gpu"),
        ({"input_px": 0.5}, "does not take tiles"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(InputError, match=message):
        network(**options)


def test_weights_are_loaded_and_fingerprinted(own_network, tmp_path):
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


class Malice:
    """What a pickle may do: call anything when it is opened."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('run')",))


def test_weights_that_would_run_code_are_refused(tmp_path):
    torch.save({"gain": Malice()}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"weights\.pt do not fit the model"):
        load_weights(MeanColour(), tmp_path / "weights.pt")


def test_a_digest_follows_values_names_and_settings():
    one, two = MeanColour(), MeanColour(2.0)
    digests = {module_digest(m, s) for m in (one, two) for s in ((224,), (256,))}
    assert len(digests) == 4
    assert module_digest(one, ()) == module_digest(MeanColour(), ())


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_an_encoder_without_its_package_names_the_extra():
    with pytest.raises(InputError, match=r"\[encoders\]"):
        build_encoder("timm", model="resnet18")


@pytest.fixture
def stub_timm(monkeypatch):
    """As much of timm as the encoder uses, with one model that has a classifier."""
    made = {}

    def create_model(name, **arguments):
        made.update(name=name, arguments=arguments)
        module = MeanColour()
        module.pretrained_cfg = {"classifier": "head", "hf_hub_id": "timm/mean"}
        return module

    timm = types.ModuleType("timm")
    timm.create_model = create_model
    timm.is_model = lambda name: name == "mean"
    timm.list_models = lambda pattern: ["mean"]
    timm.layers = types.SimpleNamespace(SwiGLUPacked="a layer of timm")
    config = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 32, 32)}
    timm.data = types.SimpleNamespace(resolve_model_data_config=lambda module: config)
    monkeypatch.setitem(sys.modules, "timm", timm)
    return made


def test_timm_models_lose_their_classifier_and_load_as_data(stub_timm, tmp_path):
    torch.save({"gain": torch.ones(3), "head.weight": torch.ones(1)}, tmp_path / "w.pt")
    encoder = build_encoder(
        "timm",
        model="mean",
        weights=tmp_path / "w.pt",
        arguments={"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU", "init_values": 1e-5},
    )
    tiles = random_tiles(2, 32)
    assert encoder(tiles) == pytest.approx((tiles.mean(axis=(1, 2)) / 255 - 0.5) / 0.25, abs=1e-5)
    assert stub_timm["arguments"] == {
        "num_classes": 0,
        "pretrained": False,  # timm itself may unpickle
        "mlp_layer": "a layer of timm",
        "act_layer": torch.nn.SiLU,
        "init_values": 1e-5,
    }
    with pytest.raises(InputError, match="neither timm nor torch has 'Swish9'"):
        build_encoder("timm", model="mean", arguments={"act_layer": "Swish9"})
    with pytest.raises(InputError, match="similar: mean"):
        build_encoder("timm", model="meen")


def test_weights_of_the_hub_are_fetched_as_files(stub_timm, tmp_path, monkeypatch):
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        if file.endswith(".safetensors"):
            raise OSError("404: no such file")
        torch.save({"gain": torch.full((3,), 2.0)}, tmp_path / file)
        return str(tmp_path / file)

    hub = types.ModuleType("huggingface_hub")
    hub.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    build_encoder("timm", model="mean", repository="owner/name@v2")
    assert asked == [
        ("owner/name", "model.safetensors", "v2"),
        ("owner/name", "pytorch_model.bin", "v2"),
    ]
    build_encoder("timm", model="mean")
    build_encoder("timm", model="hf-hub:owner/other")
    assert [repository for repository, *_ in asked[3::2]] == ["timm/mean", "owner/other"]
    hub.hf_hub_download = lambda *_, **__: (_ for _ in ()).throw(OSError("gated"))
    with pytest.raises(InputError, match=r"gated.*hf auth login.*encoder.weights=FILE"):
        build_encoder("timm", model="mean")


@pytest.mark.parametrize("name", [*PUBLISHED, "conch"])
def test_published_models_have_complete_configurations(name):
    config = OmegaConf.to_container(OmegaConf.load(conf_folder() / "encoder" / f"{name}.yaml"))
    kind = config.pop("name")
    with pytest.raises(InputError) as caught:
        build_encoder(kind, **config)
    assert "option" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_built_by_timm(name, tmp_path):
    """Random weights through the whole road: file, digest, half precision, a growing batch."""
    timm = require("timm")
    from pipelines.pathology.tile_networks import _create_timm_model

    config = OmegaConf.to_container(OmegaConf.load(conf_folder() / "encoder" / f"{name}.yaml"))
    module = _create_timm_model(timm, config["model"], dict(config["arguments"]))
    millions, dim = PUBLISHED[name]
    assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    del module
    config["weights"] = tmp_path / "pytorch_model.bin"
    encoder = build_encoder(**config)
    features = encoder(random_tiles(70, 256))
    assert features.shape == (70, dim)
    assert np.isfinite(features).all()
    assert encoder.batch_size == 128


def test_timm_models_of_every_kind_encode(tmp_path):
    timm = require("timm")
    cases = [
        ("vit_tiny_patch16_224", {"img_size": 32}, "none", 192),
        ("vit_tiny_patch16_224", {"img_size": 32, "global_pool": ""}, "token_mean", 384),
        ("resnet10t", {}, "none", 512),
    ]
    for model, arguments, pool, dim in cases:
        state = timm.create_model(model, pretrained=False, **arguments).state_dict()
        torch.save(state, tmp_path / "weights.pt")  # with its classifier
        encoder = build_encoder(
            "timm", model=model, arguments=arguments, weights=tmp_path / "weights.pt", pool=pool
        )
        assert encoder(random_tiles(2)).shape == (2, dim)


def test_hugging_face_models_of_every_kind_encode(tmp_path):
    transformers = require("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"height": 28, "width": 28},
    }
    cases = [
        ("ViT", {**small, "image_size": 28, "patch_size": 7, "intermediate_size": 32}, 1, 32),
        ("Dinov2WithRegisters", {**small, "image_size": 28, "patch_size": 7}, 5, 32),
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]}, 1, 8),
    ]
    for kind, options, num_prefix, dim in cases:
        config = getattr(transformers, f"{kind}Config")(**options)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path / kind)
        (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(settings))
        encoder = build_encoder("huggingface", model=str(tmp_path / kind))
        assert (encoder.dim, encoder._num_prefix, encoder._input_px) == (dim, num_prefix, 28)
        assert encoder.name == f"huggingface_{kind}"
        assert np.isfinite(encoder(random_tiles(2))).all()
    with pytest.raises(InputError, match="transformers cannot load"):
        build_encoder("huggingface", model=str(tmp_path / "nowhere"))
