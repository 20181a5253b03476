"""What an ingest read, counted: `ingest_report.json` in the store."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.batches import Packed
from pipelines.genomics.genome import Ids, Record
from pipelines.genomics.letters import count_letters
from pipelines.genomics.store import LetterCounts

_NUM_LISTED = 1000


@dataclass(slots=True)
class Tally:
    """Counts of the records so far; lists run in parallel, one entry a record."""

    total: Counter[str] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    splits: list[str | None] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    gc: list[int] = field(default_factory=list)
    n: list[int] = field(default_factory=list)
    lower: list[int] = field(default_factory=list)
    n_runs: list[int] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    """Ids of records that hold T and U."""

    def add(self, record: Record, packed: Packed) -> None:
        """Count one more record; its letters are counted with those of its batch."""
        counts = record.letters.counts
        self.ids.append(record.id)
        self.labels.append(record.label)
        self.splits.append(record.split)
        self.lengths.append(packed.length)
        self.gc.append(packed.gc)
        self.n.append(counts.get("N", 0))
        self.lower.append(counts.get("lower", 0))
        self.n_runs.append(_count_n_runs(packed))
        if 0 < counts.get("uracil", 0) < counts.get("T", 0):
            self.mixed.append(record.id)

    def drop(self, record: Record) -> None:
        """Take the letters of a record that was counted with its batch out again."""
        counts = record.letters.counts or count_letters(record.letters.text, b"ACGT")
        self.total.subtract(counts)

    def counts(self) -> LetterCounts:
        """The counts that a store carries along."""
        return LetterCounts(
            records=len(self.ids),
            bases=sum(self.lengths),
            n=self.total["N"],
            iupac=sum(self.total[letter] for letter in LETTERS[5:]),
            lower=self.total["lower"],
            uracil=self.total["uracil"],
        )

    def report(self, digests: Sequence[bytes], names: Ids) -> dict[str, Any]:
        """Put together the report's counts, extremes, copies and conflicts."""
        copies = self._copies(digests)
        conflicts = [places for places in copies if len(self._values(self.labels, places)) > 1]
        leaks = [places for places in copies if len(self._values(self.splits, places)) > 1]
        return {
            "records": len(self.ids),
            "bases": sum(self.lengths),
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
            "n_runs": sum(self.n_runs),
            "lengths": self._lengths(),
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
                "ids": [[self.ids[place] for place in places] for places in copies[:_NUM_LISTED]],
            },
            "conflicts": [self._conflict(places) for places in conflicts],
        }

    def _lengths(self) -> dict[str, float]:
        lengths = np.sort(np.array(self.lengths))[::-1]
        half = int(np.searchsorted(np.cumsum(lengths), lengths.sum() / 2))
        return {
            "min": int(lengths[-1]),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "max": int(lengths[0]),
            "n50": int(lengths[half]),
        }

    def _extremes(self) -> dict[str, dict[str, object]]:
        lengths = np.array(self.lengths)
        gc = np.array(self.gc) / np.maximum(lengths - np.array(self.n), 1)
        shares = {
            "shortest": (lengths, np.argmin),
            "longest": (lengths, np.argmax),
            "lowest_gc": (gc, np.argmin),
            "highest_gc": (gc, np.argmax),
            "most_n": (np.array(self.n) / lengths, np.argmax),
            "most_lower_case": (np.array(self.lower) / lengths, np.argmax),
            "most_n_runs": (np.array(self.n_runs), np.argmax),
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

    def _copies(self, digests: Sequence[bytes]) -> list[list[int]]:
        places: dict[bytes, list[int]] = defaultdict(list)
        for place, digest in enumerate(digests):
            places[digest].append(place)
        return [found for found in places.values() if len(found) > 1]

    def _values(self, column: Sequence[str | None], places: Sequence[int]) -> set[str]:
        return {value for place in places if (value := column[place]) is not None}

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


def _count_n_runs(packed: Packed) -> int:
    return int((packed.others[:, 2] == _N).sum()) if packed.others.size else 0


_N = LETTERS.index("N") + 1
