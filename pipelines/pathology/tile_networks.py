"""Networks as tile encoders: timm, Hugging Face, or your own; weights are data and never run.

Weights are read as safetensors or by `torch.load(weights_only=True)`; no code of a model's
repository is run and nothing is unpickled.
"""

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import nn

from pipelines.shared.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
POOLS = ("none", "token", "mean", "token_mean")
"""How a network's output becomes a vector: as it is [n, dim]; of tokens [n, tokens, dim] the class
token, the mean of the patches, or both, one after the other."""

_CPU_BATCH, _FIRST_GPU_BATCH, _LARGEST_BATCH = 32, 64, 1024
_HUB = re.compile(r"hf[-_]hub:(?P<repository>.+)")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


class NetworkEncoder:
    """Runs a network on normalised tiles, in this process.

    A tile is resized to `resize_px` a side, of which the middle `input_px` are taken; with neither
    it keeps its size. `precision` is that of weights and activations; half precision also decides
    how features are kept (`feature_dtype`). Without `batch_size` a GPU's batch grows until its
    memory is full (or to 1,024), and a batch that does not fit is halved.

    Raises InputError for a wrong setting and for a network that does not give [n, dim].
    """

    in_workers = False

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        input_px: int | None,
        resize_px: int | None = None,
        pool: str = "none",
        num_prefix: int = 1,
        device: str = "auto",
        precision: str = "float32",
        batch_size: int | None = None,
    ) -> None:
        self.name = re.sub(r"[^\w.-]+", "_", name)
        self._device = _choose_device(device)
        self._dtype = PRECISIONS[_one_of("precision", precision, PRECISIONS)]
        self._pool, self._num_prefix = _one_of("pool", pool, POOLS), num_prefix
        self._input_px, self._resize_px = input_px, resize_px or input_px
        self.fingerprint = module_digest(
            module, (tuple(mean), tuple(std), self._input_px, self._resize_px, pool, precision)
        )
        self._module = module.eval().requires_grad_(False).to(self._device, self._dtype)
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(mean, device=self._device).view(shape)
        self._std = torch.tensor(std, device=self._device).view(shape)
        self._grows = batch_size is None and self._device.type == "cuda"
        self.batch_size = batch_size or (_FIRST_GPU_BATCH if self._grows else _CPU_BATCH)
        self.feature_dtype = np.dtype(np.float32 if precision == "float32" else np.float16)
        self.dim = self._probe(self._resize_px or 224)

    def __call__(self, tiles: np.ndarray) -> np.ndarray:
        """Encode uint8 RGB [n, h, w, 3] as float32 [n, dim]."""
        if tiles.dtype != np.uint8 or tiles.ndim != 4 or tiles.shape[3] != 3:
            raise ValueError(f"tiles must be uint8 [n, h, w, 3]; got {tiles.dtype} {tiles.shape}")
        parts: list[np.ndarray] = []
        start = 0
        while start < len(tiles):
            batch = tiles[start : start + self.batch_size]
            try:
                parts.append(self._encode(batch))
            except torch.OutOfMemoryError as error:
                self._shrink(len(batch), error)
                continue
            start += len(batch)
            if self._grows and len(batch) == self.batch_size:
                self.batch_size = min(2 * self.batch_size, _LARGEST_BATCH)
        return np.concatenate(parts)

    def _probe(self, side: int) -> int:
        try:
            return self(np.zeros((1, side, side, 3), dtype=np.uint8)).shape[1]
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            raise InputError(
                f"encoder {self.name!r} does not take tiles of {self._input_px or side} px: "
                f"{_one_line(error)}; set encoder.input_px, or the network's own size"
            ) from error

    def _shrink(self, size: int, error: Exception) -> None:
        if size == 1:
            raise InputError(
                f"encoder {self.name!r}: one tile does not fit the memory of {self._device}; "
                "use encoder.precision=bfloat16 or another device"
            ) from error
        self._grows = False
        self.batch_size = size // 2
        torch.cuda.empty_cache()

    def _encode(self, tiles: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(tiles)).to(self._device)
            x = self._fit(x.permute(0, 3, 1, 2).float() / 255)
            out = self._module(((x - self._mean) / self._std).to(self._dtype))
            vectors = self._to_vectors(out)
        return vectors.float().cpu().numpy()

    def _fit(self, x: torch.Tensor) -> torch.Tensor:
        """Resize [n, 3, h, w] and take its middle."""
        if self._resize_px is not None and x.shape[-1] != self._resize_px:
            size = (self._resize_px, self._resize_px)
            x = nn.functional.interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        if self._input_px is None:
            return x
        edge = (x.shape[-1] - self._input_px) // 2
        return x[..., edge : edge + self._input_px, edge : edge + self._input_px]

    def _to_vectors(self, out: object) -> torch.Tensor:
        if isinstance(out, torch.Tensor):
            if self._pool == "none" and out.ndim == 2:
                return out
            if self._pool != "none" and out.ndim == 4:  # a map [n, dim, h, w] has no class token
                return out.mean(dim=(2, 3))
            if self._pool != "none" and out.ndim == 3:
                token, patches = out[:, 0], out[:, self._num_prefix :].mean(dim=1)
                chosen = {"token": [token], "mean": [patches], "token_mean": [token, patches]}
                return torch.cat(chosen[self._pool], dim=1)
        shape = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
        raise InputError(
            f"encoder {self.name!r} must map [n, 3, h, w] to [n, dim]; it gave {shape}; tokens "
            f"[n, tokens, dim] need encoder.pool= one of {', '.join(POOLS[1:])}"
        )


