"""What a test split shares with the records that a model is trained on or chosen by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int64, UInt64
from numpy import ndarray

from pipelines.genomics.alphabet import reverse_complement
from pipelines.genomics.collection import Collection
from pipelines.genomics.duplicates import digest
from pipelines.genomics.similarity import (
    LEAK_K,
    choose_sampling,
    collect_words,
    shared_words,
)

PAIRS = (("test", "train"), ("val", "train"), ("test", "val"))
"""What is held against what."""

SHORT = 1_000
"""Bases of a record of which one shared word is a leak; of a longer one, a share of its words."""
CONTAINED = (0.9, 0.3)
FEW = 30
"""Items that are too few to score a model by."""

_ANY = "any of these"
_MOST_WORDS = 400_000_000
"""Words in memory at a time: of more, a sample."""


@dataclass(frozen=True, slots=True)
class Leaks:
    """What leaks between splits: an item's findings, and their numbers by criterion."""

    items: pd.DataFrame
    """A row for each item that leaks: split, against, id, label, length, and of which item it is a
    copy (`identical_to`), the other strand (`reverse_complement_of`), an overlap (`overlaps`), and
    which share of its 50-mers stand there (`shared_50mers`)."""
    counts: pd.DataFrame
    """A row for each pair of splits, label (empty: all) and criterion: items, found, remaining."""
    notes: list[str]

    def __bool__(self) -> bool:
        return not self.items.empty

    def text(self) -> str:
        """Say it in lines."""
        if self.counts.empty:
            return "no leak report: it needs splits (train and test)"
        lines = []
        pairs = self.counts.groupby(["split", "against"], sort=False)
        for (split, against), table in pairs:
            items = int(table["items"].iloc[0])
            lines.append(f"{split} against {against}: {items:,} items")
            lines += [f"  {line}" for line in _aligned(table)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def find_leaks(collection: Collection, *, progress: bool = False) -> Leaks:
    """Hold each split against those that come before it.

    Items count as leaking where they are another one's copy, on either strand; where their
    coordinates overlap (intervals); of up to 1,000 bases, where they share a word of 50 bases
    with any item there, on either strand; of more, where at least 0.3 of their 50-mers stand
    there (in all items together, which is at least what stands in the nearest one). Without
    sequence, intervals are compared by their coordinates alone.
    """
    table = collection.table
    if "split" not in table:
        return Leaks(pd.DataFrame(columns=_COLUMNS), pd.DataFrame(), [])
    items, counts, notes = [], [], []
    known = _Known(collection, progress=progress)
    for split, against in PAIRS:
        later = np.flatnonzero(table["split"] == split)
        earlier = np.flatnonzero(table["split"] == against)
        if not (later.size and earlier.size):
            continue
        found = _Comparison(known, later, earlier, against)
        notes += found.notes
        items.append(found.items(split, against))
        counts += found.counts(split, against)
    return Leaks(
        pd.concat(items, ignore_index=True) if items else pd.DataFrame(columns=_COLUMNS),
        pd.DataFrame(counts),
        list(dict.fromkeys(notes)),
    )


class _Known:
    """What is computed of the items once, however many pairs of splits are compared."""

    def __init__(self, collection: Collection, *, progress: bool) -> None:
        self.collection, self.progress = collection, progress
        self.sampled = choose_sampling(collection.lengths, _MOST_WORDS)
        self._words: dict[str, ndarray] = {}

    @cached_property
    def digests(self) -> tuple[list[bytes], list[bytes]]:
        """Digests of each item, as it stands and of the other strand."""
        read = self.collection.sequences.read
        pairs = [
            (digest(tokens), digest(reverse_complement(tokens)))
            for tokens in (read(record) for record in self.collection.records.tolist())
        ]
        return [one for one, _ in pairs], [other for _, other in pairs]

    def words(self, split: str, rows: Int64[ndarray, "M"]) -> UInt64[ndarray, "V"]:
        """Ascending words of a split's items."""
        if split not in self._words:
            found = collect_words(
                self.collection.sequences,
                self.collection.records[rows],
                LEAK_K,
                sampled=self.sampled,
                progress=f"{LEAK_K}-mers of {split}" if self.progress else None,
            ).hashes
            found.sort()
            self._words[split] = found
        return self._words[split]


class _Comparison:
    """Items of one split (`later`) held against those of another (`earlier`)."""

    def __init__(
        self,
        known: _Known,
        later: Int64[ndarray, "L"],
        earlier: Int64[ndarray, "M"],
        against: str,
    ) -> None:
        collection = known.collection
        table = collection.table
        self.table = table.iloc[later]
        self.lengths = collection.lengths[later]
        self.notes: list[str] = []
        nowhere = np.full(later.size, -1)
        self.identical = self.reversed = self.overlapping = nowhere
        self.share: ndarray | None = None
        self.ids = table["id"].to_numpy()
        self.has_coordinates = "contig" in table
        if self.has_coordinates:
            places = table[["contig", "start", "end", "strand"]]
            self.identical = _first_equal(places.iloc[later], places.iloc[earlier], earlier)
            self.overlapping = overlaps(places.iloc[later], places.iloc[earlier], earlier)
        if collection.store is None:
            return
        copies, self.reversed = _copies(known, later, earlier)
        self.identical = np.where(self.identical >= 0, self.identical, copies)
        words, shared = shared_words(
            collection.store,
            collection.records[later],
            known.words(against, earlier),
            LEAK_K,
            sampled=known.sampled,
            progress="compared" if known.progress else None,
        )
        self.share = shared / np.maximum(words, 1)
        if known.sampled > 1:
            self.notes.append(
                f"one {LEAK_K}-mer in {known.sampled} was looked at: items that share few are not "
                "all found"
            )

    def criteria(self) -> Iterator[tuple[str, Bool[ndarray, "L"]]]:
        """Name each criterion, and the items that it holds for; the last one is any of them."""
        leaking = (self.identical >= 0) | (self.reversed >= 0) | (self.overlapping >= 0)
        yield "identical", self.identical >= 0
        if self.share is not None:
            yield "reverse complement", self.reversed >= 0
        if self.has_coordinates:
            yield "overlapping", self.overlapping >= 0
        if self.share is not None:
            yield f"share a {LEAK_K}-mer", self.share > 0
            long = self.lengths > SHORT
            if long.any():
                for least in CONTAINED:
                    yield f"{least:.0%} of {LEAK_K}-mers shared", long & (self.share >= least)
            leaking |= np.where(long, self.share >= min(CONTAINED), self.share > 0)
        yield _ANY, leaking

    def counts(self, split: str, against: str) -> list[dict[str, object]]:
        """Count by criterion, all together and (where there are labels) by label."""
        labels: list[str | None] = [None]
        if "label" in self.table:
            labels += sorted(self.table["label"].unique())
        rows = []
        for label in labels:
            of = np.ones(len(self.table), bool) if label is None else self.table["label"] == label
            total = int(np.sum(of))
            for name, found in self.criteria():
                count = int(np.sum(found & np.asarray(of)))
                rows.append(
                    {
                        "split": split,
                        "against": against,
                        "label": label or "",
                        "criterion": name,
                        "items": total,
                        "found": count,
                        "share": count / total,
                        "remaining": total - count,
                    }
                )
        return rows

    def items(self, split: str, against: str) -> pd.DataFrame:
        """List the items that any criterion holds for."""
        every = dict(self.criteria())
        chosen = np.logical_or.reduce(list(every.values()))
        rows = self.table[chosen]
        names = {
            "identical_to": self.identical,
            "reverse_complement_of": self.reversed,
            "overlaps": self.overlapping,
        }
        result = pd.DataFrame({"split": split, "against": against, "id": rows["id"].to_numpy()})
        result["label"] = rows["label"].to_numpy() if "label" in rows else ""
        result["length"] = self.lengths[chosen]
        for column, places in names.items():
            at = places[chosen]
            result[column] = np.where(at >= 0, self.ids[at], "")
        result["shared_50mers"] = "" if self.share is None else self.share[chosen].round(4)
        result["leaks"] = every[_ANY][chosen]
        return result[_COLUMNS]


_COLUMNS = [
    "split", "against", "id", "label", "length", "identical_to", "reverse_complement_of",
    "overlaps", "shared_50mers", "leaks",
]  # fmt: skip


def overlaps(
    later: pd.DataFrame, earlier: pd.DataFrame, places: Int64[ndarray, "M"]
) -> Int64[ndarray, "L"]:
    """Name for each interval one of `earlier` that shares a base with it, strands aside; or -1.

    Columns contig, start and end (0-based, half-open); `places` are the names of `earlier`. Of
    those that begin before an interval ends, the one that reaches furthest tells.
    """
    found = np.full(len(later), -1, dtype=np.int64)
    known = {
        contig: np.flatnonzero(earlier["contig"] == contig) for contig in earlier["contig"].unique()
    }
    starts, ends = (earlier[column].to_numpy(dtype=np.int64) for column in ("start", "end"))
    for contig, rows in later.reset_index(drop=True).groupby("contig", sort=False):
        there = known.get(contig)
        if there is None:
            continue
        there = there[np.argsort(starts[there], kind="stable")]
        reach = np.maximum.accumulate(ends[there])
        furthest = np.maximum.accumulate(np.where(ends[there] == reach, np.arange(there.size), 0))
        before = np.searchsorted(starts[there], rows["end"].to_numpy(), side="left") - 1
        hit = (before >= 0) & (reach[before] > rows["start"].to_numpy())
        found[rows.index[hit]] = places[there[furthest[before[hit]]]]
    return found


def _first_equal(
    later: pd.DataFrame, earlier: pd.DataFrame, places: Int64[ndarray, "M"]
) -> Int64[ndarray, "L"]:
    """Name for each row of `later` the first equal row of `earlier`; or -1."""
    columns = list(later.columns)
    known = earlier.assign(place=places).drop_duplicates(columns)
    merged = later.merge(known, on=columns, how="left")
    return merged["place"].fillna(-1).to_numpy(dtype=np.int64)


def _copies(
    known: _Known, later: Int64[ndarray, "L"], earlier: Int64[ndarray, "M"]
) -> tuple[Int64[ndarray, "L"], Int64[ndarray, "L"]]:
    """Name for each item one of `earlier` with its bases, and one with the other strand's."""
    own, opposite = known.digests
    there: dict[bytes, int] = {}
    for row in earlier.tolist():
        there.setdefault(own[row], row)
    same = [there.get(own[row], -1) for row in later.tolist()]
    turned = [there.get(opposite[row], -1) for row in later.tolist()]
    return np.array(same, dtype=np.int64), np.array(turned, dtype=np.int64)


def _aligned(table: pd.DataFrame) -> list[str]:
    rows: list[Sequence[str]] = []
    for row in table.itertuples():
        few = f"  fewer than {FEW}: too few" if row.remaining < FEW else ""
        name = f"{row.criterion} ({row.label})" if row.label else str(row.criterion)
        rows.append((name, f"{row.found:,}", f"{row.share:.1%}", f"{row.remaining:,} remain{few}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{name.ljust(widths[0])}  {found.rjust(widths[1])}  {share.rjust(widths[2])}  {rest}"
        for name, found, share, rest in rows
    ]
