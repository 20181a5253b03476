"""`embed`: the vectors that a trained or pretrained network makes of sequences.

embeddings.zarr   embeddings float32 [R, E], a row for each sequence, in input order; their ids,
                  contigs, strands, start and end; with per=base, embeddings [N, E] of all bases
                  and offsets int64 [R + 1]
sequences.tsv     id, contig, start, end, strand of each row
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import zarr
from jaxtyping import Float
from numpy import ndarray

from pipelines.genomics.ingest import require_input
from pipelines.genomics.outputs import EMBEDDINGS_SCHEMA, write_places
from pipelines.genomics.predict import ModelRun
from pipelines.genomics.progress import track
from pipelines.genomics.selection import (
    Intervals,
    Selection,
    Windows,
    check_settings,
    select_intervals,
)
from pipelines.shared.asides import aside_of
from pipelines.shared.batch import TokenBudgetBatches, pack
from pipelines.shared.errors import InputError
from pipelines.shared.record import RunState, finish_run, open_run
from pipelines.shared.tables import write_failures, write_table

PER = ("sequence", "base")


def embed(config: dict[str, Any]) -> int:
    """Embed every record or interval; 0, or 3 if some fell out and are listed."""
    require_input(config)
    config = {**config, "outputs": ["embeddings"]}
    check_settings(config)
    if config["per"] not in PER:
        raise InputError(f"per is {' or '.join(PER)}; got {config['per']!r}")
    return _EmbeddingRun(config).embed()


class _EmbeddingRun(ModelRun):
    """Vectors of the sequences of a run."""

    needs_task = False

    def embed(self) -> int:
        selection = select_intervals(self.config, self.store)
        intervals, table = Intervals(self.store, selection.placed), selection.table
        self._refuse_uneven()
        windows = self._windows(intervals, table["id"].tolist())
        for note in selection.notes:
            print(f"note: {note}")
        print(f"{len(table):,} sequences, {len(windows):,} windows")
        if self.config["dry_run"]:
            print("dry run: nothing is embedded")
            return 3 if selection.failures else 0
        record = {**self.config, "data": self.store.fingerprint, "model": self.model_digest,
                  "chosen": table.to_csv(index=False)}  # fmt: skip
        if open_run(self.out, record) is RunState.FINISHED:
            print(f"{self.out} holds these vectors already; give another out= to repeat them")
            return 0
        return self._write(selection, windows, intervals)

    def _refuse_uneven(self) -> None:
        """Raise InputError where a base has no token of its own, if bases are asked for."""
        words = self.tokenizer.config["kind"] != "base" or self.network.stem_stride != 1
        if self.config["per"] == "base" and words:
            raise InputError(
                f"{self.config['ckpt']} makes a token of several bases: per=base has no vectors of "
                "single ones; use per=sequence"
            )

    def _write(self, selection: Selection, windows: Windows, intervals: Intervals) -> int:
        lengths = (
            intervals.lengths if self.config["per"] == "base" else np.ones_like(intervals.lengths)
        )
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        dim = self.network.config["dim"]
        assert isinstance(dim, int), "a network has a number of channels"
        path = self.out / "embeddings.zarr"
        aside = aside_of(path)
        group = zarr.create_group(aside)
        target = group.create_array(
            "embeddings", shape=(int(offsets[-1]), dim), dtype="float32", chunks=(4096, dim)
        )
        group.create_array("offsets", data=offsets)
        write_places(group, selection.table)
        group.attrs.update({"schema": EMBEDDINGS_SCHEMA, "per": self.config["per"]})
        for record, rows in track(
            self._by_sequence(windows, intervals), total=len(selection.table), label="embed",
            unit="sequences",
        ):  # fmt: skip
            target[offsets[record] : offsets[record + 1]] = rows
        shutil.rmtree(path, ignore_errors=True)
        os.replace(aside, path)
        write_table(self.out / "sequences.tsv", selection.table)
        write_failures(self.out / "failures.csv", selection.failures, id_column="id")
        finish_run(self.out, {"sequences": len(selection.table), "rows": int(offsets[-1])})
        print(f"embeddings   {path}")
        return 3 if selection.failures else 0

    def _by_sequence(
        self, windows: Windows, intervals: Intervals
    ) -> Iterator[tuple[int, Float[ndarray, "K E"]]]:
        """Yield each sequence's vectors: its bases', or their mean; overlaps are averaged."""
        record, total, count = 0, np.zeros((0, 0)), np.zeros(0)
        for window, vectors in self._by_window(windows):
            owner, start = int(windows.records[window]), int(windows.starts[window])
            if owner != record or not total.size:
                if total.size:
                    yield record, self._finished(total, count)
                record = owner
                total = np.zeros((int(intervals.lengths[owner]), vectors.shape[1]))
                count = np.zeros(len(total))
            total[start : start + len(vectors)] += vectors
            count[start : start + len(vectors)] += 1
        if total.size:
            yield record, self._finished(total, count)

    def _finished(
        self, total: Float[ndarray, "T E"], count: Float[ndarray, "T"]
    ) -> Float[ndarray, "K E"]:
        known = count > 0  # words and strides have fewer tokens than bases
        mean = total[known] / count[known, None]
        return mean if self.config["per"] == "base" else mean.mean(axis=0, keepdims=True)

    @torch.inference_mode()
    def _by_window(self, windows: Windows) -> Iterator[tuple[int, Float[ndarray, "L E"]]]:
        """Yield the tokens of each window, in order, as the encoder leaves them."""
        network, device = self.network.to(self.config["device"]).eval(), self.config["device"]
        for indices in TokenBudgetBatches(windows.lengths, self.config["max_tokens"]):
            batch = pack([windows[index] for index in indices])
            found = network.encode(batch.to(device)).float().cpu()
            tokens = -(-batch.lengths // network.stem_stride)
            parts = found.split(tokens.tolist())
            yield from ((index, part.numpy()) for index, part in zip(indices, parts, strict=True))
