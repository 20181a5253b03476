"""One run of `train`: the model and its baselines, trained, scored, and written."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.genomics.baseline import fit_kmer_baseline
from pipelines.genomics.collection import Collection
from pipelines.genomics.data import WindowDataset, average_windows
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.tokenizers import Tokenizer, digest
from pipelines.shared.checkpoint import save_model
from pipelines.shared.fit import FitSettings
from pipelines.shared.inference import Prediction
from pipelines.shared.metrics import Score, format_table
from pipelines.shared.record import finish_run, is_main_process
from pipelines.shared.splits import SPLITS
from pipelines.shared.study import (
    Contender,
    Probabilities,
    Result,
    TestSet,
    choose_class_weights,
    probability_table,
    run_contender,
    summarise,
)
from pipelines.shared.tables import write_failures, write_table

TASK = "genomics"
BASELINES = {
    "kmer": "4-mer logistic regression",
    "window": "window alone",
    "shuffled": "shuffled positions",
}


class Study:
    """The items of a run by split, what is trained on them, and what is written of it."""

    def __init__(
        self,
        config: dict[str, Any],
        settings: FitSettings,
        collection: Collection,
        tokenizer: Tokenizer,
        architecture: dict[str, Any],
        out: Path,
    ) -> None:
        self.config, self.settings, self.out = config, settings, out
        self.collection, self.store = collection, collection.sequences
        self.tokenizer, self.architecture = tokenizer, architecture
        table, records = collection.table, collection.records
        self.classes = sorted(table["label"].unique())
        self.records = records
        self.targets = np.array([self.classes.index(label) for label in table["label"]])
        self.rows = {name: np.flatnonzero(table["split"] == name) for name in SPLITS}
        test = self.rows["test"]
        self.test = TestSet(
            table["id"].iloc[test].tolist(),
            self.targets[test].tolist(),
            table["group"].iloc[test].tolist(),
        )

    def run(self) -> int:
        """Train everything, print the comparison, write the model and the run's record."""
        model = self._train("model", self.architecture)
        results, scores = {"model": model}, {"model": model.scores}
        for name in self.config["baselines"]:
            if name == "kmer":
                scores[name] = self._kmer_scores()
                continue
            results[name] = self._train_baseline(name)
            scores[name] = results[name].scores
        if is_main_process():
            self._write(results, scores)
        return 3 if self.collection.failures else 0

    def _train_baseline(self, name: str) -> Result:
        if name == "window":
            alone = f"SlidingWindow(radius={self.config['window']})"
            return self._train(name, {**self.architecture, "pattern": alone})
        return self._train(name, self.architecture, shuffle_positions=True)

    def _train(
        self, name: str, architecture: dict[str, Any], *, shuffle_positions: bool = False
    ) -> Result:
        def windows(split: str, *, augment: bool = False) -> WindowDataset:
            rows = self.rows[split]
            return WindowDataset(
                self.store,
                self.records[rows],
                self.targets[rows],
                context=self.config["context"],
                overlap=self.config["window_overlap"],
                reverse_complement=augment and self.config["reverse_complement"],
                shuffle_positions=shuffle_positions,
                tokenizer=self.tokenizer,
                seed=self.config["seed"],
            )

        contender = Contender(
            lambda: DnaClassifier(**architecture),
            windows("train", augment=True),
            windows("val"),
            windows("test"),
        )
        return run_contender(
            name,
            contender,
            out=self.out,
            settings=self.settings,
            test=self.test,
            class_weights=choose_class_weights(
                self.config["task"]["class_weights"],
                self.targets[self.rows["train"]].tolist(),
                len(self.classes),
            ),
            collect=self._by_record,
        )

    def _by_record(self, predictions: Iterable[Prediction]) -> Probabilities:
        """Average the logits of each record's windows; one row per test record, in its order."""
        records, probabilities = record_probabilities(predictions)
        row_of = {record: row for row, record in enumerate(records)}
        order = [row_of[int(record)] for record in self.records[self.rows["test"]]]
        return probabilities[order]

    def _kmer_scores(self) -> dict[str, Score]:
        def sequences(split: str) -> Iterable[Any]:
            return (self.store.read(int(record)) for record in self.records[self.rows[split]])

        known = self.targets[self.rows["train"]]
        fitted = fit_kmer_baseline(
            sequences("train"),
            known,
            sequences("test"),
            both_strands=self.config["reverse_complement"],
        )
        probabilities = np.zeros((len(self.test.ids), len(self.classes)))
        probabilities[:, fitted.classes] = fitted.probabilities
        return self.test.score(probabilities)

    def _write(self, results: dict[str, Result], scores: dict[str, dict[str, Score]]) -> None:
        model = results["model"]
        checkpoint = self.out / "model.ckpt"
        metadata = {
            "classes": self.classes,
            "context": self.config["context"],
            "overlap": self.config["window_overlap"],
            "tokenizer": self.tokenizer.config,
            "tokenizer_digest": digest(self.tokenizer),
            "data": self.store.fingerprint,
        }
        assert isinstance(model.network, DnaClassifier)
        save_model(checkpoint, model.network, task=TASK, metadata=metadata)
        predictions = probability_table(
            self.test.ids, model.probabilities, self.classes, id_column="id"
        )
        predictions.insert(1, "label", [self.classes[target] for target in self.test.targets])
        write_table(self.out / "predictions.tsv", predictions)
        failures = self.collection.failures
        write_failures(self.out / "failures.csv", failures, id_column="id")
        titles = {"model": "window + registers"} | BASELINES
        titles["model"] = f"model ({self.config['pattern']['expression']})"
        text = format_table({titles[name]: row for name, row in scores.items()})
        summary = (
            f"{len(self.test.ids):,} test records, 95 % intervals over records\n{text}\n\n"
            f"model        {checkpoint}\n"
            f"predictions  {self.out / 'predictions.tsv'}\n"
            f"metrics      {self.out / 'metrics.json'}\n"
            f"predict with  python -m pipelines.genomics predict sequences=FILE ckpt={checkpoint} "
            f"out=FOLDER\n"
        )
        (self.out / "summary.txt").write_text(summary, encoding="utf-8")
        metrics = summarise(scores, results)
        finish_run(
            self.out, {"classes": self.classes, "test_records": len(self.test.ids), **metrics}
        )
        print(f"\n{summary}")
        if failures:
            print(f"{len(failures):,} without a partner: {self.out / 'failures.csv'}")


def record_probabilities(predictions: Iterable[Prediction]) -> tuple[list[int], Probabilities]:
    """Average the logits of each record's windows and turn them into probabilities."""
    found = list(predictions)
    logits = torch.stack([prediction.logits for prediction in found])
    records = torch.tensor([prediction.record for prediction in found])
    unique, averaged = average_windows(logits, records)
    return unique.tolist(), averaged.double().softmax(-1).numpy()
