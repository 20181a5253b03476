"""`evaluate`: scores of saved predictions, with intervals, differences and a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.pathology.baseline import BASELINES
from pipelines.pathology.cohort import UNITS
from pipelines.pathology.manifest import strip_ending
from pipelines.shared.assessment import Assessment, assess, require_same_rows
from pipelines.shared.errors import InputError
from pipelines.shared.evaluation import check_scores
from pipelines.shared.record import RunState, finish_run, open_run
from pipelines.shared.report import Words, summarise, write_report
from pipelines.shared.saved_predictions import MODEL, Parts, find_tables, read_parts
from pipelines.shared.splits import EXTERNAL
from pipelines.shared.tables import read_table

Models = dict[str, list[Parts]]
_FACTS = ("labels", "slides", "features", "splits", "unit", "seed")
_CHOICES = ("task", "encoder", "pattern", "model")


def evaluate(config: dict[str, Any]) -> int:
    """Score a run or a table and write metrics.json, summary.txt and report.html."""
    run, out = Path(config["run"]), Path(config["out"])
    check_scoring(config)
    models = read_models(run, config)
    reference = choose_reference(config["reference"], models)
    if config["against"]:
        other = Path(config["against"])
        name = f"{other.name}/{MODEL}" if other.is_dir() else other.stem
        found = read_models(other, config)
        models = {**models, name: found.get(MODEL) or next(iter(found.values()))}
        reference = name
    require_same_rows(models)
    attributes = read_attributes(config, config["labels"], models)
    if open_run(out, config) is RunState.FINISHED:
        print((out / "summary.txt").read_text(encoding="utf-8"))
        print(f"{out} holds this finished evaluation; give another out= to evaluate again")
        return 0
    found_all = assess(
        models,
        threshold=config["threshold"],
        reference=reference,
        attributes=attributes,
        developed=read_developed(run),
        resamples=config["resamples"],
        seed=config["seed"],
    )
    write_assessment(out, found_all, title=f"Evaluation of {run.name}", run=run, config=config)
    return 0


def check_scoring(config: Mapping[str, Any]) -> None:
    """Raise InputError for settings of `pathology_scoring` that mean nothing."""
    if config["score_by"] not in UNITS:
        raise InputError(f"score_by is {' or '.join(UNITS)}; got {config['score_by']!r}")
    check_scores(config, (MODEL, *BASELINES))


def choose_reference(name: str | None, models: Models) -> str | None:
    """Return the model that differences are taken to, if it is among the models."""
    if name is not None and name not in models and len(models) > 1:
        print(f"note: reference={name} is none of {', '.join(models)}: no differences")
    return name if name in models and len(models) > 1 else None


def read_models(run: Path, config: Mapping[str, Any]) -> Models:
    """Read the predictions of every model of a run, per patient or per slide."""
    return {
        name: [
            read_parts(
                path,
                group_column="patient_id",
                by_group=config["score_by"] == "patient",
                order=config["class_order"],
            )
            for path in paths
        ]
        for name, paths in find_tables(run).items()
    }


def read_attributes(
    config: Mapping[str, Any], labels: str | Path | None, models: Models
) -> dict[str, dict[str, str]]:
    """Value of each subgroup column for each tested row, by its id.

    Raises InputError for missing columns and rows, and for a patient of two values.
    """
    if not config["subgroups"]:
        return {}
    if labels is None:
        raise InputError("subgroups= needs labels=TABLE with these columns")
    path = Path(labels)
    table = read_table(path)
    missing = [name for name in config["subgroups"] if name not in table]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]!r} for subgroups=; it has "
            f"{', '.join(map(repr, table.columns))}"
        )
    slide, patient = (config["columns"][name] for name in ("slide_id", "patient_id"))
    keys = []
    if slide in table:
        keys.append(table[slide].map(strip_ending))
    if patient in table:
        keys.append(table[patient])
    found: dict[str, dict[str, str]] = {}
    for column in config["subgroups"]:
        values: dict[str, set[str]] = {}
        for ids in keys:
            for name, value in zip(ids, table[column], strict=True):
                values.setdefault(name, set()).add(value or "unknown")
        found[column] = _of_rows(path, column, values, models)
    return found


def read_developed(run: Path) -> list[frozenset[str]]:
    """Patients of each fold of a cross-validation, but for those of the external test."""
    tables = [read_table(path) for path in sorted(run.glob("splits_*.csv"))]
    return [frozenset(table.loc[table["split"] != EXTERNAL, "patient_id"]) for table in tables]


def write_assessment(
    out: Path,
    found: Assessment,
    *,
    title: str,
    run: Path,
    config: Mapping[str, Any],
    extra: Mapping[str, object] | None = None,
) -> None:
    """Print the summary and write it, the report, and metrics.json, which ends the run."""
    per_patient = config["score_by"] == "patient"
    words = Words("patients" if per_patient else "slides", "patients", _titles(run, found))
    notes = []
    if per_patient and _recorded(run).get("unit") == "patient":
        notes.append("A patient's slides are one sequence with one prediction.")
    elif per_patient:
        notes.append("A patient's prediction is the mean over the patient's slides.")
    facts = {"run": str(run), **_facts(run, config)}
    write_report(out / "report.html", found, title=title, words=words, facts=facts, notes=notes)
    summary = (
        f"{summarise(found, words)}\n\n"
        f"report   {out / 'report.html'}\n"
        f"metrics  {out / 'metrics.json'}\n"
    )
    (out / "summary.txt").write_text(summary, encoding="utf-8")
    headline = next(iter(found.scores.values()))
    finish_run(
        out,
        {
            "summary": {name: score.value for name, score in headline.items()},
            **found.plain(),
            **(extra or {}),
        },
    )
    print(f"\n{summary}")


def _of_rows(
    path: Path, column: str, values: Mapping[str, set[str]], models: Models
) -> dict[str, str]:
    """Value of each tested row; a row of several slides has theirs, if they agree."""
    found = {}
    for name in _tested(next(iter(models.values()))):
        held = values.get(name) or set().union(
            *(values.get(part, set()) for part in name.split(";"))
        )
        if not held:
            raise InputError(f"{path} has no row of {name!r}, which was tested; add it")
        if len(held) > 1:
            raise InputError(
                f"{path}: {name!r} has {column} {' and '.join(sorted(held))}; use score_by=slide"
            )
        found[name] = next(iter(held))
    return found


def _tested(folds: Sequence[Parts]) -> list[str]:
    return list(dict.fromkeys(name for parts in folds for name in parts["test"].ids))


def _titles(run: Path, found: Assessment) -> dict[str, str]:
    """Titles of the models; the run's own says of itself whether it pools or attends."""
    model = _recorded(run).get("model")
    kind = model.get("kind") if isinstance(model, dict) else None
    own = {} if model is None else {MODEL: BASELINES.get(kind, "sparse transformer")}
    return {name: own.get(name, BASELINES.get(name, name)) for name in found.scores}


def _facts(run: Path, config: Mapping[str, Any]) -> dict[str, str]:
    own = {**_recorded(run), **{key: config[key] for key in _FACTS if config.get(key)}}
    facts = {key: str(own[key]) for key in _FACTS if own.get(key) is not None}
    stored = own.get("features") and not own.get("slides")  # an encoder of their own
    for key in _CHOICES:
        value = own.get(key)
        if isinstance(value, Mapping) and not (key == "encoder" and stored):
            said = {name: item for name, item in value.items() if item not in (None, "", {}, [])}
            facts[key] = ", ".join(f"{name} {item}" for name, item in said.items())
    return facts


def _recorded(run: Path) -> dict[str, Any]:
    """Return the configuration that a run left behind, if it is there."""
    path = run / "config.yaml"
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content if isinstance(content, dict) else {}
