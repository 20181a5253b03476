"""One run: the model, what it is compared with, and what is written of them."""

from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from pipelines.pathology.baseline import BASELINES, CLASSES_ONLY, fit_colour_baseline
from pipelines.pathology.cohort import (
    Case,
    Cohort,
    make_objective,
    require_no_copies,
    sample_weights,
)
from pipelines.pathology.data import Augmentation, SlideDataset
from pipelines.pathology.heatmap import caption, draw_attention
from pipelines.pathology.model import TASK, SlideClassifier, architecture, build_network
from pipelines.pathology.pooling import PoolingClassifier
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.pathology.stored_features import FeatureSource, read_contents
from pipelines.pathology.survival import CoxSurvival, DiscreteSurvival
from pipelines.shared.calibration import choose_threshold, fit_temperature
from pipelines.shared.checkpoint import save_model
from pipelines.shared.evaluation import score
from pipelines.shared.fit import FitReport, FitSettings
from pipelines.shared.inference import Prediction
from pipelines.shared.metrics import Score, format_table
from pipelines.shared.model_card import write_model_card
from pipelines.shared.network import FeatureStem
from pipelines.shared.objective import Classification, Objective, Outputs
from pipelines.shared.record import finish_run, is_main_process
from pipelines.shared.splits import SPLITS
from pipelines.shared.study import Contender, name_engines, train_contender
from pipelines.shared.tables import Failure, write_failures, write_table

SHOWN = ("auroc", "accuracy", "balanced_accuracy", "r2", "mae", "c_index")
"""Scores that a terminal has room for; `metrics.json` has all."""

MAX_STANDARDISED = 100_000
"""Training tiles that mean and spread of the features are taken from."""


@dataclass(frozen=True, slots=True)
class Result:
    """One contender: its objective as validation settled it, predictions and test scores."""

    objective: Objective
    outputs: dict[str, Outputs]
    scores: dict[str, Score]
    network: SlideClassifier | PoolingClassifier | None = None
    report: FitReport | None = None
    predictions: tuple[Prediction, ...] = ()
    engine_calls: Counter[str] | None = None


