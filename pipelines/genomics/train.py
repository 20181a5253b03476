"""`train`: from sequences and labels to a model, scored beside its baselines."""

from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64
from numpy import ndarray

from pipelines.genomics.baseline import fit_kmer_baseline
from pipelines.genomics.data import (
    WindowDataset,
    average_windows,
    match_labels,
    read_label_table,
)
from pipelines.genomics.duplicates import POLICIES, Chosen, Settled, find_copies, settle_copies
from pipelines.genomics.ingest import provide_store, require_input
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.store import SequenceStore
from pipelines.genomics.synthetic import MotifPlan, write_dataset
from pipelines.shared.checkpoint import save_model
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitSettings
from pipelines.shared.inference import Prediction
from pipelines.shared.metrics import Score, format_table
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

TASK = "genomics"
BASELINES = {
    "kmer": "4-mer logistic regression",
    "window": "window alone",
    "shuffled": "shuffled positions",
}


def train(config: dict[str, Any]) -> int:
    """Train and score; 0, or 3 if records or labels stayed without a partner."""
    check_baselines(config["baselines"], BASELINES)
    settings = FitSettings.from_config(config)
    check_network(partial(DnaClassifier, **_architecture(config, num_classes=2)))
    if not 0 <= config["overlap"] < config["context"]:
        raise InputError(
            f"overlap must be at least 0 and below context; got overlap={config['overlap']}, "
            f"context={config['context']}"
        )
    if config["duplicates"] not in POLICIES:
        raise InputError(f"duplicates must be {', '.join(POLICIES)}; got {config['duplicates']!r}")
    sequences, labels = _input_files(config)
    out = Path(config["out"])
    if not begin_run(out, config):
        return 0
    table = None if labels is None else _read_labels(labels, config)
    store = provide_store({**config, "sequences": sequences}, out, require_labels=table is None)
    table = store.label_table() if table is None else table
    print(store.counts)
    study = _Study(config, settings, store, table, out)
    return study.run()


def _architecture(config: dict[str, Any], *, num_classes: int) -> dict[str, Any]:
    architecture = architecture_of(config, num_classes=num_classes)
    return {**architecture, "stem_stride": config["stem_stride"]}


def _input_files(config: dict[str, Any]) -> tuple[Path | None, Path | None]:
    """Name sequences (None: the store has them) and labels (None: they stand with the records)."""
    if config["data"]["name"] == "sequences":
        require_input(config)
        sequences, labels = (config[key] and Path(config[key]) for key in ("sequences", "labels"))
        return sequences, labels
    data = config["data"]
    names = {f.name for f in fields(MotifPlan)}
    try:
        plan = MotifPlan(**{key: value for key, value in data.items() if key in names})
    except ValueError as error:
        raise InputError(f"data=synthetic: {error}") from None
    sizes = {key: data[key] for key in ("num_train", "num_val", "num_test", "seed")}
    return write_dataset(Path(config["data_root"]) / "genomics" / "synthetic", plan, **sizes)


def _read_labels(path: Path, config: dict[str, Any]) -> pd.DataFrame:
    """Read the labels, and say which columns and rows of the table they are."""
    columns = {role: name for role, name in config["columns"].items() if role != "sequence"}
    where = config["where"]
    table = read_label_table(path, columns=columns, where=where)
    mapped = [f"{role} is {name!r}" for role, name in columns.items() if name != role]
    if mapped:
        print(f"{path.name}: {', '.join(mapped)}")
    if where:
        chosen = ", ".join(f"{column} is {value!r}" for column, value in where.items())
        print(f"{path.name}: {len(table):,} rows where {chosen}")
    return table


