"""`saliency`: which bases a score hangs on, as tables, maps and sequence logos.

saliency.tsv     a row for each base that was asked for, with its place in the sequences
saliency.zarr    bases uint8 [N], mutagenesis and gradient float32 [N, 4] (A C G T), offsets int64
                 [R + 1] of the sequences along N, and their ids
logos/NAME.png   both, drawn
"""

import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import zarr
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure
from numpy import ndarray

from pipelines.genomics.alphabet import decode
from pipelines.genomics.attribution import (
    Score,
    importance,
    input_gradient,
    mutate_in_silico,
    own_gradient,
)
from pipelines.genomics.ingest import require_input
from pipelines.genomics.predict import ModelRun
from pipelines.genomics.progress import track
from pipelines.genomics.selection import Intervals, check_settings, select_intervals
from pipelines.genomics.tasks import name_outputs, score_of
from pipelines.shared.asides import aside_of
from pipelines.shared.errors import InputError
from pipelines.shared.objective import Classification
from pipelines.shared.record import RunState, finish_run, open_run
from pipelines.shared.tables import Failure, write_failures, write_table

SCHEMA = "gigasparse-saliency/1"
_LOGO_BASES = 100
"""As many bases as a logo has room for: those around the most important one."""


def saliency(config: dict[str, Any]) -> int:
    """Map the chosen sequences; 0, or 3 if some fell out and are listed."""
    require_input(config)
    config = {**config, "outputs": ["tsv"]}
    check_settings(config)
    if config["focus"] is not None and config["focus"] < 1:
        raise InputError(f"focus is a number of bases, 1 or more; got {config['focus']}")
    if config["logos"] < 0:
        raise InputError(f"logos is a number of pictures; got {config['logos']}")
    return _SaliencyRun(config).map_sequences()


@dataclass(frozen=True, slots=True, eq=False)
class Mapped:
    """One sequence and what its bases add to the score."""

    bases: UInt8[ndarray, "T"]
    mutagenesis: Float[ndarray, "T 4"]
    gradient: Float[ndarray, "T 4"]

    def tracks(self) -> dict[str, Float[ndarray, "T"]]:
        """What each base adds, by both ways."""
        return {
            "mutagenesis": importance(self.mutagenesis),
            "gradient": own_gradient(self.gradient, self.bases),
        }


class _SaliencyRun(ModelRun):
    """Maps of the sequences or intervals of a run."""

    def map_sequences(self) -> int:
        if self.tokenizer.config["kind"] != "base":
            raise InputError(
                f"{self.config['ckpt']} reads words, not bases: saliency needs tokenizer=base"
            )
        column = self._column()
        selection = select_intervals(self.config, self.store)
        intervals = Intervals(self.store, selection.placed)
        fits = intervals.lengths <= self.context
        failures = [*selection.failures, *self._too_long(selection.table["id"][~fits])]
        rows = np.flatnonzero(fits)
        for note in selection.notes:
            print(f"note: {note}")
        asked = [self._positions(int(intervals.lengths[row])) for row in rows]
        print(f"{len(rows):,} sequences, {3 * sum(map(len, asked)):,} changed bases")
        if self.config["dry_run"]:
            print("dry run: nothing is computed")
            return 3 if failures else 0
        if len(rows) == 0:
            raise InputError(f"no sequence fits the model's {self.context:,} bases; give width=")
        if not self._begin(selection.table):
            return 0
        write_failures(self.out / "failures.csv", failures, id_column="id")
        jobs = list(zip(rows.tolist(), asked, strict=True))
        mapped = [
            self._map(intervals, row, positions, column)
            for row, positions in track(jobs, total=len(jobs), label="saliency", unit="sequences")
        ]
        names = selection.table["id"].iloc[rows].tolist()
        self._write(names, mapped, intervals, rows.tolist(), asked)
        finish_run(self.out, {"sequences": len(rows), "left_out": len(failures)})
        shutil.rmtree(self.out / "parts", ignore_errors=True)
        return 3 if failures else 0

    def _column(self) -> int:
        """The class, label or track whose score is mapped."""
        name, known = self.config["class"], name_outputs(self.objective)
        if name is None and len(known) == 1:
            return 0
        if name is None and len(known) == 2 and isinstance(self.objective, Classification):
            return 1
        if name is None or str(name) not in known:
            raise InputError(f"class= is one of {', '.join(known)}; got {name}")
        return known.index(str(name))

    def _score_of(self, column: int, positions: Int64[ndarray, "K"]) -> Score:
        """What is mapped; of a track, its mean over the bases that are asked for."""
        score = score_of(self.objective, column)
        return (lambda logits: score(logits[positions]).mean()) if self.along else score

    def _positions(self, length: int) -> Int64[ndarray, "K"]:
        """Which bases are changed: all, or those in the middle."""
        focus = min(self.config["focus"] or length, length)
        start = (length - focus) // 2
        return np.arange(start, start + focus)

    def _too_long(self, names: "pd.Series[str]") -> list[Failure]:
        reason = f"longer than the {self.context:,} bases that the model reads at once"
        return [
            Failure(name, str(self.config["sequences"]), "too_long", reason,
                    "give intervals= of what matters, or width=")
            for name in names
        ]  # fmt: skip

    def _begin(self, table: pd.DataFrame) -> bool:
        chosen = hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()
        record = {**self.config, "data": self.store.fingerprint, "model": self.model_digest,
                  "chosen": chosen}  # fmt: skip
        if open_run(self.out, record) is RunState.FINISHED:
            print(f"{self.out} holds these maps already; give another out= to repeat them")
            return False
        return True

    def _map(
        self, intervals: Intervals, row: int, positions: Int64[ndarray, "K"], column: int
    ) -> Mapped:
        """Map one sequence, or take it from an interrupted run."""
        kept = self.out / "parts" / f"{row}.npz"
        bases = intervals.read(row, 0, int(intervals.lengths[row]))
        if not kept.exists():
            score = self._score_of(column, positions)
            changes = mutate_in_silico(
                self.network, bases, score, positions=positions,
                max_tokens=self.config["max_tokens"], device=self.config["device"],
            )  # fmt: skip
            gradient = input_gradient(self.network, bases, score, device=self.config["device"])
            kept.parent.mkdir(exist_ok=True)
            aside = kept.with_name(f"{row}.tmp-{os.getpid()}.npz")
            np.savez(aside, mutagenesis=changes, gradient=gradient)
            os.replace(aside, kept)
        with np.load(kept, allow_pickle=False) as part:
            return Mapped(bases, part["mutagenesis"], part["gradient"])

    def _write(
        self,
        names: Sequence[str],
        mapped: Sequence[Mapped],
        intervals: Intervals,
        rows: Sequence[int],
        asked: Sequence[Int64[ndarray, "K"]],
    ) -> None:
        tables = [
            _table(name, item, intervals, row, positions)
            for name, item, row, positions in zip(names, mapped, rows, asked, strict=True)
        ]
        write_table(self.out / "saliency.tsv", pd.concat(tables, ignore_index=True))
        write_maps(self.out / "saliency.zarr", names, mapped)
        print(
            f"table        {self.out / 'saliency.tsv'}\nmaps         {self.out / 'saliency.zarr'}"
        )
        shown = zip(names[: self.config["logos"]], mapped, asked, strict=False)
        for number, (name, item, positions) in enumerate(shown):
            path = self.out / "logos" / f"{number}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.png"
            draw_logos(path, item, positions, title=name)
            print(f"logo         {path}")