class Study:
    """Train the model and its baselines on one cohort's splits and write what comes of it."""

    def __init__(
        self,
        config: dict[str, Any],
        settings: FitSettings,
        source: FeatureSource,
        cohort: Cohort,
        out: Path,
    ) -> None:
        self.config, self.settings, self.out = config, settings, out
        self.source, self.store, self.cohort = source, source.store, cohort
        require_no_copies(cohort, read_contents(source.store))
        self.objective = make_objective(config, cohort)
        self.data = {name: self._dataset(name) for name in (*SPLITS[:1], *cohort.held_out)}
        self._standard: tuple[torch.Tensor, torch.Tensor] | None = None
        tiles = sum(sum(data.lengths) for data in self.data.values())
        print(cohort)
        print(f"{tiles:,} tiles {source.tiles}, {source.dim} features")

    def run(self, failures: list[Failure]) -> int:
        """Train everything, print the comparison, write the model and the run's record."""
        own, task = self.config["model"].get("kind"), self.config["task"]["name"]
        results = {"model": self._train("model")}
        for name in self.config["baselines"]:
            if name == own:
                print(f"note: baseline {name} is the model itself and left out")
            elif name in CLASSES_ONLY and task != "classification":
                print(f"note: baseline {name} knows classes only and is left out of task={task}")
            else:
                results[name] = self._colour() if name == "colour" else self._train(name)
        if is_main_process():
            self._write(results, failures)
        return 3 if failures else 0

    def _dataset(self, split: str, *, shuffled: bool = False) -> SlideDataset:
        cases = self.cohort.of(split)
        by_patient = self.cohort.unit == "patient"
        augment = Augmentation(**self.config["augment"])
        return SlideDataset(
            self.store,
            [case.slides for case in cases] if by_patient else [case.slides[0] for case in cases],
            [case.target for case in cases],
            [case.patient for case in cases],
            shuffle_positions=shuffled,
            augment=augment if split == "train" and augment != Augmentation() else None,
            seed=self.config["seed"],
            encoder=str(self.source.metadata["encoder_fingerprint"]),
        )

    def _train(self, name: str) -> Result:
        data = self.data
        if name == "shuffled":
            data = {split: self._dataset(split, shuffled=True) for split in data}
        survival = "survival" in self.config["task"]["name"]
        trained = train_contender(
            name,
            Contender(lambda: self._build(name), data["train"], data["val"], data["test"]),
            out=self.out,
            settings=self.settings,
            objective=self.objective,
            sample_weights=sample_weights(self.config, self.cohort),
            also={split: data[split].plain() for split in data if survival or split != "train"},
        )
        outputs = {split: _stack(found) for split, found in trained.predictions.items()}
        objective = self._settle(outputs)
        assert isinstance(trained.network, SlideClassifier | PoolingClassifier)
        return Result(
            objective,
            outputs,
            self._score(objective, outputs["test"]),
            trained.network,
            trained.report,
            tuple(trained.predictions["test"]),
            trained.engine_calls,
        )

    def _build(self, name: str) -> SlideClassifier | PoolingClassifier:
        sizes = {"num_features": self.source.dim, "num_classes": self.objective.num_outputs}
        network = build_network(architecture(self.config, name, **sizes))
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
        train = self.data["train"].plain()
        generator = np.random.default_rng(self.config["seed"])
        share = min(1.0, MAX_STANDARDISED / sum(train.lengths))
        kept = []
        for index in range(len(train)):
            features = train[index].inputs
            chosen = generator.random(len(features)) < share
            kept.append(features[torch.from_numpy(chosen)])
        return torch.cat(kept)

    def _settle(self, outputs: dict[str, Outputs]) -> Objective:
        """Choose what validation decides (a threshold) or training (groups, baseline hazard)."""
        if isinstance(self.objective, Classification):
            return _with_threshold(self.objective, outputs["val"], self._targets("val"))
        if isinstance(self.objective, DiscreteSurvival | CoxSurvival):
            return self.objective.settle(outputs["train"], self._targets("train"))
        return self.objective

    def _targets(self, split: str) -> list[Any]:
        return [case.target for case in self.cohort.of(split)]

    def _score(self, objective: Objective, outputs: Outputs) -> dict[str, Score]:
        cases = self.cohort.of("test")
        predictions = objective.predictions(outputs, [case.target for case in cases])
        return score(predictions, groups=[case.patient for case in cases])

    def _colour(self) -> Result:
        """Score the regression on slide colour; its probabilities stand for a network's."""
        slides = {
            split: [
                [read_slide(slide_folder(self.store, slide)) for slide in case.slides]
                for case in self.cohort.of(split)
            ]
            for split in self.data
        }
        num_classes = len(self.cohort.classes)
        outputs = {
            split: np.log(
                fit_colour_baseline(
                    slides["train"], self._targets("train"), slides[split], num_classes=num_classes
                ).clip(1e-12)
            )
            for split in self.cohort.held_out
        }
        objective = self._settle(outputs)
        return Result(objective, outputs, self._score(objective, outputs["test"]))

    def _write(self, results: dict[str, Result], failures: list[Failure]) -> None:
        model, checkpoint = results["model"], self.out / "model.ckpt"
        assert model.network is not None, "the model is a network"
        save_model(checkpoint, model.network, task=TASK, metadata=self._metadata(model))
        for name, result in results.items():
            table = self._table(result)
            write_table(self.out / "models" / name / "predictions.csv", table)
            if name == "model":
                write_table(self.out / "predictions.csv", table)
        write_failures(self.out / "failures.csv", failures, id_column="slide_id")
        scores = {name: result.scores for name, result in results.items()}
        summary = self._summary(scores, self._draw_heatmaps(model))
        (self.out / "summary.txt").write_text(summary, encoding="utf-8")
        metrics = self._metrics(results, failures)
        write_model_card(self.out, metrics, tokens=self.source.metadata)
        finish_run(self.out, metrics)
        print(f"\n{summary}")
        if failures:
            print(f"{len(failures):,} slides or labels left out: {self.out / 'failures.csv'}")

    def _metadata(self, model: Result) -> dict[str, Any]:
        """What `predict` needs beside the network."""
        temperature = 1.0
        if isinstance(model.objective, Classification):
            found = model.objective.predictions(model.outputs["val"], self._targets("val"))
            temperature = fit_temperature(found.targets, found.probabilities)
        return {
            "task": model.objective.plain(),
            "unit": self.cohort.unit,
            "temperature": temperature,
            **self.source.metadata,
        }

    def _table(self, result: Result) -> pd.DataFrame:
        """Return predictions of every held-out case."""
        parts = []
        for split in self.cohort.held_out:
            cases = self.cohort.of(split)
            known = pd.DataFrame(
                {
                    "slide_id": [case.id for case in cases],
                    "patient_id": [case.patient for case in cases],
                    "split": split,
                }
            )
            truth = result.objective.truth([case.target for case in cases])
            said = result.objective.read(result.outputs[split])
            parts.append(pd.concat([known, truth, said], axis=1))
        return pd.concat(parts, ignore_index=True)

    def _metrics(self, results: dict[str, Result], failures: list[Failure]) -> dict[str, object]:
        model = results["model"]
        assert model.report is not None, "the model is trained"
        calls = sum((result.engine_calls or Counter() for result in results.values()), Counter())
        reports = {name: result.report for name, result in results.items() if result.report}
        headline = {name: model.scores[name].value for name in SHOWN if name in model.scores}
        return {
            "task": _without_curve(model.objective.plain()),
            "classes": list(self.cohort.classes),
            "test_slides": len(self.cohort.of("test")),
            "failures": len(failures),
            "summary": {**headline, "seconds": round(model.report.seconds, 1)},
            **name_engines(calls),
            "scores": {
                name: {key: found.plain() for key, found in result.scores.items()}
                for name, result in results.items()
            },
            "training": {name: asdict(report) for name, report in reports.items()},
        }

    def _summary(self, scores: dict[str, dict[str, Score]], heatmaps: list[Path]) -> str:
        own = self.config["model"].get("kind")
        what = BASELINES[own] if own else self.config["pattern"]["expression"]
        titles = {"model": f"model ({what})"} | BASELINES
        text = format_table({titles[name]: row for name, row in scores.items()}, names=SHOWN)
        checkpoint = self.out / "model.ckpt"
        given = "features" if not self.config["slides"] and self.config["labels"] else "slides"
        return (
            f"{len(self.cohort.of('test')):,} test {self.cohort.unit}s, 95 % intervals over "
            f"patients\n{text}\n\n"
            f"model        {checkpoint}\n"
            f"predictions  {self.out / 'predictions.csv'}\n"
            f"metrics      {self.out / 'metrics.json'}\n"
            + "".join(f"heatmap      {path}\n" for path in heatmaps)
            + f"predict with  python -m pipelines.pathology predict {given}=FOLDER "
            f"ckpt={checkpoint} out=FOLDER\n"
        )

    def _draw_heatmaps(self, model: Result) -> list[Path]:
        paths = []
        cases = self.cohort.of("test")[: self.config["heatmaps"]]
        for row, case in enumerate(cases):
            paths += self._draw_case(case, model, row)
        return paths

    def _draw_case(self, case: Case, model: Result, row: int) -> list[Path]:
        """Draw the attention of one test case, a picture for each of its slides."""
        said = model.objective.read(model.outputs["test"][row : row + 1]).iloc[0].to_dict()
        known = model.objective.truth([case.target]).iloc[0].to_dict()
        slides = [read_slide(slide_folder(self.store, slide)) for slide in case.slides]
        attention = model.predictions[row].attention.numpy() * sum(map(len, slides))
        parts = np.split(attention, np.cumsum([len(slide) for slide in slides])[:-1])
        paths = []
        for slide, part in zip(slides, parts, strict=True):
            paths.append(self.out / "heatmaps" / f"{slide.slide_id}.png")
            draw_attention(paths[-1], slide, part, title=caption(slide.slide_id, said, known))
        return paths


def _without_curve(plain: dict[str, object]) -> dict[str, object]:
    """Leave out the baseline hazard, which has a number for each event; the checkpoint has it."""
    return {key: value for key, value in plain.items() if key not in ("times", "hazards")}


def _with_threshold(
    objective: Classification, outputs: Outputs, targets: list[Any]
) -> Classification:
    """Choose the threshold of two classes on validation."""
    if len(objective.classes) != 2:
        return objective
    found = objective.predictions(outputs, targets)
    threshold = choose_threshold(found.targets, found.probabilities[:, 1])
    return replace(objective, threshold=threshold)


def _stack(predictions: list[Prediction]) -> Outputs:
    return np.stack([prediction.logits.double().numpy() for prediction in predictions])