class TimmEncoder(NetworkEncoder):
    """A timm model without its classifier; needs the extra `encoders`.

    `model` is timm's name, or `hf-hub:OWNER/NAME`; `arguments` go to `timm.create_model` (names of
    layers as words). `weights` is a local `.safetensors` or torch file; without it they come from
    `repository` (OWNER/NAME; default: the model's own) on the hub, or from the hub's cache where
    HF_HUB_OFFLINE=1. Mean, spread and size are the model's unless given.
    """

    def __init__(
        self,
        model: str,
        repository: str | None = None,
        weights: str | Path | None = None,
        arguments: Mapping[str, object] | None = None,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        input_px: int | None = None,
        resize_px: int | None = None,
        pool: str = "none",
        device: str = "auto",
        precision: str = "float32",
        batch_size: int | None = None,
    ) -> None:
        timm = _import_package("timm")
        module = _create_timm_model(timm, model, dict(arguments or {}))
        if weights is None:
            weights = _fetch_weights(repository or _own_repository(module, model))
        load_weights(module, Path(weights), leave_out=_classifier_names(module))
        data = timm.data.resolve_model_data_config(module)
        super().__init__(
            module,
            f"timm_{model}",
            mean=tuple(mean or data["mean"]),
            std=tuple(std or data["std"]),
            input_px=input_px or _image_side(arguments or {}, data["input_size"]),
            resize_px=resize_px,
            pool=pool,
            num_prefix=int(getattr(module, "num_prefix_tokens", 1)),
            device=device,
            precision=precision,
            batch_size=batch_size,
        )