def write_maps(path: Path, names: Sequence[str], mapped: Sequence[Mapped]) -> None:
    """Write the maps of all sequences, one after the other, aside and renamed."""
    aside = aside_of(path)
    group = zarr.create_group(aside)
    group.create_array("bases", data=np.concatenate([item.bases for item in mapped]))
    for kind in ("mutagenesis", "gradient"):
        joined = np.concatenate([getattr(item, kind) for item in mapped])
        group.create_array(kind, data=joined.astype(np.float32))
    offsets = np.cumsum([0, *(item.bases.size for item in mapped)])
    group.create_array("offsets", data=offsets.astype(np.int64))
    text = "".join(f"{name}\n" for name in names).encode()
    group.create_array("ids", data=np.frombuffer(text, dtype=np.uint8))
    group.attrs["schema"] = SCHEMA
    shutil.rmtree(path, ignore_errors=True)
    os.replace(aside, path)


def draw_logos(path: Path, item: Mapped, positions: Int64[ndarray, "K"], *, title: str) -> None:
    """Draw the bases as high as what they add: by mutagenesis above, by gradient below."""
    from logomaker import Logo

    tracks = item.tracks()
    strength = np.nan_to_num(np.abs(tracks["mutagenesis"][positions]))
    first, last = int(positions[0]), int(positions[-1]) + 1
    start = int(positions[strength.argmax()]) - _LOGO_BASES // 2
    start = max(first, min(start, last - _LOGO_BASES))
    shown = np.arange(start, min(start + _LOGO_BASES, last))
    figure = Figure(figsize=(max(4, 0.14 * shown.size), 4), layout="constrained")
    for axes, (kind, values) in zip(figure.subplots(2, sharex=True), tracks.items(), strict=True):
        heights = np.zeros((shown.size, 4))
        known = ~np.isnan(values[shown])
        heights[known, item.bases[shown][known] - 1] = values[shown][known]
        Logo(pd.DataFrame(heights, index=shown + 1, columns=list("ACGT")), ax=axes)
        axes.axhline(0, color="0.6", linewidth=0.5)
        axes.set_ylabel(kind)
        axes.set_xlim(shown[0] + 0.5, shown[-1] + 1.5)
        axes.margins(y=0.05)
    figure.axes[0].set_title(title)
    figure.axes[-1].set_xlabel("base")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    figure.savefig(aside, dpi=120, format="png")
    os.replace(aside, path)


def _table(
    name: str, item: Mapped, intervals: Intervals, row: int, positions: Int64[ndarray, "K"]
) -> pd.DataFrame:
    """A row per base that was asked for: where it lies (0-based), on which strand, what it adds."""
    parts = intervals.where(row, 0, item.bases.size)
    places = np.concatenate([
        np.arange(part.start, part.end)[:: -1 if part.strand == "-" else 1] for part in parts
    ])  # fmt: skip
    strands = np.repeat([part.strand for part in parts], [part.end - part.start for part in parts])
    placed = intervals.placed[row]
    tracks = {kind: values[positions].round(6) for kind, values in item.tracks().items()}
    known = {
        "id": name,
        "contig": intervals.store.ids[placed.record],
        "position": places[positions],
        "strand": strands[positions],
        "base": list(decode(item.bases[positions])),
    }
    return pd.DataFrame(known | tracks)
