"""Training on a CUDA device: every attention call of a run is served by the Triton engine."""

import json
from pathlib import Path

import pytest
import torch

from pipelines.genomics.__main__ import VERBS as GENOMICS
from pipelines.pathology.__main__ import VERBS as PATHOLOGY
from pipelines.shared.cli import Verb, main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

RUNS: dict[str, tuple[str, dict[str, Verb], list[str]]] = {
    "slides": (
        "pathology",
        PATHOLOGY,
        [
            "train", "epochs=2", "logger=none", "num_workers=1",
            "data.num_pairs=9", "data.test_pairs=3", "data.val_pairs=2",
        ],
    ),
    "DNA": (
        "genomics",
        GENOMICS,
        [
            "train", "epochs=2", "logger=none",
            "data.num_train=24", "data.num_val=8", "data.num_test=12",
        ],
    ),
    "DNA, random blocks": (
        "genomics",
        GENOMICS,
        [
            "train", "epochs=1", "logger=none", "pattern=bigbird", "random_block=16",
            "data.num_train=24", "data.num_val=8", "data.num_test=12",
        ],
    ),
    "bags": ("pathology", PATHOLOGY, ["scale", "tiles=[500,1000]", "model=tiny"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_triton_serves_every_call(name: str, tmp_path: Path) -> None:
    pipeline, verbs, arguments = RUNS[name]
    out = tmp_path / "run"
    given = [*arguments, "trainer=gpu", "trainer.progress=false", f"out={out}"]
    if arguments[0] == "train":
        given.append(f"data_root={tmp_path / 'data'}")

    assert main(pipeline, verbs, given) == 0

    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["engine_calls"]) == {"triton"}
    assert metrics["engine"] == "triton"
    assert "bf16-mixed" in (out / "config.yaml").read_text()
