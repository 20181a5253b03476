"""`train`: from slides and labels to a model, scored beside its baselines."""

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipelines.pathology.baseline import fit_colour_baseline
from pipelines.pathology.data import SlideDataset
from pipelines.pathology.encoding import build_encoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.heatmap import render_heatmap
from pipelines.pathology.manifest import (
    given_mpp,
    is_table,
    list_slides,
    read_slide_labels,
)
from pipelines.pathology.model import SlideClassifier
from pipelines.pathology.slides import SlideFile
from pipelines.pathology.store import read_index, read_slide, slide_folder
from pipelines.pathology.stored_features import FeatureSource, find_source, have_overviews
from pipelines.pathology.synthetic import make_cohort
from pipelines.pathology.tiling import make_plan
from pipelines.shared.checkpoint import save_model
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitSettings, require_device
from pipelines.shared.inference import Prediction
from pipelines.shared.metrics import Score, format_table
from pipelines.shared.network import FeatureStem
from pipelines.shared.record import finish_run, is_main_process
from pipelines.shared.splits import assign_splits
from pipelines.shared.study import (
    Contender,
    Probabilities,
    Result,
    TestSet,
    architecture_of,
    begin_run,
    check_baselines,
    check_network,
    choose_class_weights,
    probability_table,
    run_contender,
    summarise,
)
from pipelines.shared.tables import Failure, write_failures, write_table

TASK = "pathology"
BASELINES = {
    "abmil": "attention pooling (ABMIL)",
    "no_attention": "same encoder, attention off",
    "shuffled": "same encoder, positions shuffled",
    "window": "same encoder, window alone",
    "colour": "slide colour, logistic regression",
}
MAX_STANDARDISED = 200_000
"""Training tiles that mean and spread of the features are taken from."""

_SPLITS = ("train", "val", "test")


def train(config: dict[str, Any]) -> int:
    """Train and score; 0, or 3 if slides failed or labels and slides stayed without a partner."""
    check_baselines(config["baselines"], BASELINES)
    settings = FitSettings.from_config(config)
    require_device(settings)
    if config["features"] and config["labels"] and not config["slides"]:
        return _train_on_stored(config, settings)
    plan = make_plan(config)
    encoder = build_encoder(**config["encoder"])
    architecture = architecture_of(config, num_classes=2)
    check_network(partial(SlideClassifier, num_features=encoder.dim, **architecture))
    slides, labels = _input_files(config)
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
    return _Study(config, settings, source, rows, out).run(failures)


def _train_on_stored(config: dict[str, Any], settings: FitSettings) -> int:
    """Train on features that are there already, imported or embedded; no slide is opened."""
    store, labels, out = (Path(config[key]) for key in ("features", "labels", "out"))
    table = read_slide_labels(labels, columns=config["columns"], where=config["where"])
    ids = read_index(store)["slide_id"]
    files, failures = _match([SlideFile(i, slide_folder(store, i)) for i in ids], table, labels)
    found = [file.slide_id for file in files]
    source = find_source(store, found)
    architecture = architecture_of(config, num_classes=2)
    check_network(partial(SlideClassifier, num_features=source.dim, **architecture))
    if not begin_run(out, config):
        return 0
    for failure in failures:
        print(f"note: {failure.id}: {failure.status}: {failure.reason}")
    if not have_overviews(store, found):
        print("note: imported slides have no picture: no heatmaps, no baseline of slide colour")
        baselines = [name for name in config["baselines"] if name != "colour"]
        config = {**config, "baselines": baselines, "heatmaps": 0}
    rows = table[table["slide_id"].isin(found)]
    return _Study(config, settings, source, rows, out).run(failures)


def _input_files(config: dict[str, Any]) -> tuple[Path, Path]:
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
    said = {"columns": config["columns"], "where": config["where"]}
    files = list_slides(slides, root=config["root"], **(said if slides == labels else {}))
    other = slides if is_table(slides) and slides != labels else None
    return files, read_slide_labels(labels, slides=other, **said)


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