class HuggingFaceEncoder(NetworkEncoder):
    """A vision model of the transformers library; needs the extra `encoders`.

    `model` is a local folder or a name on the hub (HF_HUB_OFFLINE=1: from its cache alone). Code
    that comes with a model is not run. Mean, spread and size are those of the model's
    `preprocessor_config.json` unless given.
    """

    def __init__(
        self,
        model: str,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        input_px: int | None = None,
        resize_px: int | None = None,
        pool: str = "token",
        device: str = "auto",
        precision: str = "float32",
        batch_size: int | None = None,
    ) -> None:
        transformers = _import_package("transformers")
        try:
            module = transformers.AutoModel.from_pretrained(model, trust_remote_code=False)
            settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(model)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise InputError(
                f"transformers cannot load {model!r}: {_one_line(error)}; give a folder with "
                "config.json, preprocessor_config.json and model.safetensors, or a public name of "
                "a model that needs no code of its own"
            ) from error
        super().__init__(
            _LastHiddenState(module),
            f"huggingface_{Path(model).name if Path(model).is_dir() else model}",
            mean=tuple(mean or settings.get("image_mean", IMAGENET_MEAN)),
            std=tuple(std or settings.get("image_std", IMAGENET_STD)),
            input_px=input_px or _image_size(settings, module),
            resize_px=resize_px,
            pool=pool,
            num_prefix=1 + int(getattr(module.config, "num_register_tokens", 0)),
            device=device,
            precision=precision,
            batch_size=batch_size,
        )


class TorchEncoder(NetworkEncoder):
    """Your own network: `factory` is `package.module:function`, which returns a torch module.

    It is called with `arguments`; of a tuple that it returns the first is taken. The module, or its
    method `method` with `method_arguments`, maps normalised [n, 3, h, w] to [n, dim] (or to tokens,
    with `pool`). `weights` is a local `.safetensors` or torch state dict. Tiles keep their size
    unless `input_px` is given.
    """

    def __init__(
        self,
        factory: str,
        weights: str | Path | None = None,
        arguments: Mapping[str, object] | None = None,
        method: str | None = None,
        method_arguments: Mapping[str, object] | None = None,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        input_px: int | None = None,
        resize_px: int | None = None,
        pool: str = "none",
        device: str = "auto",
        precision: str = "float32",
        batch_size: int | None = None,
    ) -> None:
        module = _call_factory(factory, dict(arguments or {}))
        if weights is not None:
            load_weights(module, Path(weights))
        if method is not None:
            module = _Method(module, method, dict(method_arguments or {}))
        super().__init__(
            module,
            f"torch_{factory.replace(':', '.')}",
            mean=mean,
            std=std,
            input_px=input_px,
            resize_px=resize_px,
            pool=pool,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )


class _LastHiddenState(nn.Module):
    """Gives a transformers model's tokens, or its map, in place of its output object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=x).last_hidden_state


class _Method(nn.Module):
    """Calls a method of a module in place of `forward`."""

    def __init__(self, module: nn.Module, method: str, arguments: dict[str, object]) -> None:
        super().__init__()
        if not callable(getattr(module, method, None)):
            raise InputError(f"encoder.method={method}: {type(module).__name__} has no such method")
        self.module, self.method, self.arguments = module, method, arguments

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.module, self.method)(x, **self.arguments)


def load_weights(module: nn.Module, path: Path, *, leave_out: tuple[str, ...] = ()) -> None:
    """Load a state dict from a `.safetensors` or torch file, all of it, but for some submodules.

    Raises InputError for a file that is missing, holds more than tensors, or does not fit.
    """
    if not path.is_file():
        raise InputError(f"encoder weights {path} do not exist; check weights=FILE")
    try:
        if path.suffix == ".safetensors":
            state = _import_package("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        prefixes = tuple(f"{name}." for name in leave_out)
        module.load_state_dict({k: v for k, v in state.items() if not k.startswith(prefixes)})
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"encoder weights {path} do not fit the model: {_one_line(error)}; give a plain state "
            "dict of this architecture (.safetensors or .pt), and its encoder.arguments"
        ) from error


def module_digest(module: nn.Module, settings: object) -> str:
    """Digest of a module's weights, names and types, and of settings that change its output."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(dtype=torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _create_timm_model(timm: ModuleType, model: str, arguments: dict[str, object]) -> nn.Module:
    if not _HUB.fullmatch(model) and not timm.is_model(model):
        near = ", ".join(timm.list_models(f"*{model}*")[:5]) or "see timm.list_models()"
        raise InputError(f"timm has no model {model!r}; similar: {near}")
    for key in ("mlp_layer", "act_layer", "norm_layer"):
        if isinstance(word := arguments.get(key), str):
            layer = getattr(timm.layers, word, None) or getattr(nn, word, None)
            if layer is None:
                raise InputError(f"encoder.arguments.{key}: neither timm nor torch has {word!r}")
            arguments[key] = layer
    try:
        return timm.create_model(model, **{"num_classes": 0, "pretrained": False, **arguments})
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"timm cannot make {model!r}: {_one_line(error)}; check encoder.arguments; without a "
            "network give the architecture's name and weights=FILE"
        ) from error


