"""Model files: weights and everything `predict` needs, as plain values only."""

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines.shared.asides import aside_of
from pipelines.shared.errors import InputError

FORMAT = "gigasparse-model"
VERSION = 1


class Configured(Protocol):
    """A network that can say how to make it again."""

    @property
    def config(self) -> dict[str, object]:
        """Plain values for `build`."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return its weights."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """What a model file holds; the network is `build(config)` with `state_dict` loaded."""

    config: dict[str, object]
    state_dict: dict[str, Tensor]
    metadata: dict[str, object]


def save_model(
    path: Path, network: Configured, *, task: str, metadata: Mapping[str, object]
) -> None:
    """Write a model file, aside and renamed.

    `task` is the pipeline that can read it ("pathology"), `metadata` what its `predict` needs
    beside the network: classes, encoder, geometry. Raises ValueError for anything but plain values,
    since the file loads with `weights_only=True`, and for a name with `=`, which Hydra trips over.
    """
    if "=" in path.name:
        raise ValueError(f"the name of a checkpoint must not hold '='; got {path.name!r}")
    _check_plain(network.config, "config")
    _check_plain(dict(metadata), "metadata")
    content = {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "config": network.config,
        "state_dict": {key: value.detach().cpu() for key, value in network.state_dict().items()},
        "metadata": dict(metadata),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    torch.save(content, aside)
    os.replace(aside, path)


def load_model(path: Path, *, task: str) -> LoadedModel:
    """Read a model file onto the CPU.

    Raises InputError for a missing file, a folder, another kind of file, another task's model and a
    version that this code does not know.
    """
    content = _read(path)
    if content.get("format") != FORMAT:
        if "pytorch-lightning_version" in content:
            raise InputError(
                f"{path} is the state of an unfinished training, not a model: give the run's model "
                f"file{_others(path.parent, path)}, or repeat the train command with the same out="
            )
        raise InputError(f"{path} is not a model of gigasparse{_others(path.parent, path)}")
    if content["version"] != VERSION:
        raise InputError(
            f"{path} has format version {content['version']}, this installation reads {VERSION}: "
            "install the version of gigasparse that wrote it"
        )
    if content["task"] != task:
        raise InputError(
            f"{path} is a model of {content['task']}, not of {task}: use it with "
            f"`python -m pipelines.{content['task']} predict ckpt={path} ...`"
        )
    return LoadedModel(content["config"], content["state_dict"], content["metadata"])


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise InputError(f"{path} is a folder: give a model file{_others(path, path)}")
    if not path.exists():
        raise InputError(f"{path} does not exist: give a model file{_others(path.parent, path)}")
    problem = f"{path} is not a model file, or it is damaged{_others(path.parent, path)}"
    if not zipfile.is_zipfile(path):
        raise InputError(problem)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(problem) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise InputError(problem)
    return content


def _others(folder: Path, path: Path) -> str:
    """Name the model files that stand near, for the end of a message."""
    if not folder.is_dir():
        return ""
    near = sorted(
        file for file in folder.rglob("*.ckpt") if file != path and file.name != "last.ckpt"
    )
    return f" (there is {', '.join(map(str, near[:3]))})" if near else ""


def _check_plain(value: object, name: str) -> None:
    """Raise ValueError unless a value holds only what `weights_only=True` loads."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, f"a key of {name}")
            _check_plain(item, f"{name}[{key!r}]")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{name}[{index}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ValueError(
            f"a checkpoint holds plain values only; {name} is a {type(value).__name__}"
        )
