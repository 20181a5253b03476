"""One run of `train` on tracks: numbers per base learnt, scored by stretch, and written."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64, Shaped, UInt8
from matplotlib.figure import Figure
from numpy import ndarray

from pipelines.genomics.baseline import fit_around
from pipelines.genomics.study import HELD_OUT, Result, Study, score_targets
from pipelines.genomics.track_files import Signals
from pipelines.genomics.track_task import Tracks, TrackWindows
from pipelines.genomics.tracks import Track, join_equal, write_bedgraph
from pipelines.shared.asides import aside_of
from pipelines.shared.evaluation import score
from pipelines.shared.inference import Prediction
from pipelines.shared.metrics import JointPredictions
from pipelines.shared.objective import Outputs
from pipelines.shared.saved_predictions import MODEL, table_of_track

Values = Float[ndarray, "T K"]
_DRAWN = 4
_COLOURS = ("#4d4d4d", "#0b5fa5")


class TrackStudy(Study):
    """Items with numbers along their bases; outputs are those of all bases, item after item.

    Scores resample stretches: pieces of up to `context` bases of an item.
    """

    targets: Signals
    objective: Tracks
    without = ("cnn",)
    resampled, targets_are = "stretches of bases", "track"

    @cached_property
    def items(self) -> dict[int, int]:
        """The row of each record of the store."""
        return {int(record): row for row, record in enumerate(self.records)}

    def _examples(self, split: str, *, name: str = MODEL, augment: bool = False) -> TrackWindows:
        windows = self._windows(split, name=name, augment=augment)
        return TrackWindows(windows, self.targets, self.items)

    def _window_targets(self, rows: Int64[ndarray, " K"]) -> Shaped[ndarray, "K ..."] | None:
        return None

    def _lengths(self, split: str) -> list[int]:
        lengths: list[int] = self.store.lengths[self.records[self.rows[split]]].tolist()
        return lengths

    def _truth(self, split: str) -> list[Values]:
        pairs = zip(self.rows[split].tolist(), self._lengths(split), strict=True)
        return [self.targets.read(row, 0, length) for row, length in pairs]

    def _gather(self, split: str, predictions: Iterable[Prediction]) -> Outputs:
        """Average the windows over each base."""
        windows = self._windows(split)
        total = {row: np.zeros((length, self.objective.num_outputs)) for row, length in zip(
            self.rows[split].tolist(), self._lengths(split), strict=True)}  # fmt: skip
        count = {row: np.zeros((len(part), 1)) for row, part in total.items()}
        for index, found in enumerate(predictions):
            row = self.items[int(windows.records[index])]
            span = slice(int(windows.starts[index]), int(windows.ends[index]))
            total[row][span] += found.logits.double().numpy()
            count[row][span] += 1
        return np.concatenate([total[row] / count[row] for row in self.rows[split].tolist()])

    def _constant_outputs(self) -> dict[str, Outputs]:
        return {
            split: np.zeros((sum(self._lengths(split)), self.objective.num_outputs))
            for split in HELD_OUT
        }

    def _kmer_outputs(self) -> dict[str, Outputs]:
        """Ridge regression on the bases around each base."""
        means, spreads = np.array(self.objective.means), np.array(self.objective.spreads)

        def standardised(split: str) -> Iterator[tuple[UInt8[ndarray, " T"], Values]]:
            for bases, values in zip(self._bases(split), self._truth(split), strict=True):
                yield bases, (values - means) / spreads

        linear = fit_around(standardised("train"), both_strands=self.config["rc"] != "none")
        return {
            split: np.concatenate([linear.predict(bases) for bases in self._bases(split)])
            for split in HELD_OUT
        }

    def _bases(self, split: str) -> Iterator[UInt8[ndarray, " T"]]:
        return (self.store.read(int(record)) for record in self.records[self.rows[split]])

    def _score(self, outputs: dict[str, Outputs]) -> Result:
        stretches = self._stretches("test")
        found = self._sum_up("test", outputs["test"])
        kept = np.flatnonzero(~stretches["item"].isin(self._leaking).to_numpy())
        groups = stretches["group"].tolist()
        clean = {}
        if 0 < len(kept) < len(stretches):
            clean = score(found.take(kept), groups=[groups[row] for row in kept])
        scores = score(found, groups=groups)
        return Result(self.objective, outputs, scores, clean, score_targets(found, groups))

    def _sum_up(self, split: str, outputs: Outputs) -> JointPredictions:
        bounds = np.cumsum(self._lengths(split))[:-1]
        said = np.split(outputs, bounds)
        spans = [self._pieces(length) for length in self._lengths(split)]
        cut = [
            [part[start:end] for part, pieces in zip(parts, spans, strict=True)
             for start, end in pieces]
            for parts in (self._truth(split), said)
        ]  # fmt: skip
        return self.objective.sum_up(*cut)

    def _pieces(self, length: int) -> list[tuple[int, int]]:
        """Cut an item into stretches of up to `context` bases, of about one length."""
        count = -(-length // self.config["context"])
        edges = np.linspace(0, length, count + 1).round().astype(int).tolist()
        return list(pairwise(edges))

    def _stretches(self, split: str) -> pd.DataFrame:
        """A row for each stretch: where it lies, of which item; groups are items cut into none."""
        rows = []
        for row, length in zip(self.rows[split].tolist(), self._lengths(split), strict=True):
            known = self.table.iloc[row]
            pieces = self._pieces(length)
            for start, end in pieces:
                whole = len(pieces) == 1
                name = known["id"] if whole else f"{known['id']}:{start}-{end}"
                contig, low, high, strand = self.targets.locate(row, start, end)
                rows.append((name, known["id"], known["group"] if whole else name, split,
                             contig, low, high, strand))  # fmt: skip
        columns = ["id", "item", "group", "split", "contig", "start", "end", "strand"]
        return pd.DataFrame(rows, columns=columns)

    def _predictions(self, result: Result) -> pd.DataFrame:
        """A row for each stretch of every held-out item: moments of each track."""
        parts = []
        for split in HELD_OUT:
            table = self._stretches(split)
            found = self._sum_up(split, result.outputs[split])
            columns = [table_of_track(name, part) for name, part in found.parts.items()]  # type: ignore[arg-type]
            parts.append(pd.concat([table, *columns], axis=1))
        return pd.concat(parts, ignore_index=True)

    def _write(self, results: dict[str, Result]) -> None:
        """Write the model's numbers of the test bases as bedGraph, and a picture of some."""
        said = self.objective.numbers(results[MODEL].outputs["test"])
        for column, name in enumerate(self.objective.names):
            path = self.out / "tracks" / f"{name}.bedgraph"
            track, contigs = self._track(said[:, column])
            write_bedgraph(path, track, contigs, name=f"predicted {name}")
            draw_track(self.out / "tracks" / f"{name}.png", *self._shown(said, column), name=name)
        super()._write(results)

    def _track(self, values: Float[ndarray, " N"]) -> tuple[Track, list[str]]:
        """Numbers of the test items' bases, where they lie on their contigs."""
        rows = self.rows["test"].tolist()
        contigs = list(dict.fromkeys(self.targets.locate(row, 0, 0)[0] for row in rows))
        places: dict[str, list[tuple[Int64[ndarray, " T"], Float[ndarray, " T"]]]] = {}
        first = 0
        for row, length in zip(rows, self._lengths("test"), strict=True):
            contig, low, high, strand = self.targets.locate(row, 0, length)
            part = values[first : first + length]
            bases = np.arange(low, high)
            places.setdefault(contig, []).append((bases, part[::-1] if strand == "-" else part))
            first += length
        tracks = []
        for number, name in enumerate(contigs):
            bases, found = (np.concatenate(column) for column in zip(*places[name], strict=True))
            tracks.append(join_equal(number, bases, found))
        return Track.of(tracks), contigs

    def _shown(
        self, said: Values, column: int
    ) -> tuple[list[str], list[tuple[Float[ndarray, " T"], Float[ndarray, " T"]]]]:
        """Of the test stretches those in which the truth varies most."""
        stretches = self._stretches("test")
        bounds = np.cumsum(self._lengths("test"))[:-1]
        pairs = [
            (true[start:end, column], part[start:end, column])
            for true, part in zip(self._truth("test"), np.split(said, bounds), strict=True)
            for start, end in self._pieces(len(true))
        ]
        spread = [np.nanstd(true) if (~np.isnan(true)).any() else 0.0 for true, _ in pairs]
        chosen = np.argsort(spread)[::-1][:_DRAWN]
        return [str(stretches["id"].iloc[row]) for row in chosen], [pairs[row] for row in chosen]


def draw_track(
    path: Path,
    titles: list[str],
    pairs: list[tuple[Float[ndarray, " T"], Float[ndarray, " T"]]],
    *,
    name: str,
) -> None:
    """Draw true and predicted numbers along some stretches."""
    figure = Figure(figsize=(9, 1.7 * len(pairs) + 0.6), layout="constrained")
    for axes, title, values in zip(
        np.ravel(figure.subplots(len(pairs), squeeze=False)), titles, pairs, strict=True
    ):
        for colour, what, line in zip(_COLOURS, ("true", "predicted"), values, strict=True):
            axes.plot(line, color=colour, linewidth=1, label=what)
        axes.set_title(title, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper right")
    figure.axes[-1].set_xlabel(f"base; {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    figure.savefig(aside, dpi=110, format="png")
    aside.replace(path)
