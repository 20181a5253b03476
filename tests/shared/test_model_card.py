import json
from pathlib import Path

import yaml

from pipelines.shared.model_card import write_model_card
from pipelines.shared.record import open_run


def test_the_card_says_what_the_run_recorded(tmp_path: Path) -> None:
    config = {
        "verb": "some_train", "labels": "labels.csv", "splits": None, "epochs": 7, "seed": 3,
        "pattern": {"expression": "Dense()"},
        "model": {"dim": 64}, "optim": {"lr": 0.001},
    }  # fmt: skip
    open_run(tmp_path, config)
    undefined = {"value": None, "low": None, "high": None, "reason": "no example of class b"}
    score = {"value": 0.9, "low": 0.8, "high": 0.95, "reason": None}
    metrics = {
        "task": {"name": "classification", "threshold": 0.37},
        "classes": ["a", "b"],
        "test_rows": 1200,
        "failures": 2,
        "scores": {"model": {"auroc": score}, "abmil": {"auroc": undefined}},
        "scores_without_leaks": {"model": {"auroc": {**score, "value": 0.85}}},
    }
    (tmp_path / "model.ckpt").write_bytes(b"weights")

    tokens = {"encoder": {"name": "stats", "weights": None}, "plan_hash": "0a1b"}

    path = write_model_card(tmp_path, metrics, tokens=tokens)

    text = path.read_text()
    assert path == tmp_path / "model_card.md"
    for words in (
        "- task: classification", "- classes: a, b", "chosen on validation: 0.3700",
        "- labels: labels.csv", "- test rows: 1,200", "- encoder: name stats\n",
        "- pattern: expression Dense()", "- plan hash: 0a1b", "- epochs: 7",
        "| AUROC | 0.900 [0.800, 0.950] | - (no example of class b) |",
        "- Undefined: auroc of abmil: no example of class b", "One split", "2 items were left out",
        "_to be filled in", "stand in train or validation too", "| AUROC | 0.850 [0.800, 0.950] |",
    ):  # fmt: skip
        assert words in text
    assert "sha256 " in text
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert f"- torch {versions['packages']['torch']}" in text
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["epochs"] == 7
