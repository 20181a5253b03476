"""What an ingest read, counted: `ingest_report.json` in the store."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.batches import COUNTED, Batch
from pipelines.genomics.genome import Ids
from pipelines.genomics.store import LetterCounts

_NUM_LISTED = 1000


@dataclass(slots=True)
class Tally:
    """Counts of the records so far; lists and columns run in parallel."""

    ids: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    """Ids of records that hold T and U."""
    _total: Int64[ndarray, "C"] = field(default_factory=lambda: np.zeros(len(COUNTED), np.int64))
    _columns: list[Int64[ndarray, "5 R"]] = field(default_factory=list)

    def add(self, batch: Batch) -> None:
        """Count more records."""
        self.ids += [raw.id for raw in batch.raws]
        self.labels += [raw.label for raw in batch.raws]
        self.splits += [raw.split for raw in batch.raws]
        self._total += batch.counts.sum(axis=0)
        n_runs = np.zeros_like(batch.lengths)
        for place, runs in batch.others.items():
            n_runs[place] = (runs[:, 2] == _N).sum()
        count = dict(zip(COUNTED, batch.counts.T, strict=True))
        self._columns.append(
            np.stack([batch.lengths, count["G"] + count["C"], count["N"], count["lower"], n_runs])
        )
        mixed = np.flatnonzero((count["uracil"] > 0) & (count["uracil"] < count["T"]))
        self.mixed += [batch.raws[place].id for place in mixed]

    @property
    def total(self) -> dict[str, int]:
        """How often each of `COUNTED` was found."""
        return dict(zip(COUNTED, self._total.tolist(), strict=True))

    def counts(self) -> LetterCounts:
        """The counts that a store carries along."""
        total = self.total
        return LetterCounts(
            records=len(self.ids),
            bases=sum(int(columns[0].sum()) for columns in self._columns),
            n=total["N"],
            iupac=sum(total[letter] for letter in LETTERS[5:]),
            lower=total["lower"],
            uracil=total["uracil"],
        )

    def report(self, digests: Sequence[bytes], names: Ids) -> dict[str, Any]:
        """Put together the report's counts, extremes, copies and conflicts."""
        total, columns = self.total, np.concatenate(self._columns, axis=1)
        copies = _copies(digests)
        conflicts = [places for places in copies if len(_values(self.labels, places)) > 1]
        leaks = [places for places in copies if len(_values(self.splits, places)) > 1]
        lengths, n_runs = columns[0], columns[-1]
        return {
            "records": len(self.ids),
            "bases": int(lengths.sum()),
            "letters": {letter: total[letter] for letter in LETTERS if total[letter]},
            "read_otherwise": {
                "lower_case": total["lower"],
                "uracil_as_t": total["uracil"],
                "iupac_as_n": total["iupac"],
                "others_as_n": total["others"],
                "gaps_left_out": total["gaps"],
                "digits_left_out": total["digits"],
                "blanks_left_out": total["whitespace"],
            },
            "t_and_u": {"records": len(self.mixed), "ids": self.mixed[:_NUM_LISTED]},
            "n_runs": int(n_runs.sum()),
            "lengths": _spread(lengths),
            "extremes": self._extremes(columns),
            "labels": self._by_split(),
            "repeated_ids": {
                "count": len(names.repeated),
                "places": [places for _, places in names.repeated[:_NUM_LISTED]],
            },
            "copies": {
                "sequences": len(copies),
                "records": sum(map(len, copies)),
                "across_splits": len(leaks),
                "ids": [[self.ids[place] for place in places] for places in copies[:_NUM_LISTED]],
            },
            "conflicts": [self._conflict(places) for places in conflicts],
        }

    def _extremes(self, columns: Int64[ndarray, "5 R"]) -> dict[str, dict[str, object]]:
        lengths, gc, n, lower, n_runs = columns
        gc = gc / np.maximum(lengths - n, 1)
        shares = {
            "shortest": (lengths, np.argmin),
            "longest": (lengths, np.argmax),
            "lowest_gc": (gc, np.argmin),
            "highest_gc": (gc, np.argmax),
            "most_n": (n / lengths, np.argmax),
            "most_lower_case": (lower / lengths, np.argmax),
            "most_n_runs": (n_runs, np.argmax),
        }
        found = {name: (values, int(pick(values))) for name, (values, pick) in shares.items()}
        return {
            name: {"id": self.ids[place], "value": round(values[place].item(), 6)}
            for name, (values, place) in found.items()
            if values[place] > 0
        }

    def _by_split(self) -> dict[str, dict[str, int]]:
        """Records of each label in each split; a place for those that have none."""
        if not any(self.labels) and not any(self.splits):
            return {}
        table: dict[str, Counter[str]] = defaultdict(Counter)
        for label, split in zip(self.labels, self.splits, strict=True):
            table[split or "all"][label or "no label"] += 1
        return {split: dict(counts.most_common(_NUM_LISTED)) for split, counts in table.items()}

    def _conflict(self, places: Sequence[int]) -> dict[str, list[str | None]]:
        return {
            "ids": [self.ids[place] for place in places],
            "labels": [self.labels[place] for place in places],
            "splits": [self.splits[place] for place in places],
        }


def notes_of(report: dict[str, Any]) -> list[str]:
    """What a user should know of a report, a line each."""
    read, copies = report["read_otherwise"], report["copies"]
    sentences = {
        "letters stood in lower case (kept as soft mask)": read["lower_case"],
        "U were read as T": read["uracil_as_t"],
        "ambiguity codes were read as N": read["iupac_as_n"],
        "unknown signs were read as N": read["others_as_n"],
        "gaps were left out": read["gaps_left_out"],
        "digits were left out": read["digits_left_out"],
        "blanks within lines were left out": read["blanks_left_out"],
        "records hold T as well as U": report["t_and_u"]["records"],
        "ids stood twice": report["repeated_ids"]["count"],
        "sequences stand more than once": copies["sequences"],
        "of them in more than one split": copies["across_splits"],
        "of them with different labels": len(report["conflicts"]),
    }
    return [f"{count:,} {text}" for text, count in sentences.items() if count]


def _copies(digests: Sequence[bytes]) -> list[list[int]]:
    """Places of equal digests, for those that stand more than once."""
    twice = {digest for digest, count in Counter(digests).items() if count > 1}
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, digest in enumerate(digests):
        if digest in twice:
            places[digest].append(place)
    return list(places.values())


def _spread(lengths: Int64[ndarray, "R"]) -> dict[str, float]:
    lengths = np.sort(lengths)[::-1]
    half = int(np.searchsorted(np.cumsum(lengths), lengths.sum() / 2))
    return {
        "min": int(lengths[-1]),
        "median": float(np.median(lengths)),
        "mean": float(lengths.mean()),
        "max": int(lengths[0]),
        "n50": int(lengths[half]),
    }


def _values(column: Sequence[str | None], places: Sequence[int]) -> set[str]:
    return {value for place in places if (value := column[place]) is not None}


_N = LETTERS.index("N") + 1
