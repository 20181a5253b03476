"""One run of `train`: the model and its baselines, trained, scored, and written."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64, Shaped, UInt8
from numpy import ndarray
from scipy.special import logit

from pipelines.genomics.baseline import fit_kmer_baseline, fit_kmer_labels, fit_kmer_ridge
from pipelines.genomics.collection import Collection
from pipelines.genomics.convolution import BenchmarkCnn, majority_logits, refuse_long
from pipelines.genomics.data import WindowDataset, average_windows
from pipelines.genomics.leaks import FEW, Leaks
from pipelines.genomics.model import TASK, DnaClassifier, require_even_lengths
from pipelines.genomics.pretrain import load_body, read_pretrained
from pipelines.genomics.tasks import SHOWN, DnaObjective, Targets, settle
from pipelines.genomics.tokenizers import Tokenizer, digest
from pipelines.shared.batch import Examples
from pipelines.shared.checkpoint import save_model
from pipelines.shared.evaluation import score
from pipelines.shared.fit import FitReport, FitSettings
from pipelines.shared.inference import Prediction
from pipelines.shared.metrics import JointPredictions, Predictions, Score, format_table
from pipelines.shared.model_card import write_model_card
from pipelines.shared.objective import Classification, Outputs, Regression
from pipelines.shared.record import finish_run, is_main_process
from pipelines.shared.saved_predictions import MODEL, TABLE
from pipelines.shared.splits import SPLITS
from pipelines.shared.study import Contender, name_engines, train_contender
from pipelines.shared.tables import write_failures, write_table

BASELINES = {
    "majority": "majority class",
    "kmer": "4-mer logistic regression",
    "cnn": "convolutions (Genomic Benchmarks)",
    "window": "window alone",
    "shuffled": "shuffled positions",
}
_OTHERWISE = {
    "multilabel": {"majority": "share of each label"},
    "regression": {"majority": "mean of training", "kmer": "4-mer ridge regression"},
    "tracks": {"majority": "mean of training", "kmer": "ridge regression on 21 bases around"},
}
"""What baselines are called in other tasks than classification."""
LEAKS = "leaks.csv"
HELD_OUT = ("val", "test")


@dataclass(frozen=True, slots=True)
class Result:
    """One contender: its objective as validation settled it, numbers and scores.

    `outputs` are the network's of each held-out record (of tracks: of each of their bases); `clean`
    the scores without what leaks.
    """

    objective: DnaObjective
    outputs: dict[str, Outputs]
    scores: dict[str, Score]
    clean: dict[str, Score]
    by_target: dict[str, dict[str, Score]] = field(default_factory=dict)
    """Scores of each of several labels or tracks."""
    network: torch.nn.Module | None = None
    report: FitReport | None = None
    engine_calls: Counter[str] | None = None


def title_baselines(task: str) -> dict[str, str]:
    """Say what each baseline is in a task."""
    return BASELINES | _OTHERWISE.get(task, {})


class Study:
    """The items of a run by split, what is trained on them, and what is written of it."""

    without: tuple[str, ...] = ()
    """Baselines that the task does not have."""
    resampled, targets_are = "records", "label"
    """What intervals resample, and what several targets are."""

    def __init__(
        self,
        config: dict[str, Any],
        settings: FitSettings,
        collection: Collection,
        targets: Targets,
        objective: DnaObjective,
        tokenizer: Tokenizer,
        architecture: dict[str, Any],
        leaks: Leaks | None,
        out: Path,
    ) -> None:
        self.config, self.settings, self.out = config, settings, out
        self.collection, self.store = collection, collection.sequences
        self.tokenizer, self.architecture, self.leaks = tokenizer, architecture, leaks
        self.table, self.records = collection.table, collection.records
        self.targets, self.objective = targets, objective
        self.titles = title_baselines(config["task"]["name"])
        self.rows = {name: np.flatnonzero(self.table["split"] == name) for name in SPLITS}
        lengths = [length for split in SPLITS for length in self._windows(split).lengths]
        self.longest = max(lengths)
        if config["rc"] == "equivariant":
            require_even_lengths(lengths, config["stem_stride"])
        if "cnn" in config["baselines"] and "cnn" not in self.without:
            refuse_long(self.longest)

    def run(self) -> int:
        """Train everything, print the comparison, write the model and the run's record."""
        results = {MODEL: self._train(MODEL)}
        for name in self.config["baselines"]:
            if name in self.without:
                print(f"note: baseline {name} says nothing of single bases and is left out")
            else:
                results[name] = self._baseline(name)
        if is_main_process():
            self._write(results)
        return 3 if self.collection.failures else 0

    def _baseline(self, name: str) -> Result:
        if name == "majority":
            return self._score(self._constant_outputs())
        return self._score(self._kmer_outputs()) if name == "kmer" else self._train(name)

    def _constant_outputs(self) -> dict[str, Outputs]:
        """What is said without looking: shares of classes or labels, or the mean."""
        known = self.targets.values[self.rows["train"]]
        if isinstance(self.objective, Classification):
            counts = torch.from_numpy(np.bincount(known, minlength=len(self.objective.classes)))
            said = majority_logits(counts, 1).numpy()
        elif isinstance(self.objective, Regression):
            said = np.zeros((1, 1))
        else:
            said = logit(known.mean(axis=0, dtype=np.float64))[None]
        return {key: said.repeat(len(self.rows[key]), axis=0) for key in HELD_OUT}

    def _train(self, name: str) -> Result:
        data = partial(self._examples, name=name)
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
            split: self._gather(split, found) for split, found in trained.predictions.items()
        }
        return replace(
            self._score(outputs),
            network=trained.network,
            report=trained.report,
            engine_calls=trained.engine_calls,
        )

    def _build(self, name: str) -> torch.nn.Module:
        if name == "cnn":
            return BenchmarkCnn(self.longest, self.objective.num_outputs)
        alone = f"SlidingWindow(radius={self.config['window']})"
        changed = {"pattern": alone} if name == "window" else {}
        network = DnaClassifier(**{**self.architecture, **changed})
        if name == MODEL and self.config["pretrained"]:
            path = Path(self.config["pretrained"])
            said = load_body(
                network,
                read_pretrained(path),
                self.objective.plain(),
                freeze=self.config["freeze"],
            )
            print(f"note: sizes, pattern and weights of {path}: {said}")
        return network

    def _examples(self, split: str, *, name: str = MODEL, augment: bool = False) -> Examples:
        return self._windows(split, name=name, augment=augment)

    def _windows(self, split: str, *, name: str = MODEL, augment: bool = False) -> WindowDataset:
        rows = self.rows[split]
        return WindowDataset(
            self.store,
            self.records[rows],
            self._window_targets(rows),
            context=self.config["context"],
            overlap=self.config["window_overlap"],
            reverse_complement=augment and self.config["rc"] in ("augment", "average"),
            shuffle_positions=name == "shuffled",
            tokenizer=None if name == "cnn" else self.tokenizer,
            seed=self.config["seed"],
        )

    def _window_targets(self, rows: Int64[ndarray, " K"]) -> Shaped[ndarray, "K ..."] | None:
        return self.targets.values[rows]

    def _sample_weights(self, name: str) -> list[float] | None:
        """Weights by which an epoch draws each window, so that classes come as often."""
        if self.config["task"].get("sampling") != "balanced":
            return None
        targets = self._windows("train", name=name).targets
        assert targets is not None, "training windows have a class"
        weights: list[float] = (1 / np.bincount(targets))[targets].tolist()
        return weights

    def _gather(self, split: str, predictions: Iterable[Prediction]) -> Outputs:
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

        asked = (tokens for split in HELD_OUT for tokens in sequences(split))
        both, known = self.config["rc"] != "none", self.targets.values[self.rows["train"]]
        if isinstance(self.objective, Regression):
            said = fit_kmer_ridge(sequences("train"), known, asked, both_strands=both)
            found = ((said - self.objective.mean) / self.objective.spread)[:, None]
        elif isinstance(self.objective, Classification):
            fitted = fit_kmer_baseline(sequences("train"), known, asked, both_strands=both)
            shares = np.full((len(fitted.probabilities), self.objective.num_outputs), 1e-12)
            shares[:, fitted.classes] = np.maximum(fitted.probabilities, 1e-12)
            found = np.log(shares)
        else:
            found = fit_kmer_labels(sequences("train"), known, asked, both_strands=both)
        val, test = np.split(found, [len(self.rows["val"])])
        return {"val": val, "test": test}

    def _score(self, outputs: dict[str, Outputs]) -> Result:
        """Let validation choose thresholds, and score the test records."""
        known = {split: self.targets.of(self.rows[split]) for split in HELD_OUT}
        objective = settle(self.objective, outputs["val"], known["val"])
        rows = self.rows["test"]
        found = objective.predictions(outputs["test"], known["test"])
        groups = self.table["group"].iloc[rows].tolist()
        clean = self._clean_rows()
        kept = [groups[row] for row in clean]
        return Result(
            objective,
            outputs,
            score(found, groups=groups),
            score(found.take(clean), groups=kept) if 0 < len(clean) < len(rows) else {},
            score_targets(found, groups),
        )

    def _clean_rows(self) -> ndarray:
        """Rows of the test records that the leak report does not name."""
        ids = self.table["id"].iloc[self.rows["test"]]
        return np.flatnonzero(~ids.isin(self._leaking).to_numpy())

    @property
    def _leaking(self) -> set[str]:
        return set() if self.leaks is None else leaking_ids(self.leaks.items)

    @property
    def shown(self) -> tuple[str, ...]:
        """Scores for the terminal."""
        return SHOWN[self.config["task"]["name"]]

    def _write(self, results: dict[str, Result]) -> None:
        model = results[MODEL]
        assert isinstance(model.network, DnaClassifier)
        metadata = {
            "task": model.objective.plain(),
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
                  "strands": self.config["rc"], "stem": self._stem()}  # fmt: skip
        write_model_card(self.out, metrics, tokens=tokens)
        finish_run(self.out, metrics)
        print(f"\n{summary}")
        if failures:
            print(f"{len(failures):,} without a partner: {self.out / 'failures.csv'}")

    @property
    def names_are(self) -> str:
        """What the targets' names are."""
        return {"multilabel": "labels", "tracks": "tracks"}.get(
            self.config["task"]["name"], "classes"
        )

    def _stem(self) -> str:
        kernel, stride = self.config["kernel"], self.config["stem_stride"]
        if self.tokenizer.config["kind"] != "base" or self.config["stem"] == "none":
            return "none, tokens are embedded one by one"
        return f"convolution over {kernel} bases, a token of each {stride}"

    def _predictions(self, result: Result) -> pd.DataFrame:
        """Return predictions of every held-out record."""
        parts = []
        for split in HELD_OUT:
            rows = self.rows[split]
            known = self.table.iloc[rows].reset_index(drop=True)
            columns = [name for name in ("id", "group", "split", "contig") if name in known]
            truth = result.objective.truth(self.targets.of(rows))
            said = result.objective.read(result.outputs[split])
            parts.append(pd.concat([known[columns], truth, said], axis=1))
        return pd.concat(parts, ignore_index=True)

    def _metrics(self, results: dict[str, Result]) -> dict[str, object]:
        model = results[MODEL]
        assert model.report is not None, "the model is trained"
        calls = sum((result.engine_calls or Counter() for result in results.values()), Counter())
        reports = {name: result.report for name, result in results.items() if result.report}
        shown = {name: model.scores[name].value for name in self.shown}
        return {
            "task": model.objective.plain(),
            self.names_are: list(self.targets.names),
            "test_records": len(self.rows["test"]),
            "test_records_without_leaks": len(self._clean_rows()),
            "failures": len(self.collection.failures),
            "summary": {**shown, "seconds": round(model.report.seconds, 1)},
            **name_engines(calls),
            "scores": {name: _plain(result.scores) for name, result in results.items()},
            "scores_by_target": {name: _plain(row) for name, row in model.by_target.items()},
            "scores_without_leaks": {
                name: _plain(result.clean) for name, result in results.items() if result.clean
            },
            "training": {name: asdict(report) for name, report in reports.items()},
        }

    def _summary(self, results: dict[str, Result]) -> str:
        titles = {MODEL: f"model ({self.architecture['pattern']})"} | self.titles
        scores = {titles[name]: result.scores for name, result in results.items()}
        checkpoint, tested = self.out / "model.ckpt", len(self.rows["test"])
        lines = f"{tested:,} test records, 95 % intervals over {self.resampled}\n"
        lines += f"{format_table(scores, names=self.shown)}\n\n"
        if each := results[MODEL].by_target:
            lines += f"the model's\n{format_table(each, what=self.targets_are)}\n\n"
        clean = {titles[name]: result.clean for name, result in results.items() if result.clean}
        left = len(self._clean_rows())
        if self.leaks is not None:
            few = f": fewer than {FEW}, too few to score by" if left < FEW else ""
            lines += f"without the {tested - left:,} that leak ({LEAKS}), {left:,} remain{few}\n"
        if clean:
            lines += f"{format_table(clean, names=self.shown)}\n"
        return (
            f"{lines}\n"
            f"model        {checkpoint}\n"
            f"predictions  {self.out / TABLE}\n"
            f"metrics      {self.out / 'metrics.json'}\n"
            f"predict with  python -m pipelines.genomics predict sequences=FILE ckpt={checkpoint} "
            f"out=FOLDER\n"
        )


def score_targets(found: Predictions, groups: Sequence[str]) -> dict[str, dict[str, Score]]:
    """Scores of each of several targets; nothing where there is one."""
    if not isinstance(found, JointPredictions):
        return {}
    return {name: score(part, groups=groups) for name, part in found.parts.items()}


def leaking_ids(items: pd.DataFrame) -> set[str]:
    """Ids of the test items that a leak report names, whatever they leak from."""
    named = items["leaks"].astype(str) == "True"
    return set(items.loc[named & (items["split"] == "test"), "id"])


def _plain(scores: dict[str, Score]) -> dict[str, object]:
    return {name: found.plain() for name, found in scores.items()}
