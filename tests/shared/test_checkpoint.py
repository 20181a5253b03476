from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipelines.shared.checkpoint import load_model, save_model
from pipelines.shared.errors import InputError

METADATA: dict[str, object] = {"classes": ["a", "b"], "plan": {"mpp": 0.5}, "grey": True, "n": None}


def test_a_saved_model_reads_back_with_weights_only(
    tmp_path: Path, make_network: Callable[..., nn.Module]
) -> None:
    network = make_network()
    path = tmp_path / "run" / "model.ckpt"

    save_model(path, network, task="pathology", metadata=METADATA)  # type: ignore[arg-type]
    loaded = load_model(path, task="pathology")

    again = make_network(seed=1)
    again.load_state_dict(loaded.state_dict)
    assert loaded.config == network.config
    assert loaded.metadata == METADATA
    for name, value in network.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert [file.name for file in path.parent.iterdir()] == ["model.ckpt"]


def test_only_plain_values_are_saved(
    tmp_path: Path, make_network: Callable[..., nn.Module]
) -> None:
    for value in (np.float64(1.0), Path("x"), {1, 2}, [torch.ones(1)]):
        with pytest.raises(ValueError, match=r"plain values only; metadata\['x'\]"):
            save_model(
                tmp_path / "m.ckpt",
                make_network(),  # type: ignore[arg-type]
                task="pathology",
                metadata={"x": value},
            )
    assert not list(tmp_path.iterdir())


def test_a_name_with_an_equals_sign_is_refused(
    tmp_path: Path, make_network: Callable[..., nn.Module]
) -> None:
    with pytest.raises(ValueError, match="must not hold '='"):
        save_model(tmp_path / "epoch=3.ckpt", make_network(), task="x", metadata={})  # type: ignore[arg-type]


def test_what_is_no_model_of_the_task_is_refused_with_the_remedy(
    tmp_path: Path, make_network: Callable[..., nn.Module]
) -> None:
    model = tmp_path / "model.ckpt"
    save_model(model, make_network(), task="pathology", metadata={})  # type: ignore[arg-type]
    text, cut, state, pickled = (
        tmp_path / name for name in ("a.txt", "cut", "last.ckpt", "p.ckpt")
    )
    text.write_text("hello")
    cut.write_bytes(model.read_bytes()[:-200])
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {}}, state)
    torch.save(make_network(), pickled)
    future = tmp_path / "future.ckpt"
    torch.save({"format": "gigasparse-model", "version": 99, "task": "pathology"}, future)

    for path, words in [
        (tmp_path / "absent.ckpt", "does not exist"),
        (tmp_path, f"is a folder: give a model file (there is {future}"),
        (text, "is not a model file, or it is damaged"),
        (cut, "is not a model file, or it is damaged"),
        (pickled, "is not a model file, or it is damaged"),
        (state, "state of an unfinished training"),
        (future, "format version 99, this installation reads 1"),
    ]:
        with pytest.raises(InputError) as caught:
            load_model(path, task="pathology")
        assert words in str(caught.value)


def test_a_model_of_another_task_names_the_right_command(
    tmp_path: Path, make_network: Callable[..., nn.Module]
) -> None:
    path = tmp_path / "model.ckpt"
    save_model(path, make_network(), task="pathology", metadata={})  # type: ignore[arg-type]

    with pytest.raises(InputError) as caught:
        load_model(path, task="genomics")

    assert "is a model of pathology, not of genomics" in str(caught.value)
    assert f"python -m pipelines.pathology predict ckpt={path}" in str(caught.value)
