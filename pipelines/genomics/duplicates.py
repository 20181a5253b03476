"""Copies among records: the same bases, read from either strand, dealt with before the split."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import reverse_complement
from pipelines.genomics.store import SequenceStore
from pipelines.shared.errors import InputError

Policy = Literal["error", "remove", "allow"]
POLICIES = get_args(Policy)

_NUM_SHOWN = 20
_RANK = {"test": 0, "val": 1, "train": 2}
"""Of two copies in given splits, the one in the lower rank stays."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The records that a run is about; the lists run in parallel."""

    ids: list[str]
    labels: list[str]
    groups: list[str]
    """What must stay in one split."""
    given: list[str] | None
    """The splits of the table, where it has them."""

    def __post_init__(self) -> None:
        columns = [self.ids, self.labels, self.groups, self.given or self.ids]
        if len({len(column) for column in columns}) > 1:
            raise ValueError(f"one value a record; got {[len(column) for column in columns]}")


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of the copies: which records are left, and in which groups."""

    kept: Int64[ndarray, "K"]
    """Places of the records that are left, in order."""
    groups: list[str]
    """Their groups."""
    table: pd.DataFrame
    """A row for each record with an earlier or better placed copy: id, label, split, copy_of,
    status (duplicate: removed; grouped; kept) and reason."""
    notes: list[str]
    """What to tell the user, a line each."""


def find_copies(
    store: SequenceStore, records: Sequence[int] | Int64[ndarray, "R"]
) -> list[list[int]]:
    """List the places in `records` of each sequence that occurs more than once.

    A record and its reverse complement count as the same. Letter case does not matter, and U is
    read as T: the store holds neither. Places ascend, and the lists by their first place.
    """
    chosen = [int(record) for record in records]
    lengths = Counter(int(store.lengths[record]) for record in chosen)
    places: dict[bytes, list[int]] = defaultdict(list)
    for place, record in enumerate(chosen):
        if lengths[int(store.lengths[record])] > 1:
            places[digest_either_strand(store.read(record))].append(place)
    return [found for found in places.values() if len(found) > 1]


def digest_either_strand(tokens: UInt8[ndarray, "T"]) -> bytes:
    """Name a sequence by 16 bytes that its reverse complement has too."""
    return min(digest(tokens), digest(reverse_complement(tokens)))


def digest(tokens: UInt8[ndarray, "T"]) -> bytes:
    """Name a sequence, as it stands, by 16 bytes."""
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def settle_copies(copies: Sequence[Sequence[int]], chosen: Chosen, policy: Policy) -> Settled:
    """Keep the copies that `find_copies` found out of different splits, or leave them be.

    "error": where splits are given and copies stand in different ones, InputError lists them; else
    their groups are united, so that they come into one split. "remove" leaves the first of copies
    with one label and none where labels contradict each other; where splits are given, all test
    records stay, so that scores compare with those of others, and copies of them leave val and
    train, as copies of val leave train. "allow" changes nothing.
    """
    if policy == "remove":
        return _remove(copies, chosen)
    if policy == "allow":
        return _left_alone(copies, chosen, chosen.groups, "kept")
    pairs = [(members[0], other) for members in copies for other in members[1:]]
    require_apart(pairs, chosen, "the same sequence")
    return _left_alone(copies, chosen, _unite(copies, chosen.groups), "grouped")


def require_apart(pairs: Iterable[tuple[int, int]], chosen: Chosen, what: str) -> None:
    """Raise InputError where two items that have `what` in common stand in different splits."""
    if chosen.given is None:
        return
    torn = [(one, two) for one, two in pairs if chosen.given[one] != chosen.given[two]]
    if not torn:
        return
    shown = [
        " and ".join(f"{chosen.ids[at]!r} ({chosen.given[at]})" for at in pair)
        for pair in torn[:_NUM_SHOWN]
    ]
    more = f"\n  and {len(torn) - _NUM_SHOWN:,} more" if len(torn) > _NUM_SHOWN else ""
    listed = "\n  ".join(shown)
    raise InputError(
        f"splits overlap: {len(torn):,} pairs in different splits have {what}:\n  {listed}{more}\n"
        "use overlap=remove (test stays whole, its copies leave train and val), overlap=allow, or "
        "make other splits"
    )


def _remove(copies: Sequence[Sequence[int]], chosen: Chosen) -> Settled:
    rows = []
    removed: set[int] = set()
    num_contradicting, num_leaking = 0, 0
    for members in copies:
        contradict = len({chosen.labels[place] for place in members}) > 1
        ordered = sorted(members, key=lambda place: (_rank(chosen, place), place))
        stay = [place for place in ordered if _is_given_test(chosen, place)]
        if not stay and not contradict:
            stay = ordered[:1]
        for place in (place for place in members if place not in stay):
            other = _other(chosen, place, ordered)
            rows.append(_row(chosen, place, other, "duplicate"))
            removed.add(place)
            num_contradicting += contradict
            num_leaking += any(_rank(chosen, place) > _rank(chosen, kept) for kept in stay)
    kept = [place for place in range(len(chosen.ids)) if place not in removed]
    notes = []
    if removed:
        notes.append(
            f"{len(removed):,} records removed as copies of others, {num_contradicting:,} of them "
            "with contradicting labels"
        )
    if num_leaking:
        notes.append(f"{num_leaking:,} of these leaked from a given test or val split")
    groups = [chosen.groups[place] for place in kept]
    return Settled(np.array(kept, dtype=np.int64), groups, _table(rows), notes)


def _left_alone(
    copies: Sequence[Sequence[int]], chosen: Chosen, groups: list[str], status: str
) -> Settled:
    rows = [
        _row(chosen, place, _other(chosen, place, members), status)
        for members in copies
        for place in members[1:]
    ]
    notes = [f"{len(rows):,} records are copies of others ({status})"] if rows else []
    conflicts = sum(len({chosen.labels[place] for place in members}) > 1 for members in copies)
    if conflicts:
        notes.append(f"{conflicts:,} sequences stand under more than one label")
    return Settled(np.arange(len(chosen.ids)), list(groups), _table(rows), notes)


def _unite(copies: Sequence[Sequence[int]], groups: Sequence[str]) -> list[str]:
    """Give groups that share copies the name of one of them."""
    parent = {group: group for group in groups}

    def root(group: str) -> str:
        while parent[group] != group:
            group = parent[group]
        return group

    for members in copies:
        first = root(groups[members[0]])
        for place in members[1:]:
            parent[root(groups[place])] = first
    return [root(group) for group in groups]


def _given(chosen: Chosen, place: int) -> str:
    return "" if chosen.given is None else chosen.given[place]


def _is_given_test(chosen: Chosen, place: int) -> bool:
    return _given(chosen, place) == "test"


def _rank(chosen: Chosen, place: int) -> int:
    return _RANK.get(_given(chosen, place), len(_RANK))


def _other(chosen: Chosen, place: int, members: Sequence[int]) -> int:
    """Choose the copy to name: one with another label if there is one, else the first."""
    others = [member for member in members if member != place]
    return next((o for o in others if chosen.labels[o] != chosen.labels[place]), others[0])


def _row(chosen: Chosen, place: int, other: int, status: str) -> dict[str, str]:
    name, label = chosen.ids[other], chosen.labels[other]
    where = f" in {_given(chosen, other)}" if chosen.given is not None else ""
    but = f", which has the label {label!r}" if label != chosen.labels[place] else ""
    return {
        "id": chosen.ids[place],
        "label": chosen.labels[place],
        "split": _given(chosen, place),
        "copy_of": name,
        "status": status,
        "reason": f"the same sequence as {name!r}{where}{but}",
    }


def _table(rows: Sequence[dict[str, str]]) -> pd.DataFrame:
    columns = ["id", "label", "split", "copy_of", "status", "reason"]
    return pd.DataFrame(list(rows), columns=columns)
