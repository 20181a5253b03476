import json
from pathlib import Path

import pytest
import yaml

from pipelines.shared.errors import InputError
from pipelines.shared.record import RunState, finish_run, open_run, read_metrics

CONFIG = {
    "verb": "pathology_train",
    "out": "runs/a",
    "slides": "a${x} ü",
    "optim": {"lr": 0.001, "betas": [0.9, 0.98]},
    "trainer": {"devices": 1, "progress": True},
    "logger": {"name": "csv"},
}


def test_a_run_is_new_then_resumed_then_finished(tmp_path: Path) -> None:
    out = tmp_path / "TCGA (2)" / "[old]"

    assert open_run(out, CONFIG) is RunState.NEW
    assert open_run(out, CONFIG) is RunState.RESUMED
    finish_run(out, {"auroc": 0.9, "undefined": float("nan")})
    assert open_run(out, CONFIG) is RunState.FINISHED
    assert read_metrics(out) == {"auroc": 0.9, "undefined": None}
    assert yaml.safe_load((out / "config.yaml").read_text()) == CONFIG
    assert {file.name for file in out.iterdir()} == {"config.yaml", "versions.json", "metrics.json"}


def test_versions_name_packages_and_platform(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG)

    versions = json.loads((tmp_path / "versions.json").read_text())

    assert {"python", "packages", "git", "platform", "device"} == versions.keys()
    assert versions["packages"]["torch"]


def test_another_configuration_is_refused_with_each_differing_key(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG)
    other = CONFIG | {"optim": {"lr": 0.01, "betas": [0.9, 0.98]}, "extra": "new"}

    with pytest.raises(InputError) as caught:
        open_run(tmp_path, other)

    assert "optim.lr: 0.001 -> 0.01" in str(caught.value)
    assert 'extra: (absent) -> "new"' in str(caught.value)
    assert "betas" not in str(caught.value)
    assert "another out=" in str(caught.value)


def test_volatile_keys_may_differ(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG)
    other = CONFIG | {
        "out": "elsewhere",
        "logger": {"name": "wandb"},
        "trainer": {"devices": 1, "progress": False},
    }

    assert open_run(tmp_path, other) is RunState.RESUMED


def test_a_folder_of_another_verb_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path, CONFIG)

    with pytest.raises(InputError, match="a run of pathology_train, not of genomics_train"):
        open_run(tmp_path, CONFIG | {"verb": "genomics_train"})


def test_a_file_as_out_and_a_damaged_record_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.yaml").write_text("a: [")

    for out, words in [(file, "is a file"), (file / "below", "is a file"), (damaged, "damaged")]:
        with pytest.raises(InputError, match=words):
            open_run(out, CONFIG)
