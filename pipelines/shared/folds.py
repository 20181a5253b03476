"""What `crossval` of each pipeline does: folds trained one by one, predictions in one table."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.shared.conf_tree import read_root
from pipelines.shared.saved_predictions import TABLE, find_tables
from pipelines.shared.tables import read_table, write_table

Train = Callable[[dict[str, Any]], int]


def train_folds(
    config: dict[str, Any],
    out: Path,
    jobs: Sequence[Mapping[str, Any]],
    *,
    train: Train,
    verb: str,
) -> int:
    """Run `train` in the folder of each job, or of the one that `fold` names; the largest code.

    `verb` names the root configuration of `train`: a fold takes the settings that both verbs know,
    and over them its job's.
    """
    own = {item.key for item in read_root(str(config["verb"])).settings} - {
        item.key for item in read_root(verb).settings
    }
    shared = {key: value for key, value in config.items() if key not in own}
    chosen = range(len(jobs)) if config["fold"] is None else [config["fold"]]
    codes = []
    for number in chosen:
        folder, job = _folder(out, number), jobs[number]
        seed = f", seed {job['seed']}" if "seed" in job else ""
        print(f"\n[fold {number} of 0 to {len(jobs) - 1}{seed}] {folder}", flush=True)
        if _is_finished(folder):
            print("finished before")
        codes.append(train({**shared, "verb": verb, "out": str(folder), **job}))
    return max(codes)


def folds_to_come(out: Path, num_jobs: int) -> list[str]:
    """Name the jobs that have no results yet."""
    return [str(job) for job in range(num_jobs) if not _is_finished(_folder(out, job))]


def gather_predictions(out: Path) -> None:
    """Write all folds' predictions of all models into one table."""
    parts = []
    for model, paths in find_tables(out).items():
        for number, path in enumerate(paths):
            table = read_table(path)
            table.insert(0, "fold", str(number))
            table.insert(0, "model", model)
            parts.append(table)
    write_table(out / f"all_{TABLE}", pd.concat(parts, ignore_index=True))


def _folder(out: Path, number: int) -> Path:
    return out / f"fold_{number}"


def _is_finished(folder: Path) -> bool:
    return (folder / "metrics.json").exists()