class _Study:
    """One run: slides by split, the model, its baselines, and what is written of them."""

    def __init__(
        self,
        config: dict[str, Any],
        settings: FitSettings,
        source: FeatureSource,
        table: pd.DataFrame,
        out: Path,
    ) -> None:
        self.config, self.settings, self.out = config, settings, out
        self.source, self.store = source, source.store
        self.ids = table["slide_id"].tolist()
        self.patients = table["patient_id"].tolist()
        self.classes = sorted(table["label"].unique())
        self.targets = [self.classes.index(label) for label in table["label"]]
        splits = assign_splits(
            ids=self.ids,
            labels=table["label"].tolist(),
            groups=self.patients,
            given=table["split"].tolist() if "split" in table else None,
            val_fraction=config["val_fraction"],
            test_fraction=config["test_fraction"],
            seed=config["seed"],
        )
        self.rows = {name: np.flatnonzero(np.array(splits) == name).tolist() for name in _SPLITS}
        self.test = TestSet(
            self._of(self.ids, "test"),
            self._of(self.targets, "test"),
            self._of(self.patients, "test"),
        )
        self.data = {name: self._dataset(name) for name in _SPLITS}
        self._standard: tuple[torch.Tensor, torch.Tensor] | None = None
        counts = ", ".join(f"{name} {len(self.rows[name]):,}" for name in _SPLITS)
        tiles = sum(sum(data.lengths) for data in self.data.values())
        print(f"{len(self.classes)} classes ({', '.join(self.classes)}); slides: {counts}")
        print(f"{tiles:,} tiles {source.tiles}, {source.dim} features")

    def run(self, failures: list[Failure]) -> int:
        """Train everything, print the comparison, write the model and the run's record."""
        model = self._train("model")
        results, scores = {"model": model}, {"model": model.scores}
        for name in self.config["baselines"]:
            if name == "colour":
                scores[name] = self._colour_scores()
                continue
            results[name] = self._train(name)
            scores[name] = results[name].scores
        if is_main_process():
            self._write(results, scores, failures)
        return 3 if failures else 0

    def _of(self, values: list[Any], split: str) -> list[Any]:
        return [values[row] for row in self.rows[split]]

    def _dataset(self, split: str, *, shuffle_positions: bool = False) -> SlideDataset:
        return SlideDataset(
            self.store,
            self._of(self.ids, split),
            self._of(self.targets, split),
            self._of(self.patients, split),
            shuffle_positions=shuffle_positions,
            seed=self.config["seed"],
        )

    def _train(self, name: str) -> Result:
        data = self.data
        if name == "shuffled":
            data = {split: self._dataset(split, shuffle_positions=True) for split in _SPLITS}
        contender = Contender(lambda: self._build(name), data["train"], data["val"], data["test"])
        return run_contender(
            name,
            contender,
            out=self.out,
            settings=self.settings,
            test=self.test,
            class_weights=choose_class_weights(
                self.config["task"]["class_weights"],
                self._of(self.targets, "train"),
                len(self.classes),
            ),
            collect=_in_order,
        )

    def _build(self, name: str) -> SlideClassifier:
        architecture = architecture_of(self.config, num_classes=len(self.classes))
        architecture["checkpointing"] = self.config["checkpointing"]
        if name == "abmil":
            architecture |= {"depth": 0, "pattern": None}
        elif name == "no_attention":
            architecture["pattern"] = None
        elif name == "window":
            architecture["pattern"] = f"SlidingWindow(radius={self.config['window']})"
        network = SlideClassifier(num_features=self.source.dim, **architecture)
        self._standardise(network.stem)
        return network

    def _standardise(self, stem: FeatureStem) -> None:
        """Give the stem mean and spread of training tiles, which are read once for all networks."""
        if self._standard is None:
            stem.standardise(self._sample_features())
            self._standard = stem.mean.clone(), stem.spread.clone()
        mean, spread = self._standard
        stem.mean.copy_(mean)
        stem.spread.copy_(spread)

    def _sample_features(self) -> torch.Tensor:
        train = self.data["train"]
        generator = np.random.default_rng(self.config["seed"])
        share = min(1.0, MAX_STANDARDISED / sum(train.lengths))
        kept = []
        for index in range(len(train)):
            features = train[index].inputs
            chosen = generator.random(len(features)) < share
            kept.append(features[torch.from_numpy(chosen)])
        return torch.cat(kept)

    def _colour_scores(self) -> dict[str, Score]:
        train, test = (
            [
                read_slide(slide_folder(self.store, slide_id))
                for slide_id in self._of(self.ids, name)
            ]
            for name in ("train", "test")
        )
        targets = self._of(self.targets, "train")
        found = fit_colour_baseline(train, targets, test, num_classes=len(self.classes))
        return self.test.score(found)

    def _write(
        self,
        results: dict[str, Result],
        scores: dict[str, dict[str, Score]],
        failures: list[Failure],
    ) -> None:
        model, checkpoint = results["model"], self.out / "model.ckpt"
        assert isinstance(model.network, SlideClassifier)
        metadata = {"classes": self.classes, **self.source.metadata}
        save_model(checkpoint, model.network, task=TASK, metadata=metadata)
        predictions = probability_table(
            self.test.ids, model.probabilities, self.classes, id_column="slide_id"
        )
        predictions.insert(1, "patient_id", self.test.groups)
        predictions.insert(2, "label", [self.classes[target] for target in self.test.targets])
        write_table(self.out / "predictions.csv", predictions)
        write_failures(self.out / "failures.csv", failures, id_column="slide_id")
        heatmaps = self._draw_heatmaps(model)
        titles = {"model": f"model ({self.config['pattern']['expression']})"} | BASELINES
        text = format_table({titles[name]: row for name, row in scores.items()})
        summary = (
            f"{len(self.test.ids):,} test slides, 95 % intervals over patients\n{text}\n\n"
            f"model        {checkpoint}\n"
            f"predictions  {self.out / 'predictions.csv'}\n"
            f"metrics      {self.out / 'metrics.json'}\n"
            + "".join(f"heatmap      {path}\n" for path in heatmaps)
            + f"predict with  python -m pipelines.pathology predict {self._input()}=FOLDER "
            f"ckpt={checkpoint} out=FOLDER\n"
        )
        (self.out / "summary.txt").write_text(summary, encoding="utf-8")
        known = {"classes": self.classes, "test_slides": len(self.test.ids)}
        finish_run(self.out, {**known, "failures": len(failures), **summarise(scores, results)})
        print(f"\n{summary}")
        if failures:
            print(f"{len(failures):,} slides or labels left out: {self.out / 'failures.csv'}")

    def _input(self) -> str:
        stored = not self.config["slides"] and self.config["labels"]
        return "features" if stored else "slides"

    def _draw_heatmaps(self, model: Result) -> list[Path]:
        paths = []
        for row, prediction in enumerate(model.predictions[: self.config["heatmaps"]]):
            path = self.out / "heatmaps" / f"{prediction.id}.png"
            label = self.classes[self.test.targets[row]]
            draw_heatmap(path, self.store, prediction, self.classes, label=label)
            paths.append(path)
        return paths


def draw_heatmap(
    path: Path,
    store: Path,
    prediction: Prediction,
    classes: list[str],
    *,
    label: str | None = None,
) -> None:
    """Draw how much each tile counted in the slide's pooling, relative to an even share."""
    best = int(prediction.probabilities.argmax())
    title = f"{prediction.id}: {classes[best]} ({float(prediction.probabilities[best]):.3f})"
    if label is not None:
        title += f", label {label}"
    path.parent.mkdir(parents=True, exist_ok=True)
    slide = read_slide(slide_folder(store, prediction.id))
    weights = prediction.attention.numpy() * len(slide)
    render_heatmap(path, slide, weights, title=title, unit="attention / even share")


def _in_order(predictions: Iterable[Prediction]) -> Probabilities:
    return np.stack([p.logits.double().softmax(-1).numpy() for p in predictions])
