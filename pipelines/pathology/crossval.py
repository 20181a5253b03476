"""`crossval`: every fold trained and tested, its models compared on the same patients."""

from pathlib import Path
from typing import Any

from pipelines.pathology.cohort import TRUTH
from pipelines.pathology.evaluating import (
    check_scoring,
    choose_reference,
    read_attributes,
    read_developed,
    read_models,
    write_assessment,
)
from pipelines.pathology.manifest import is_table
from pipelines.pathology.splitting import (
    Roster,
    describe,
    format_folds,
    make_folds,
    read_roster,
    write_folds,
)
from pipelines.pathology.train import input_files, train
from pipelines.shared.assessment import assess
from pipelines.shared.errors import InputError
from pipelines.shared.folds import folds_to_come, gather_predictions, train_folds
from pipelines.shared.record import VOLATILE, RunState, is_main_process, open_run


def crossval(config: dict[str, Any]) -> int:
    """Train the folds that are not finished yet, gather them and write the report.

    0, 3 where slides failed in some fold. With `fold`, that one is trained, and the report is
    written when it was the last one missing.
    """
    out = Path(config["out"])
    labels = _labels(config)
    roster = read_roster(
        labels,
        slides=config["slides"] if config["slides"] and is_table(Path(config["slides"])) else None,
        columns=config["columns"],
        where=config["where"],
        stratify=config["stratify"] or _stratum(config),
    )
    folds = make_folds(roster, config)
    print(f"{describe(roster)}\n\n{format_folds(roster, folds)}")
    if config["fold"] is not None and config["fold"] not in range(len(folds)):
        raise InputError(f"fold={config['fold']}: there are folds 0 to {len(folds) - 1}")
    _check_scoring(config, labels, roster)
    if config["dry_run"]:
        print("dry run: nothing is written")
        return 0
    if open_run(out, config, volatile=(*VOLATILE, "fold")) is RunState.FINISHED:
        print((out / "summary.txt").read_text(encoding="utf-8"))
        print(f"{out} holds this finished cross-validation; give another out= to train again")
        return 0
    tables = write_folds(out, roster, folds)
    features = config["features"] or str(out / "features")  # shared by all folds
    jobs = [{"splits": str(table), "features": features} for table in tables]
    code = train_folds(config, out, jobs, train=train, verb="pathology_train")
    missing = folds_to_come(out, len(folds))
    if missing:
        print(f"\nfolds to come: {', '.join(missing)}; the last of them writes the report")
        return code
    if is_main_process():
        _assess(config, out, labels, len(folds))
    return code


def _check_scoring(config: dict[str, Any], labels: Path, roster: Roster) -> None:
    """Raise InputError, before anything is trained, for what could not be scored in the end."""
    check_scoring(config)
    table = roster.table
    missing = [name for name in config["subgroups"] if name not in table]
    if missing:
        raise InputError(
            f"{labels} has no column {missing[0]!r} for subgroups=; it has "
            f"{', '.join(map(repr, table.columns))}"
        )
    if config["score_by"] == "slide":
        return
    for column in (*TRUTH[config["task"]["name"]], *config["subgroups"]):
        kinds = table.groupby("patient_id")[column].nunique()
        if (kinds > 1).any():
            patient = kinds.index[kinds > 1][0]
            values = sorted(set(table.loc[table["patient_id"] == patient, column]))
            raise InputError(
                f"{labels}: slides of patient {patient!r} differ in {column} "
                f"({', '.join(values)}); give score_by=slide to score slides"
            )


def _labels(config: dict[str, Any]) -> Path:
    """Table of labels: the one given, the one of slides, or that of the built-in cohort."""
    if config["features"] and config["labels"] and not config["slides"]:
        return Path(config["labels"])
    return input_files(config)[1]


def _stratum(config: dict[str, Any]) -> str:
    return "event" if "survival" in config["task"]["name"] else "label"


def _assess(config: dict[str, Any], out: Path, labels: Path, num_folds: int) -> None:
    models = read_models(out, config)
    found = assess(
        models,
        threshold=config["threshold"],
        reference=choose_reference(config["reference"], models),
        attributes=read_attributes(config, labels, models),
        developed=read_developed(out),
        resamples=config["resamples"],
        seed=config["seed"],
    )
    gather_predictions(out)
    title = f"Cross-validation, {num_folds} folds by {config['scheme']}"
    if config["splits"]:
        title = f"Cross-validation, {num_folds} given folds"
    write_assessment(out, found, title=title, run=out, config={**config, "labels": str(labels)})
