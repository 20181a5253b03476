"""`train`: from slides and labels to a model, scored beside its baselines."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.pathology.baseline import BASELINES
from pipelines.pathology.cohort import TRUTH, check_task, read_cohort
from pipelines.pathology.data import Augmentation
from pipelines.pathology.encoding import build_encoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.manifest import (
    given_mpp,
    is_table,
    list_slides,
    read_slide_labels,
)
from pipelines.pathology.model import architecture, build_network
from pipelines.pathology.slides import SlideFile
from pipelines.pathology.store import read_index, slide_folder
from pipelines.pathology.stored_features import FeatureSource, find_source, have_overviews
from pipelines.pathology.study import Study
from pipelines.pathology.surveys import survey_folder
from pipelines.pathology.synthetic import make_cohort
from pipelines.pathology.tiling import make_plan
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitSettings, require_device
from pipelines.shared.study import begin_run, check_baselines, check_network
from pipelines.shared.tables import Failure, write_failures


def train(config: dict[str, Any]) -> int:
    """Train and score; 0, or 3 if slides failed or labels and slides stayed without a partner."""
    check_baselines(config["baselines"], BASELINES)
    check_task(config)
    Augmentation(**config["augment"])
    if config["heatmaps"] < 0:
        raise InputError(f"heatmaps must not be negative; got {config['heatmaps']}")
    settings = FitSettings.from_config(config)
    require_device(settings)
    if config["features"] and config["labels"] and not config["slides"]:
        return _train_on_stored(config, settings)
    plan = make_plan(config)
    surveys = survey_folder(config["tiles"])
    encoder = build_encoder(**config["encoder"])
    _check_networks(config, encoder.dim)
    slides, labels = input_files(config)
    files, table = _read_inputs(config, slides, labels)
    out = Path(config["out"])
    if not begin_run(out, config):
        return 0
    store = Path(config["features"] or out / "features")
    files, failures = _match(files, table, labels)
    report = extract_features(
        files,
        store=store,
        plan=plan,
        encoder=encoder,
        mpps=_given_mpps(files, table, labels),
        workers=config["num_workers"] or None,
        progress=config["trainer"]["progress"],
        surveys=surveys,
    )
    failures += report.failures
    for failure in failures:
        print(f"note: {failure.id}: {failure.status}: {failure.reason}")
    if not report.done:
        write_failures(out / "failures.csv", failures, id_column="slide_id")
        raise InputError(f"no slide could be read; {out / 'failures.csv'} says why of each")
    rows = table[table["slide_id"].isin(report.done)]
    metadata = {
        "encoder": config["encoder"],
        "encoder_fingerprint": encoder.fingerprint,
        "plan": asdict(plan),
        "plan_hash": plan.hash,
    }
    tiles = f"of {plan.tile_px} px at {plan.mpp} um/px"
    source = FeatureSource(store, encoder.dim, tiles, metadata)
    return Study(config, settings, source, read_cohort(config, rows, labels), out).run(failures)


def _train_on_stored(config: dict[str, Any], settings: FitSettings) -> int:
    """Train on features that are there already, imported or embedded; no slide is opened."""
    store, labels, out = (Path(config[key]) for key in ("features", "labels", "out"))
    if config["encoder"]["name"] != "stats":  # the default, which experiments vary
        raise InputError(
            f"encoder={config['encoder']['name']} makes features of slides=, and features= without "
            "slides= are taken as they are; choose among them by stored_encoder=NAME"
        )
    table = read_slide_labels(labels, **_said(config), **_truth(config))
    ids = read_index(store)["slide_id"].unique()
    files, failures = _match([SlideFile(i, slide_folder(store, i)) for i in ids], table, labels)
    found = [file.slide_id for file in files]
    source = find_source(store, found, config["stored_encoder"])
    _check_networks(config, source.dim)
    if not begin_run(out, config):
        return 0
    for failure in failures:
        print(f"note: {failure.id}: {failure.status}: {failure.reason}")
    if not have_overviews(store, found):
        print("note: imported slides have no picture: no heatmaps, no baseline of slide colour")
        baselines = [name for name in config["baselines"] if name != "colour"]
        config = {**config, "baselines": baselines, "heatmaps": 0}
    rows = table[table["slide_id"].isin(found)]
    return Study(config, settings, source, read_cohort(config, rows, labels), out).run(failures)


def input_files(config: dict[str, Any]) -> tuple[Path, Path]:
    """Slides and labels that a configuration means; the built-in cohort is made where it is."""
    if config["slides"]:
        slides = Path(config["slides"])
        if not config["labels"] and not is_table(slides):
            raise InputError(
                "slides= needs labels=TABLE with the columns slide_id, label and, if known, "
                "patient_id"
            )
        return slides, Path(config["labels"] or slides)
    if config["labels"]:
        raise InputError(
            "labels= needs slides=FOLDER with the slides they name, or features=FOLDER with their "
            "stored features"
        )
    data = config["data"]
    folder = Path(config["data_root"]) / "pathology" / f"synthetic_{data['variant']}"
    names = ("variant", "num_pairs", "test_pairs", "val_pairs", "seed")
    make_cohort(
        folder,
        **{name: data[name] for name in names},
        progress=config["trainer"]["progress"],
    )
    return folder / "slides", folder / "labels.csv"


def _read_inputs(
    config: dict[str, Any], slides: Path, labels: Path
) -> tuple[list[SlideFile], pd.DataFrame]:
    """Slides and their labels; of two tables, `columns` and `where` speak of the labels."""
    said = _said(config)
    files = list_slides(slides, root=config["root"], **(said if slides == labels else {}))
    other = slides if is_table(slides) and slides != labels else None
    return files, read_slide_labels(labels, slides=other, **said, **_truth(config))


def _said(config: dict[str, Any]) -> dict[str, Any]:
    return {"columns": config["columns"], "where": config["where"]}


def _truth(config: dict[str, Any]) -> dict[str, Any]:
    """What is to be learned: classes, or numbers."""
    task = config["task"]["name"]
    return {"truth": TRUTH[task], "classes": task == "classification"}


def _check_networks(config: dict[str, Any], num_features: int) -> None:
    """Raise InputError for a model, or a baseline made of it, that cannot be built."""
    sizes = {"num_features": num_features, "num_classes": 2}
    for name in ("model", *config["baselines"]):
        if name != "colour":
            check_network(partial(build_network, architecture(config, name, **sizes)))


def _given_mpps(files: list[SlideFile], table: pd.DataFrame, labels: Path) -> dict[str, float]:
    """Micrometres per pixel by slide id, from the table of slides or that of labels."""
    given = {file.slide_id: file.mpp for file in files if file.mpp is not None}
    for row, record in zip(table.index, table.to_dict("records"), strict=True):
        mpp = given_mpp(labels, row, record)
        if mpp is not None:
            given.setdefault(record["slide_id"], mpp)
    return given


def _match(
    files: list[SlideFile], table: pd.DataFrame, labels: Path
) -> tuple[list[SlideFile], list[Failure]]:
    """Keep the slides that have a label; list slides and labels without a partner."""
    labelled, present = set(table["slide_id"]), {file.slide_id for file in files}
    matched = [file for file in files if file.slide_id in labelled]
    if not matched:
        raise InputError(
            f"{labels}: no slide has a label: slides are {_some(present)}, labels name "
            f"{_some(labelled)}; slide_id is the file's name without its ending"
        )
    add, remove = "add a row with its slide_id to the labels", "remove the row, or add the slide"
    failures = [
        Failure(file.slide_id, str(file.path), "no_label", "no row in the label table", add)
        for file in files
        if file.slide_id not in labelled
    ]
    failures += [
        Failure(slide_id, str(labels), "no_slide", f"row {row}: no such slide", remove)
        for row, slide_id in zip(table.index, table["slide_id"], strict=True)
        if slide_id not in present
    ]
    return matched, failures


def _some(names: set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return f"{shown}, ..." if len(names) > 3 else shown
