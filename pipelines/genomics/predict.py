"""`predict`: sequences and a model to one row per record or interval, in input order."""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from pipelines.genomics.alphabet import NUM_TOKENS
from pipelines.genomics.ingest import require_input
from pipelines.genomics.model import TASK, DnaClassifier
from pipelines.genomics.outputs import (
    check_outputs,
    write_embeddings,
    write_predictions,
    write_tracks,
)
from pipelines.genomics.pretrain import refuse_other_version
from pipelines.genomics.scoring import Scores, score_windows
from pipelines.genomics.selection import (
    Intervals,
    Sequences,
    Windows,
    check_settings,
    open_store,
    select_intervals,
)
from pipelines.genomics.tasks import (
    DnaObjective,
    load_objective,
    name_outputs,
    read_values,
)
from pipelines.genomics.tokenizers import (
    BaseTokenizer,
    Tokenizer,
    build_tokenizer,
    digest,
    restore_tokenizer,
)
from pipelines.genomics.track_task import Tracks
from pipelines.shared.checkpoint import LoadedModel, load_model
from pipelines.shared.errors import InputError
from pipelines.shared.objective import DECIMALS
from pipelines.shared.record import RunState, finish_run, make_folder, open_run
from pipelines.shared.tables import Failure, write_failures


def predict(config: dict[str, Any]) -> int:
    """Predict every record or interval; 0, or 3 if some fell out and are listed."""
    require_input(config)
    check_settings(config)
    if isinstance(config["outputs"], str):
        config = {**config, "outputs": [config["outputs"]]}
    if config["outputs"] is not None:
        check_outputs(config["outputs"])
    return ModelRun(config).predict_intervals()


class ModelRun:
    """One run of a model: the store it reads, and the folder of the results."""

    needs_task = True

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.out = config, Path(config["out"])
        checkpoint = Path(config["ckpt"])
        model = load_model(checkpoint, task=TASK)
        refuse_other_version(model, checkpoint)
        if self.needs_task and "task" not in model.metadata:
            raise InputError(
                f"{checkpoint} guesses bases and has learnt no task; train it further with "
                f"pretrained={checkpoint}, or take its vectors with the verb embed"
            )
        if config["device"].startswith("cuda") and not torch.cuda.is_available():
            raise InputError("device=cuda: no GPU is found here; use device=cpu")
        self.model_digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        self.tokenizer = model_tokenizer(model, checkpoint)
        refuse_other_tokenizer(config.get("tokenizer"), self.tokenizer, checkpoint)
        self.network = DnaClassifier(**model.config)  # type: ignore[arg-type]
        self.network.load_state_dict(model.state_dict)
        self._task: Any = model.metadata.get("task")
        if config.get("outputs", ()) is None:  # of single bases a table says next to nothing
            self.config = {**config, "outputs": ["tsv", "bedgraph"] if self.along else ["tsv"]}
        self.context: int = model.metadata["context"]  # type: ignore[assignment]
        self.overlap: int = model.metadata.get("overlap", 0)  # type: ignore[assignment]
        if not config["dry_run"]:
            make_folder(self.out)
        self.store = open_store(config, self.out)

    @cached_property
    def objective(self) -> DnaObjective:
        """What the network was trained for."""
        return load_objective(self._task)

    @property
    def along(self) -> bool:
        """Whether the network says something of each base."""
        return isinstance(self.objective, Tracks)

    def predict_intervals(self) -> int:
        """Predict records or intervals."""
        selection = select_intervals(self.config, self.store)
        intervals, table = Intervals(self.store, selection.placed), selection.table
        windows = self._windows(intervals, table["id"].tolist())
        scores = self._score(windows, table, selection.notes, selection.failures)
        if scores is None:
            return 3 if selection.failures else 0
        lengths = windows.ends - windows.starts if self.along else None
        said = self.objective.read(scores.by_sequence(windows.records, lengths)).round(DECIMALS)
        scored = pd.concat([table.drop(columns="flags"), said], axis=1)
        scored["num_windows"] = pd.Series(windows.records).value_counts(sort=False).to_numpy()
        scored["flags"] = _flags(table["flags"], intervals)
        written = write_predictions(self.out, scored, self.config["outputs"])
        written += self._embeddings(scores, windows, table)
        written += write_tracks(
            self.out,
            self.config["outputs"],
            intervals,
            windows,
            dict(
                zip(
                    name_outputs(self.objective),
                    read_values(self.objective, scores.logits).T,
                    strict=True,
                )
            ),
            per_base=self.along,
        )
        return self._finish(written, table, windows, selection.failures)

    def _windows(self, sequences: Sequences, names: list[str]) -> Windows:
        return Windows(
            sequences,
            names,
            context=self.context,
            overlap=self.overlap,
            tokenizer=self.tokenizer,
        )

    def _score(
        self,
        windows: Windows,
        table: pd.DataFrame,
        notes: Sequence[str],
        failures: Sequence[Failure],
    ) -> Scores | None:
        """Score the windows; None for a dry run, and where the results are there already."""
        for note in notes:
            print(f"note: {note}")
        kind = next((key for key in ("variants", "intervals") if self.config.get(key)), "records")
        bases = int(windows.sequences.lengths.sum())
        print(f"{kind}: {len(table):,}, bases: {bases:,}, windows: {len(windows):,}")
        if self.config["dry_run"]:
            print("dry run: nothing is predicted")
            return None
        chosen = hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()
        record = {
            **self.config,
            "data": self.store.fingerprint,
            "model": self.model_digest,
            "chosen": chosen,
        }
        if open_run(self.out, record) is RunState.FINISHED:
            print(f"{self.out} holds these predictions already; give another out= to repeat them")
            return None
        write_failures(self.out / "failures.csv", failures, id_column="id")
        return score_windows(
            self.network,
            windows,
            parts=self.out / "parts",
            max_tokens=self.config["max_tokens"],
            device=self.config["device"],
            embeddings="embeddings" in self.config["outputs"],
        )

    def _embeddings(self, scores: Scores, windows: Windows, table: pd.DataFrame) -> list[Path]:
        if scores.embeddings is None:
            return []
        vectors = scores.embeddings_by_sequence(windows.records)
        return write_embeddings(self.out, table, vectors)

    def _finish(
        self,
        written: Sequence[Path],
        table: pd.DataFrame,
        windows: Windows,
        failures: Sequence[Failure],
    ) -> int:
        counts = {"rows": len(table), "windows": len(windows), "left_out": len(failures)}
        finish_run(self.out, counts)
        shutil.rmtree(self.out / "parts", ignore_errors=True)
        for path in written:
            print(f"{path.stem if path.suffix != '.zarr' else 'embeddings':12} {path}")
        if failures:
            print(f"{len(failures):,} left out: {self.out / 'failures.csv'}")
        return 3 if failures else 0