def _image_side(arguments: Mapping[str, object], known: tuple[int, ...]) -> int:
    side = arguments.get("img_size", known[-1])
    return int(side if isinstance(side, int) else known[-1])


def _own_repository(module: nn.Module, model: str) -> str:
    found = _HUB.fullmatch(model)
    settings: Mapping[str, object] = getattr(module, "pretrained_cfg", None) or {}
    repository = found["repository"] if found else settings.get("hf_hub_id")
    if not repository:
        raise InputError(f"timm knows no weights of {model!r} on the hub; give weights=FILE")
    return str(repository)


def _fetch_weights(repository: str) -> Path:
    """Return the hub's file of weights, safetensors where there are, from its cache if it can."""
    hub = _import_package("huggingface_hub")
    name, _, revision = repository.partition("@")
    reasons = []
    for file in _WEIGHT_FILES:
        try:
            return Path(hub.hf_hub_download(name, file, revision=revision or None))
        except (OSError, ValueError) as error:  # the hub's errors are of these two kinds
            reasons.append(f"{file}: {_one_line(error)}")
    raise InputError(
        f"no weights of {name} from the hub ({'; '.join(reasons)}); ask for access on its "
        "page and log in with `hf auth login`, or give encoder.weights=FILE"
    )


def _classifier_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the submodules that a model without classifier leaves out of its weights."""
    names = (getattr(module, "pretrained_cfg", None) or {}).get("classifier") or ()
    held = {name.split(".")[0] for name in module.state_dict()}
    listed = (names,) if isinstance(names, str) else tuple(names)
    return tuple(name for name in listed if name.split(".")[0] not in held)


def _image_size(settings: Mapping[str, object], module: nn.Module) -> int:
    size = settings.get("crop_size") or settings.get("size") or module.config.image_size
    if isinstance(size, Mapping):
        size = size.get("height") or size.get("shortest_edge")
    assert isinstance(size, int), f"an image size is a whole number; got {size!r}"
    return size


def _call_factory(factory: str, arguments: dict[str, object]) -> nn.Module:
    module_name, _, function = factory.partition(":")
    try:
        made = getattr(importlib.import_module(module_name), function)(**arguments)
    except (ImportError, AttributeError, TypeError, ValueError, OSError) as error:
        raise InputError(
            f"encoder factory {factory!r} cannot be called: {error}; "
            "give `package.module:function`, importable from here, and its encoder.arguments"
        ) from error
    made = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(made, nn.Module):
        raise InputError(f"encoder factory {factory!r} gave {type(made).__name__}, no torch module")
    return made


def _import_package(name: str) -> ModuleType:
    package = name.split(".")[0]
    if package not in sys.modules and importlib.util.find_spec(package) is None:
        raise InputError(f"this encoder needs {package}: pip install -e '.[encoders]'")
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:
        raise InputError(
            f"{package} is installed but cannot be imported: {error}; "
            "its torchvision must be of the same build (CPU or CUDA) and release as torch"
        ) from error


def _choose_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"encoder.device={device}: {_one_line(error)}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"encoder.device={device}: no GPU is found here; use device=auto or cpu")
    return chosen


def _one_of(key: str, value: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    if value not in known:
        raise InputError(f"encoder.{key}={value}: choose one of {', '.join(known)}")
    return value


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]
