"""What an ingest read, counted: `ingest_report.json` in the store."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.batches import Packed
from pipelines.genomics.genome import Ids, RawRecord
from pipelines.genomics.store import LetterCounts

_NUM_LISTED = 1000


class Counted(NamedTuple):
    """What is kept of a record for the report."""

    id: str
    label: str | None
    split: str | None
    length: int
    gc: int
    n: int
    lower: int
    n_runs: int


@dataclass(slots=True)
class Tally:
    """Counts of the records so far."""

    total: Counter[str] = field(default_factory=Counter)
    records: list[Counted] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    """Ids of records that hold T and U."""

    def add(self, raw: RawRecord, packed: Packed) -> None:
        """Count one more record; its letters are counted with those of its batch."""
        counts, length = packed.counts, packed.length
        n = n_runs = 0
        if packed.others.size:
            n, n_runs = counts.get("N", 0), int((packed.others[:, 2] == _N).sum())
        lower = counts.get("lower", 0)
        row = Counted(raw.id, raw.label, raw.split, length, packed.gc, n, lower, n_runs)
        self.records.append(row)
        if 0 < counts.get("uracil", 0) < counts.get("T", 0):
            self.mixed.append(raw.id)

    def drop(self, packed: Packed) -> None:
        """Take the letters of a record that was counted with its batch out again."""
        self.total.subtract(packed.counts)

    def counts(self) -> LetterCounts:
        """The counts that a store carries along."""
        return LetterCounts(
            records=len(self.records),
            bases=sum(record.length for record in self.records),
            n=self.total["N"],
            iupac=sum(self.total[letter] for letter in LETTERS[5:]),
            lower=self.total["lower"],
            uracil=self.total["uracil"],
        )

    def report(self, digests: Sequence[bytes], names: Ids) -> dict[str, Any]:
        """Put together the report's counts, extremes, copies and conflicts."""
        copies = self._copies(digests)
        labels, splits = self._column("label"), self._column("split")
        conflicts = [places for places in copies if len(_values(labels, places)) > 1]
        leaks = [places for places in copies if len(_values(splits, places)) > 1]
        lengths = np.array(self._column("length"))
        return {
            "records": len(self.records),
            "bases": int(lengths.sum()),
            "letters": {letter: self.total[letter] for letter in LETTERS if self.total[letter]},
            "read_otherwise": {
                "lower_case": self.total["lower"],
                "uracil_as_t": self.total["uracil"],
                "iupac_as_n": self.total["iupac"],
                "others_as_n": self.total["others"],
                "gaps_left_out": self.total["gaps"],
                "digits_left_out": self.total["digits"],
                "blanks_left_out": self.total["whitespace"],
            },
            "t_and_u": {"records": len(self.mixed), "ids": self.mixed[:_NUM_LISTED]},
            "n_runs": sum(self._column("n_runs")),
            "lengths": _spread(lengths),
            "extremes": self._extremes(),
            "labels": self._by_split(),
            "repeated_ids": {
                "count": len(names.repeated),
                "places": [places for _, places in names.repeated[:_NUM_LISTED]],
            },
            "copies": {
                "sequences": len(copies),
                "records": sum(map(len, copies)),
                "across_splits": len(leaks),
                "ids": [
                    [self.records[place].id for place in places] for places in copies[:_NUM_LISTED]
                ],
            },
            "conflicts": [self._conflict(places) for places in conflicts],
        }

    def _extremes(self) -> dict[str, dict[str, object]]:
        names = ("length", "gc", "n", "lower", "n_runs")
        lengths, gc, n, lower, n_runs = (np.array(self._column(name)) for name in names)
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
            name: {"id": self.records[place].id, "value": round(values[place].item(), 6)}
            for name, (values, place) in found.items()
            if values[place] > 0
        }

    def _by_split(self) -> dict[str, dict[str, int]]:
        """Records of each label in each split; a place for those that have none."""
        labels, splits = self._column("label"), self._column("split")
        if not any(labels) and not any(splits):
            return {}
        table: dict[str, Counter[str]] = defaultdict(Counter)
        for label, split in zip(labels, splits, strict=True):
            table[split or "all"][label or "no label"] += 1
        return {split: dict(counts.most_common(_NUM_LISTED)) for split, counts in table.items()}

    def _copies(self, digests: Sequence[bytes]) -> list[list[int]]:
        places: dict[bytes, list[int]] = defaultdict(list)
        for place, digest in enumerate(digests):
            places[digest].append(place)
        return [found for found in places.values() if len(found) > 1]

    def _column(self, name: str) -> list[Any]:
        return list(map(attrgetter(name), self.records))

    def _conflict(self, places: Sequence[int]) -> dict[str, list[str | None]]:
        found = [self.records[place] for place in places]
        return {
            "ids": [record.id for record in found],
            "labels": [record.label for record in found],
            "splits": [record.split for record in found],
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
