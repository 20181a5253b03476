"""The card of a trained model, beside its checkpoint: data, task, network, scores, limits.

After Mitchell et al., Model cards for model reporting, FAT* 2019. What only people know (what the
model is meant for, whom it must not be used on) is asked for and left open, never made up.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.shared.asides import aside_of
from pipelines.shared.metrics import TITLES, Score, format_score

CARD = "model_card.md"
CHECKPOINT = "model.ckpt"
_DATA = ("slides", "sequences", "labels", "features", "splits", "where")
_TRAINING = ("epochs", "steps", "batch_size", "max_tokens", "seed", "augment")


def write_model_card(
    run: Path, metrics: Mapping[str, Any], *, tokens: Mapping[str, object]
) -> Path:
    """Write the card of a training run into its folder, aside and renamed.

    Taken from what the run is about to write as metrics.json, and from its config.yaml,
    versions.json and model.ckpt; of `metrics` task, classes, scores and counts are read. `tokens`
    says what the network's tokens are: how they were cut, and what encoded them.
    """
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    versions = yaml.safe_load((run / "versions.json").read_text(encoding="utf-8"))
    sections = {
        "What it is": _identity(run, config, metrics),
        "Data": _settings(config, _DATA) + _counts(metrics),
        "Tokens and network": _network(config, tokens),
        "Training": _settings(config, _TRAINING) + _nested(config, "optim"),
        "Scores": _scores(metrics),
        "Made with": _versions(versions),
        "Limits": _limits(config, metrics),
    }
    parts = [f"# Model card: {run.name}"]
    parts += [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines]
    path = run / CARD
    aside = aside_of(path)
    aside.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def _identity(run: Path, config: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    lines = [f"- task: {_name(metrics.get('task') or config.get('task'))}"]
    for key in ("classes", "labels", "tracks"):
        if metrics.get(key):
            lines.append(f"- {key}: {', '.join(map(str, metrics[key]))}")
    checkpoint = run / CHECKPOINT
    if checkpoint.is_file():
        digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        lines.append(f"- file: {CHECKPOINT}, sha256 {digest}")
    task = metrics.get("task")
    if isinstance(task, Mapping) and task.get("threshold") is not None:
        lines.append(f"- decision threshold, chosen on validation: {float(task['threshold']):.4f}")
    return [*lines, "- meant for: _to be filled in by whoever hands it on_"]


def _network(config: Mapping[str, Any], tokens: Mapping[str, object]) -> list[str]:
    known = {key.replace("_", " "): value for key, value in tokens.items()}
    known |= {key: config[key] for key in ("pattern", "model") if key in config}
    return [
        f"- {key}: {_flat(value) if isinstance(value, Mapping) else value}"
        for key, value in known.items()
    ]


def _scores(metrics: Mapping[str, Any]) -> list[str]:
    """Table of the model and its baselines, with intervals."""
    lines = _score_table(metrics, "scores", "Test rows of this run, 95 % intervals by bootstrap:")
    without = "Without the test rows that stand in train or validation too:"
    more = _score_table(metrics, "scores_without_leaks", without)
    return [*lines, "", *more] if more else lines


def _score_table(metrics: Mapping[str, Any], key: str, title: str) -> list[str]:
    scores: Mapping[str, Mapping[str, Mapping[str, Any]]] = metrics.get(key) or {}
    if not scores:
        return []
    names = list(dict.fromkeys(name for row in scores.values() for name in row))
    lines = [title, "", "| | " + " | ".join(scores) + " |", "|---|" + "---|" * len(scores)]
    for name in names:
        cells = [
            format_score(Score(**row[name])) if name in row else "-" for row in scores.values()
        ]
        lines.append(f"| {TITLES.get(name, name)} | " + " | ".join(cells) + " |")
    return lines


def _limits(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    lines = [
        "- Tested on data like that it was trained on; elsewhere its scores may be other ones.",
        "- Intervals speak of other test rows, not of another training.",
    ]
    if not config.get("splits"):
        lines.append("- One split: a cross-validation (`crossval`) says how much it hangs on it.")
    failures = metrics.get("failures")
    if failures:
        lines.append(f"- {failures:,} items were left out; failures.csv says why.")
    undefined = sorted(
        {
            f"{name} of {model}: {row['reason']}"
            for model, scores in (metrics.get("scores") or {}).items()
            for name, row in scores.items()
            if row.get("value") is None
        }
    )
    lines += [f"- Undefined: {text}" for text in undefined]
    return [*lines, "- Not a medical device; not tested for any clinical use."]


def _counts(metrics: Mapping[str, Any]) -> list[str]:
    return [
        f"- {key.replace('_', ' ')}: {value:,}"
        for key, value in metrics.items()
        if key.startswith(("test_", "train_", "val_")) and isinstance(value, int)
    ]


def _settings(config: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    lines = []
    for key in keys:
        value = config.get(key)
        if value in (None, {}, []):
            continue
        lines.append(f"- {key}: {_flat(value) if isinstance(value, Mapping) else value}")
    return lines


def _nested(config: Mapping[str, Any], key: str) -> list[str]:
    return [f"- {key}: {_flat(config[key])}"] if isinstance(config.get(key), Mapping) else []


def _versions(versions: Mapping[str, Any]) -> list[str]:
    packages = versions.get("packages") or {}
    lines = [f"- {name} {version}" for name, version in packages.items()]
    git = versions.get("git")
    if isinstance(git, Mapping):
        lines.append(f"- revision {git['revision']}{' with changes' if git.get('dirty') else ''}")
    return lines


def _name(task: object) -> str:
    return str(task.get("name")) if isinstance(task, Mapping) else str(task)


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value is not None)
