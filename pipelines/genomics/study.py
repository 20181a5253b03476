"""One run of `train`: the model and its baselines, trained, scored, and written."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import UInt8
from numpy import ndarray

from pipelines.genomics.baseline import fit_kmer_baseline
from pipelines.genomics.collection import Collection
from pipelines.genomics.convolution import BenchmarkCnn, majority_logits
from pipelines.genomics.data import WindowDataset, average_windows
from pipelines.genomics.leaks import FEW, Leaks
from pipelines.genomics.model import TASK, DnaClassifier, require_even_lengths
from pipelines.genomics.pretrain import load_body, read_pretrained
from pipelines.genomics.tokenizers import Tokenizer, digest
from pipelines.shared.calibration import choose_threshold
from pipelines.shared.checkpoint import save_model
from pipelines.shared.evaluation import score
from pipelines.shared.fit import FitReport, FitSettings
from pipelines.shared.inference import Prediction
from pipelines.shared.metrics import Score, format_table
from pipelines.shared.model_card import write_model_card
from pipelines.shared.objective import Classification, Outputs
from pipelines.shared.record import finish_run, is_main_process
from pipelines.shared.saved_predictions import MODEL, TABLE
from pipelines.shared.splits import SPLITS
from pipelines.shared.study import Contender, choose_class_weights, name_engines, train_contender
from pipelines.shared.tables import write_failures, write_table

BASELINES = {
    "majority": "majority class",
    "kmer": "4-mer logistic regression",
    "cnn": "convolutions (Genomic Benchmarks)",
    "window": "window alone",
    "shuffled": "shuffled positions",
}
LEAKS = "leaks.csv"
HELD_OUT = ("val", "test")
SHOWN = ("auroc", "accuracy", "balanced_accuracy", "mcc")
"""Scores that a terminal has room for; `metrics.json` has all."""


@dataclass(frozen=True, slots=True)
class Result:
    """One contender: its objective as validation settled it, numbers and scores.

    `outputs` are logits of each held-out record; `clean` the scores without what leaks.
    """

    objective: Classification
    outputs: dict[str, Outputs]
    scores: dict[str, Score]
    clean: dict[str, Score]
    network: torch.nn.Module | None = None
    report: FitReport | None = None
    engine_calls: Counter[str] | None = None


class Study:
    """The items of a run by split, what is trained on them, and what is written of it."""

    def __init__(
        self,
        config: dict[str, Any],
        settings: FitSettings,
        collection: Collection,
        tokenizer: Tokenizer,
        architecture: dict[str, Any],
        leaks: Leaks | None,
        out: Path,
    ) -> None:
        self.config, self.settings, self.out = config, settings, out
        self.collection, self.store = collection, collection.sequences
        self.tokenizer, self.architecture, self.leaks = tokenizer, architecture, leaks
        self.table, self.records = collection.table, collection.records
        self.classes = tuple(sorted(self.table["label"].unique()))
        self.targets = np.array([self.classes.index(label) for label in self.table["label"]])
        self.rows = {name: np.flatnonzero(self.table["split"] == name) for name in SPLITS}
        lengths = [length for split in SPLITS for length in self._windows(split).lengths]
        self.longest = max(lengths)
        if config["rc"] == "equivariant":
            require_even_lengths(lengths, config["stem_stride"])

    def run(self) -> int:
        """Train everything, print the comparison, write the model and the run's record."""
        results = {MODEL: self._train(MODEL)}
        for name in self.config["baselines"]:
            results[name] = self._baseline(name)
        if is_main_process():
            self._write(results)
        return 3 if self.collection.failures else 0

    @property
    def objective(self) -> Classification:
        """What networks are trained for."""
        weights = choose_class_weights(
            self.config["task"]["class_weights"],
            self.targets[self.rows["train"]].tolist(),
            len(self.classes),
        )
        return Classification(self.classes, None if weights is None else tuple(weights))

    def _baseline(self, name: str) -> Result:
        if name == "majority":
            counts = np.bincount(self.targets[self.rows["train"]], minlength=len(self.classes))
            said = partial(majority_logits, torch.from_numpy(counts))
            return self._score({key: said(len(self.rows[key])).numpy() for key in HELD_OUT})
        return self._score(self._kmer_outputs()) if name == "kmer" else self._train(name)

    def _train(self, name: str) -> Result:
        data = partial(self._windows, name=name)
        trained = train_contender(
            name,
            Contender(
                lambda: self._build(name), data("train", augment=True), data("val"), data("test")
            ),
            out=self.out,
            settings=self.settings,
            objective=self.objective,
            sample_weights=self._sample_weights(name),
            also={split: data(split) for split in HELD_OUT},
        )
        outputs = {
            split: self._by_record(split, found) for split, found in trained.predictions.items()
        }
        return replace(
            self._score(outputs),
            network=trained.network,
            report=trained.report,
            engine_calls=trained.engine_calls,
        )

    def _build(self, name: str) -> torch.nn.Module:
        if name == "cnn":
            return BenchmarkCnn(self.longest, len(self.classes))
        alone = f"SlidingWindow(radius={self.config['window']})"
        changed = {"pattern": alone} if name == "window" else {}
        network = DnaClassifier(**{**self.architecture, **changed})
        if name == MODEL and self.config["pretrained"]:
            path = Path(self.config["pretrained"])
            said = load_body(network, read_pretrained(path), freeze=self.config["freeze"])
            print(f"note: sizes, pattern and weights of {path}: {said}")
        return network

    def _windows(self, split: str, *, name: str = MODEL, augment: bool = False) -> WindowDataset:
        rows = self.rows[split]
        return WindowDataset(
            self.store,
            self.records[rows],
            self.targets[rows],
            context=self.config["context"],
            overlap=self.config["window_overlap"],
            reverse_complement=augment and self.config["rc"] in ("augment", "average"),
            shuffle_positions=name == "shuffled",
            tokenizer=None if name == "cnn" else self.tokenizer,
            seed=self.config["seed"],
        )

    def _sample_weights(self, name: str) -> list[float] | None:
        """Weights by which an epoch draws each window, so that classes come as often."""
        if self.config["task"]["sampling"] != "balanced":
            return None
        targets = self._windows("train", name=name).targets
        assert targets is not None, "training windows have a class"
        weights: list[float] = (1 / np.bincount(targets))[targets].tolist()
        return weights

    def _by_record(self, split: str, predictions: Iterable[Prediction]) -> Outputs:
        """Average the logits of each record's windows; one row per record, in the table's order."""
        found = list(predictions)
        records = torch.tensor([prediction.record for prediction in found])
        unique, averaged = average_windows(torch.stack([item.logits for item in found]), records)
        row_of = {record: row for row, record in enumerate(unique.tolist())}
        order = [row_of[int(record)] for record in self.records[self.rows[split]]]
        return averaged[order].double().numpy()

    def _kmer_outputs(self) -> dict[str, Outputs]:
        def sequences(split: str) -> Iterator[UInt8[ndarray, "T"]]:
            return (self.store.read(int(record)) for record in self.records[self.rows[split]])

        known = self.targets[self.rows["train"]]
        both = {split: partial(sequences, split) for split in HELD_OUT}
        fitted = fit_kmer_baseline(
            sequences("train"),
            known,
            (tokens for split in HELD_OUT for tokens in both[split]()),
            both_strands=self.config["rc"] != "none",
        )
        probabilities = np.full((len(fitted.probabilities), len(self.classes)), 1e-12)
        probabilities[:, fitted.classes] = np.maximum(fitted.probabilities, 1e-12)
        val, test = np.split(np.log(probabilities), [len(self.rows["val"])])
        return {"val": val, "test": test}

    def _score(self, outputs: dict[str, Outputs]) -> Result:
        """Choose the threshold of two classes on validation, and score the test records."""
        objective = self.objective
        if len(self.classes) == 2 and len(self.rows["val"]):
            known = objective.predictions(outputs["val"], self.targets[self.rows["val"]].tolist())
            cut = choose_threshold(known.targets, known.probabilities[:, 1])
            objective = replace(objective, threshold=cut)
        rows = self.rows["test"]
        found = objective.predictions(outputs["test"], self.targets[rows].tolist())
        groups = self.table["group"].iloc[rows].tolist()
        clean = self._clean_rows()
        kept = [groups[row] for row in clean]
        return Result(
            objective,
            outputs,
            score(found, groups=groups),
            score(found.take(clean), groups=kept) if 0 < len(clean) < len(rows) else {},
        )

    def _clean_rows(self) -> ndarray:
        """Rows of the test records that the leak report does not name."""
        ids = self.table["id"].iloc[self.rows["test"]]
        leaking = set() if self.leaks is None else leaking_ids(self.leaks.items)
        return np.flatnonzero(~ids.isin(leaking).to_numpy())

    def _write(self, results: dict[str, Result]) -> None:
        model = results[MODEL]
        assert isinstance(model.network, DnaClassifier)
        metadata = {
            "classes": list(self.classes),
            "threshold": model.objective.threshold,
            "context": self.config["context"],
            "overlap": self.config["window_overlap"],
            "tokenizer": self.tokenizer.config,
            "tokenizer_digest": digest(self.tokenizer),
            "data": self.store.fingerprint,
        }
        save_model(self.out / "model.ckpt", model.network, task=TASK, metadata=metadata)
        for name, result in results.items():
            write_table(self.out / "models" / name / TABLE, table := self._predictions(result))
            if name == MODEL:
                write_table(self.out / TABLE, table)
        if self.leaks is not None:
            write_table(self.out / LEAKS, self.leaks.items)
        failures = self.collection.failures
        write_failures(self.out / "failures.csv", failures, id_column="id")
        summary = self._summary(results)
        (self.out / "summary.txt").write_text(summary, encoding="utf-8")
        metrics = self._metrics(results)
        tokens = {"tokenizer": self.tokenizer.config, "context": self.config["context"],
                  "strands": self.config["rc"]}  # fmt: skip
        write_model_card(self.out, metrics, tokens=tokens)
        finish_run(self.out, metrics)
        print(f"\n{summary}")
        if failures:
            print(f"{len(failures):,} without a partner: {self.out / 'failures.csv'}")

    def _predictions(self, result: Result) -> pd.DataFrame:
        """Return predictions of every held-out record."""
        parts = []
        for split in HELD_OUT:
            rows = self.rows[split]
            known = self.table.iloc[rows].reset_index(drop=True)
            columns = [name for name in ("id", "group", "split", "contig") if name in known]
            truth = result.objective.truth(self.targets[rows].tolist())
            said = result.objective.read(result.outputs[split])
            parts.append(pd.concat([known[columns], truth, said], axis=1))
        return pd.concat(parts, ignore_index=True)

    def _metrics(self, results: dict[str, Result]) -> dict[str, object]:
        model = results[MODEL]
        assert model.report is not None, "the model is trained"
        calls = sum((result.engine_calls or Counter() for result in results.values()), Counter())
        reports = {name: result.report for name, result in results.items() if result.report}
        shown = {name: model.scores[name].value for name in SHOWN}
        return {
            "task": model.objective.plain(),
            "classes": list(self.classes),
            "test_records": len(self.rows["test"]),
            "test_records_without_leaks": len(self._clean_rows()),
            "failures": len(self.collection.failures),
            "summary": {**shown, "seconds": round(model.report.seconds, 1)},
            **name_engines(calls),
            "scores": {name: _plain(result.scores) for name, result in results.items()},
            "scores_without_leaks": {
                name: _plain(result.clean) for name, result in results.items() if result.clean
            },
            "training": {name: asdict(report) for name, report in reports.items()},
        }

    def _summary(self, results: dict[str, Result]) -> str:
        titles = {MODEL: f"model ({self.architecture['pattern']})"} | BASELINES
        scores = {titles[name]: result.scores for name, result in results.items()}
        checkpoint, tested = self.out / "model.ckpt", len(self.rows["test"])
        lines = f"{tested:,} test records, 95 % intervals over records\n"
        lines += f"{format_table(scores, names=SHOWN)}\n\n"
        clean = {titles[name]: result.clean for name, result in results.items() if result.clean}
        left = len(self._clean_rows())
        if self.leaks is not None:
            few = f": fewer than {FEW}, too few to score by" if left < FEW else ""
            lines += f"without the {tested - left:,} that leak ({LEAKS}), {left:,} remain{few}\n"
        if clean:
            lines += f"{format_table(clean, names=SHOWN)}\n"
        return (
            f"{lines}\n"
            f"model        {checkpoint}\n"
            f"predictions  {self.out / TABLE}\n"
            f"metrics      {self.out / 'metrics.json'}\n"
            f"predict with  python -m pipelines.genomics predict sequences=FILE ckpt={checkpoint} "
            f"out=FOLDER\n"
        )


def leaking_ids(items: pd.DataFrame) -> set[str]:
    """Ids of the test items that a leak report names, whatever they leak from."""
    named = items["leaks"].astype(str) == "True"
    return set(items.loc[named & (items["split"] == "test"), "id"])


def _plain(scores: dict[str, Score]) -> dict[str, object]:
    return {name: found.plain() for name, found in scores.items()}