class _Study:
    """One run: data by split, the model, its baselines, and what is written of them."""

    def __init__(
        self,
        config: dict[str, Any],
        settings: FitSettings,
        store: SequenceStore,
        table: pd.DataFrame,
        out: Path,
    ) -> None:
        self.config, self.settings, self.store, self.out = config, settings, store, out
        match = match_labels(store, table)
        filtered = bool(config["where"])
        for note in match.notes(filtered=filtered):
            print(f"note: {note}")
        self.failures = _partnerless(() if filtered else match.unlabelled, match.unknown, config)
        rows = table.iloc[match.rows]
        settled = self._settle_copies(rows, match.records)
        rows = rows.iloc[settled.kept]
        self.records, self.groups = match.records[settled.kept], settled.groups
        self.classes = sorted(rows["label"].unique())
        if len(self.classes) < 2:
            raise InputError(
                f"{len(rows):,} records of {len(self.classes)} classes are left with a label and "
                f"without copies; at least two classes are needed: see {out / 'duplicates.csv'}, "
                "or use duplicates=keep"
            )
        self.architecture = _architecture(config, num_classes=len(self.classes))
        self.targets = np.array([self.classes.index(label) for label in rows["label"]])
        splits = assign_splits(
            ids=rows["id"].tolist(),
            labels=rows["label"].tolist(),
            groups=self.groups,
            given=rows["split"].tolist() if "split" in rows else None,
            val_fraction=config["val_fraction"],
            test_fraction=config["test_fraction"],
            seed=config["seed"],
        )
        if is_main_process():
            write_table(out / "splits.tsv", rows[["id", "label"]].assign(split=splits))
        self.rows = {name: np.flatnonzero(np.array(splits) == name) for name in _SPLITS}
        counts = ", ".join(f"{name} {len(self.rows[name]):,}" for name in _SPLITS)
        print(f"{len(self.classes)} classes ({', '.join(self.classes)}); records: {counts}")
        test = self.rows["test"]
        self.test = TestSet(
            [store.ids[int(record)] for record in self.records[test]],
            self.targets[test].tolist(),
            [self.groups[row] for row in test],
        )

    def _settle_copies(self, rows: pd.DataFrame, records: Int64[ndarray, "R"]) -> Settled:
        """Deal with records of the same sequence before any of them is put in a split."""
        given = rows["split"].tolist() if "split" in rows else None
        chosen = Chosen(rows["id"].tolist(), rows["label"].tolist(), rows["group"].tolist(), given)
        settled = settle_copies(find_copies(self.store, records), chosen, self.config["duplicates"])
        for note in settled.notes:
            print(f"note: {note}: {self.out / 'duplicates.csv'}")
        if is_main_process():
            write_table(self.out / "duplicates.csv", settled.table)
        return settled

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
        return 3 if self.failures else 0

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
                overlap=self.config["overlap"],
                reverse_complement=augment and self.config["reverse_complement"],
                shuffle_positions=shuffle_positions,
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
            "overlap": self.config["overlap"],
            "data": self.store.fingerprint,
        }
        assert isinstance(model.network, DnaClassifier)
        save_model(checkpoint, model.network, task=TASK, metadata=metadata)
        predictions = probability_table(
            self.test.ids, model.probabilities, self.classes, id_column="id"
        )
        predictions.insert(1, "label", [self.classes[target] for target in self.test.targets])
        write_table(self.out / "predictions.tsv", predictions)
        write_failures(self.out / "failures.csv", self.failures, id_column="id")
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
        if self.failures:
            print(f"{len(self.failures):,} without a partner: {self.out / 'failures.csv'}")


_SPLITS = ("train", "val", "test")


def record_probabilities(predictions: Iterable[Prediction]) -> tuple[list[int], Probabilities]:
    """Average the logits of each record's windows and turn them into probabilities."""
    found = list(predictions)
    logits = torch.stack([prediction.logits for prediction in found])
    records = torch.tensor([prediction.record for prediction in found])
    unique, averaged = average_windows(logits, records)
    return unique.tolist(), averaged.double().softmax(-1).numpy()


def _partnerless(
    unlabelled: tuple[str, ...], unknown: tuple[str, ...], config: dict[str, Any]
) -> list[Failure]:
    label = "add a row with its id to the labels"
    record = "remove the row, or give the record that it names"
    return [
        *(Failure(i, str(config["sequences"]), "no_label", "no label", label) for i in unlabelled),
        *(Failure(i, str(config["labels"]), "no_record", "no record", record) for i in unknown),
    ]
