"""Small tables of predictions, as training writes them."""

from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.shared.saved_predictions import table_of_track
from pipelines.shared.stretches import sum_up


def write_classes(
    path: Path,
    *,
    seed: int = 0,
    start: int = 0,
    classes: tuple[str, ...] = ("a", "b"),
    strength: float = 2.0,
    external: int = 0,
) -> Path:
    """10 validation rows of 5 groups, 20 test rows of 10, and maybe external ones."""
    names = [f"s{start + row}" for row in range(30)] + [f"x{row}" for row in range(external)]
    groups = [f"p{(start + row) // 2}" for row in range(30)]
    groups += [f"q{row // 2}" for row in range(external)]
    labels = np.array([int(name[1:]) // 2 % len(classes) for name in names])
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(len(names), len(classes)))
    logits += strength * np.eye(len(classes))[labels]
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    table = pd.DataFrame({"slide_id": names, "patient_id": groups})
    table["split"] = ["val"] * 10 + ["test"] * 20 + ["external"] * external
    table["label"] = [classes[label] for label in labels]
    table["prediction"] = [classes[label] for label in shares.argmax(axis=1)]
    for column, name in enumerate(classes):
        table[f"probability_{name}"] = shares[:, column].round(6)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path


def write_risks(path: Path, *, seed: int = 0, grouped: bool = True) -> Path:
    """40 test rows of a known hazard; a high risk dies early."""
    generator = np.random.default_rng(seed)
    risks = generator.normal(size=40)
    table = pd.DataFrame({"slide_id": [f"s{row}" for row in range(40)], "split": "test"})
    table["time"] = generator.exponential(np.exp(-2 * risks)) + 0.01
    table["event"] = (generator.random(40) < 0.7).astype(int)
    table["risk"] = risks
    if grouped:
        table["group"] = np.where(risks > 0, "high", "low")
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path


def write_values(path: Path, *, seed: int = 0) -> Path:
    """30 test rows of numbers."""
    generator = np.random.default_rng(seed)
    targets = generator.normal(size=30)
    table = pd.DataFrame({"id": [f"r{row}" for row in range(30)], "target": targets})
    table["prediction"] = targets + generator.normal(scale=0.3, size=30)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path


def write_labels(path: Path, *, seed: int = 0) -> Path:
    """40 validation and 40 test rows with two labels each, `rare` on a fifth of them."""
    generator = np.random.default_rng(seed)
    table = pd.DataFrame({"id": [f"r{row}" for row in range(80)]})
    table["split"] = ["val"] * 40 + ["test"] * 40
    for name, rate in (("common", 0.5), ("rare", 0.2)):
        there = (np.arange(80) % 10 < 10 * rate).astype(int)
        table[f"label_{name}"] = there
        share = 0.4 * rate + 0.5 * there + generator.normal(scale=0.1, size=80)
        table[f"probability_{name}"] = share.clip(0, 1).round(6)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path


def write_tracks(path: Path, *, seed: int = 0) -> Path:
    """20 test stretches of 50 places of two tracks."""
    generator = np.random.default_rng(seed)
    table = pd.DataFrame({"id": [f"chr1:{row}" for row in range(20)], "split": "test"})
    for name, noise in (("one.plus", 0.5), ("two", 2.0)):
        targets = [generator.normal(size=50) for _ in range(20)]
        said = [target + generator.normal(scale=noise, size=50) for target in targets]
        table = table.join(table_of_track(name, sum_up(targets, said)))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path