def _flags(said: "pd.Series[str]", intervals: Intervals) -> list[str]:
    """Say of each interval what was done to it, and how many of its bases are ambiguous."""
    counts = [intervals.count_ambiguous(index) for index in range(len(intervals.lengths))]
    unclear = [f"{count:,} ambiguous bases" if count else "" for count in counts]
    pairs = zip(said, unclear, strict=True)
    return ["; ".join(text for text in pair if text) for pair in pairs]


def model_tokenizer(model: LoadedModel, path: Path) -> Tokenizer:
    """Make the tokenizer that a model was trained with; raises InputError if it does not fit."""
    settings = model.metadata.get("tokenizer")
    tokenizer = restore_tokenizer(settings) if isinstance(settings, Mapping) else BaseTokenizer()
    known = model.metadata.get("tokenizer_digest")
    if known is not None and known != digest(tokenizer):
        raise InputError(
            f"{path}: its tokenizer is not the one that it was trained with (SHA-256 "
            f"{digest(tokenizer)[:12]} instead of {str(known)[:12]}); copy the model file again"
        )
    width = model.config.get("num_tokens", NUM_TOKENS)
    if width != tokenizer.num_tokens:
        raise InputError(
            f"{path}: its network knows {width:,} tokens, its tokenizer makes "
            f"{tokenizer.num_tokens:,}; copy the model file again"
        )
    return tokenizer


def refuse_other_tokenizer(
    wanted: Mapping[str, Any] | None, tokenizer: Tokenizer, path: Path
) -> None:
    """Raise InputError where a tokenizer is asked for that is not the model's."""
    if wanted is None:
        return
    trained = tokenizer.config["kind"]
    if wanted["kind"] != trained:
        raise InputError(
            f"tokenizer={wanted['kind']}, but {path} was trained with tokenizer={trained}; leave "
            "tokenizer= out: the model brings its own"
        )
    if wanted["kind"] == "bpe" and not wanted["file"]:
        return
    if digest(build_tokenizer(wanted, lambda: ())) != digest(tokenizer):
        raise InputError(
            f"tokenizer={trained}: {path} was trained with other settings of it; leave tokenizer= "
            "out: the model brings its own"
        )
