"""`evaluate`: scores of saved predictions, as published and without what leaks, with a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from pipelines.genomics.leaks import FEW
from pipelines.genomics.study import BASELINES, LEAKS, leaking_ids, title_baselines
from pipelines.shared.assessment import Assessment, assess, require_same_rows
from pipelines.shared.errors import InputError
from pipelines.shared.evaluation import check_scores
from pipelines.shared.record import RunState, finish_run, open_run
from pipelines.shared.report import Words, summarise, write_report
from pipelines.shared.saved_predictions import MODEL, Parts, find_tables, read_parts
from pipelines.shared.tables import read_table

Models = dict[str, list[Parts]]
CONTIG = "contig"
_FACTS = ("sequences", "intervals", "labels", "splits", "scheme", "by", "rc", "context", "seeds")
_CHOICES = ("pattern", "model", "tokenizer", "task")


def evaluate(config: dict[str, Any]) -> int:
    """Score a run or a table and write metrics.json, summary.txt and report.html."""
    run, out = Path(config["run"]), Path(config["out"])
    check_scoring(config)
    models, reference = read_models(run), config["reference"]
    if config["against"]:
        other = Path(config["against"])
        reference = f"{other.name}/{MODEL}" if other.is_dir() else other.stem
        found = read_models(other)
        models = {**models, reference: found.get(MODEL) or next(iter(found.values()))}
    require_same_rows(models)
    leaking = read_leaks(run, config["leaks"], len(next(iter(models.values()))))
    attributes = read_attributes(run, config, models)
    if open_run(out, config) is RunState.FINISHED:
        print((out / "summary.txt").read_text(encoding="utf-8"))
        print(f"{out} holds this finished evaluation; give another out= to evaluate again")
        return 0
    report(
        out,
        models,
        {**config, "reference": reference},
        title=f"Evaluation of {run.name}",
        run=run,
        leaking=leaking,
        attributes=attributes,
    )
    return 0


def check_scoring(config: Mapping[str, Any]) -> None:
    """Raise InputError for settings of `genomics_scoring` that mean nothing."""
    check_scores(config, (MODEL, *BASELINES))
    if config["subgroups"]:
        _read_subgroups(config)


def read_models(run: Path) -> Models:
    """Read the predictions of every model of a run; rows of a group stand or fall together."""
    return {
        name: [read_parts(path, group_column="group") for path in paths]
        for name, paths in find_tables(run).items()
    }


def read_leaks(run: Path, given: str | None, num_folds: int) -> list[set[str]] | None:
    """Ids of the leaking test items of each fold; None where no report of them is there.

    Raises InputError for a table that is none.
    """
    folders = [run / f"fold_{number}" for number in range(num_folds)]
    places = [Path(given)] * num_folds if given else [
        folder / LEAKS for folder in (folders if folders[0].is_dir() else [run])
    ]  # fmt: skip
    if not given and not all(place.is_file() for place in places):
        return None
    found = []
    for place, item_of in zip(places, _items(run, num_folds), strict=True):
        table = _read_leaks(place)
        missing = [name for name in ("id", "split", "leaks") if name not in table]
        if missing:
            raise InputError(
                f"{place} has no column {missing[0]!r}; leaks= takes the leaks.csv that inspect, "
                "train and crossval write"
            )
        leaking = leaking_ids(table)
        found.append(leaking | {name for name, item in item_of.items() if item in leaking})
    return found


def _items(run: Path, num_folds: int) -> list[dict[str, str]]:
    """The item that each row of each fold is a stretch of; rows of items themselves are none."""
    tables = [read_table(path) for path in next(iter(find_tables(run).values()))]
    assert len(tables) == num_folds, "a table is a fold"
    return [
        dict(zip(table.iloc[:, 0], table["item"], strict=True)) if "item" in table else {}
        for table in tables
    ]


def read_attributes(
    run: Path, config: Mapping[str, Any], models: Models
) -> dict[str, dict[str, str]]:
    """Value of each subgroup column for each tested item, by its id; contigs where known.

    Raises InputError for missing columns and rows.
    """
    tested = {name for parts in next(iter(models.values())) for name in parts["test"].ids}
    found: dict[str, dict[str, str]] = {}
    tables = [read_table(path) for path in next(iter(find_tables(run).values()))]
    if all(CONTIG in table for table in tables):
        joint = pd.concat(tables)
        found[CONTIG] = dict(zip(joint.iloc[:, 0], joint[CONTIG], strict=True))
    if not config["subgroups"]:
        return found
    table = _read_subgroups(config)
    items = {name: item for item_of in _items(run, len(tables)) for name, item in item_of.items()}
    missing = sorted({items.get(name, name) for name in tested} - set(table.index))
    if missing:
        path = config["labels"]
        raise InputError(f"{path} has no row of {missing[0]!r}, which was tested; add it")
    if items:
        table = table.loc[[items[name] for name in sorted(tested)]].set_axis(sorted(tested))
    return found | {
        column: table[column].replace("", "unknown").to_dict() for column in config["subgroups"]
    }


def _read_subgroups(config: Mapping[str, Any]) -> pd.DataFrame:
    """Read the table with the columns of `subgroups`, a row for each id."""
    if config["labels"] is None:
        raise InputError("subgroups= needs labels=TABLE with these columns")
    path, key = Path(config["labels"]), config["columns"]["id"]
    table = read_table(path)
    for column in (key, *config["subgroups"]):
        if column not in table:
            raise InputError(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, table.columns))}"
            )
    return table.drop_duplicates(key).set_index(key)


def report(
    out: Path,
    models: Models,
    config: Mapping[str, Any],
    *,
    title: str,
    run: Path,
    leaking: Sequence[set[str]] | None,
    attributes: Mapping[str, Mapping[str, str]],
    extra: Mapping[str, object] | None = None,
) -> None:
    """Score the models; print and write the summary, the page, and metrics.json, which ends it."""
    reference = config["reference"] if config["reference"] in models and len(models) > 1 else None
    if config["reference"] and not reference and len(models) > 1:
        print(f"note: {config['reference']} is not among the models: no differences are taken")
    settings: dict[str, Any] = {
        "threshold": config["threshold"],
        "reference": reference,
        "resamples": config["resamples"],
        "seed": config["seed"],
    }
    found = assess(models, attributes=attributes, **settings)
    rows = "stretches" if found.task == "tracks" else "records"
    clean, said = _without_leaks(models, leaking, {**settings, "attributes": attributes}, rows)
    groups = rows if found.task == "tracks" else "groups of records"
    words = Words(rows, groups, _titles(run, found))
    write_report(
        out / "report.html",
        found,
        title=title,
        words=words,
        facts={"run": str(run), **_facts(run)},
        notes=[said],
        beside={} if clean is None else {f"without leaking test {rows}": clean},
    )
    parts = [summarise(found, words), said]
    if clean is not None:
        parts.append(summarise(clean, words))
    parts.append(f"report   {out / 'report.html'}\nmetrics  {out / 'metrics.json'}")
    summary = "\n\n".join(parts) + "\n"
    (out / "summary.txt").write_text(summary, encoding="utf-8")
    headline = next(iter(found.scores.values()))
    finish_run(
        out,
        {
            "summary": {name: score.value for name, score in headline.items()},
            **found.plain(),
            "without_leaks": None if clean is None else clean.plain(),
            **(extra or {}),
        },
    )
    print(f"\n{summary}")


def _read_leaks(path: Path) -> pd.DataFrame:
    """Read a report of leaks, which may name nothing."""
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a table of leaks: {error}") from error


def _without_leaks(
    models: Models, leaking: Sequence[set[str]] | None, settings: Mapping[str, Any], rows: str
) -> tuple[Assessment | None, str]:
    """Score the test records that leak nowhere, and say how many these are."""
    if leaking is None:
        return None, "No leak report is there: train with leaks=true, or give leaks=TABLE."
    tests = [parts["test"] for parts in next(iter(models.values()))]
    ids = {name for fold in tests for name in fold.ids}
    kept = {name for fold, out in zip(tests, leaking, strict=True) for name in set(fold.ids) - out}
    said = (
        f"{len(ids) - len(kept):,} of {len(ids):,} test {rows} stand in train or validation too: "
        f"copies, the other strand, an overlap, or shared 50-mers ({LEAKS})."
    )
    if len(kept) < FEW:
        return None, f"{said} {len(kept):,} remain: fewer than {FEW}, too few to score by."
    if len(kept) == len(ids):
        return None, said
    without = {
        name: [_drop(parts, out) for parts, out in zip(folds, leaking, strict=True)]
        for name, folds in models.items()
    }
    return assess(without, **settings), f"{said} Without them, {len(kept):,} remain."


def _drop(parts: Parts, names: set[str]) -> Parts:
    test = parts["test"]
    rows = np.array([row for row, name in enumerate(test.ids) if name not in names], dtype=np.int64)
    return {**parts, "test": test.take(rows)}


def _titles(run: Path, found: Assessment) -> dict[str, str]:
    recorded = _recorded(run)
    known, task = recorded.get("pattern"), recorded.get("task")
    titles = title_baselines(str(task["name"]) if isinstance(task, Mapping) else "classification")
    own = {MODEL: f"model ({known['expression']})"} if isinstance(known, Mapping) else {}
    return {name: own.get(name, titles.get(name, name)) for name in found.scores}


def _facts(run: Path) -> dict[str, str]:
    own = _recorded(run)
    facts = {key: str(own[key]) for key in _FACTS if own.get(key) not in (None, "", [], {})}
    for key in _CHOICES:
        value = own.get(key)
        if isinstance(value, Mapping):
            said = {name: item for name, item in value.items() if item not in (None, "", {}, [])}
            facts[key] = ", ".join(f"{name} {item}" for name, item in said.items())
    return facts


def _recorded(run: Path) -> dict[str, Any]:
    """Return the configuration that a run left behind, if it is there."""
    path = run / "config.yaml"
    content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
