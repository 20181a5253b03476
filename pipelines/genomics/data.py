"""From a sequence store and a label table to examples: windows of records, augmented or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.genomics.alphabet import reverse_complement
from pipelines.genomics.store import SequenceStore
from pipelines.genomics.tokenizers import BaseTokenizer, Tokenizer
from pipelines.shared.batch import Example, Target
from pipelines.shared.errors import InputError
from pipelines.shared.tables import read_labels

if TYPE_CHECKING:
    from pipelines.genomics.sampler import ShardSampler

COLUMNS = ("id", "label", "group", "split")
"""What a table of labels says of a record; the columns have these names unless others are given."""

_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LabelSets:
    """Columns of 1 and 0, a label each, and how the labels of a row are written in one."""

    columns: tuple[str, ...]
    separator: str
    none: str

    def join(self, path: Path, table: pd.DataFrame) -> "pd.Series[str]":
        """Write the labels of each row; raises InputError, with the row, for other numbers."""
        for column in self.columns:
            wrong = table.index[~table[column].isin((0, 1))].tolist()
            if wrong:
                raise InputError(
                    f"{path}, row {wrong[0]}: {column} is 1 or 0; got {table[column][wrong[0]]:g}"
                )
        rows = table[list(self.columns)].to_numpy() == 1
        names = np.array(self.columns, dtype=object)
        joined = [self.separator.join(names[row]) or self.none for row in rows]
        return pd.Series(joined, index=table.index, dtype=object)


@dataclass(frozen=True, slots=True)
class Match:
    """Which records have a label, and what stayed without a partner.

    `records` and `rows` run in parallel, in the order of the records: record `records[i]` has row
    `rows[i]` of the table, counted from 0 (`table.iloc`).
    """

    records: Int64[ndarray, "M"]
    rows: Int64[ndarray, "M"]
    unlabelled: tuple[str, ...]
    """Ids of records that the table does not name."""
    unknown: tuple[str, ...]
    """Ids of the table that no record has."""

    def notes(self, *, filtered: bool = False) -> list[str]:
        """Say in a line each what stayed without a partner; empty when all matched.

        With `filtered`, the table holds chosen rows only, and other records are just not asked for.
        """
        notes = []
        if self.unlabelled and filtered:
            notes.append(f"{len(self.unlabelled):,} records are not asked for")
        elif self.unlabelled:
            notes.append(
                f"{len(self.unlabelled):,} records without a label: {_some(self.unlabelled)}"
            )
        if self.unknown:
            notes.append(f"{len(self.unknown):,} labels without a record: {_some(self.unknown)}")
        return notes


class WindowDataset(Dataset[Example]):
    """Windows of a store's records as examples; the windows of one record stand together.

    `records` are indices into the store, `targets` a class, a number or a row of labels for each of
    them (None: to predict). An example's coordinates count the bases of its window from 0 (with a
    tokenizer: the first base of each token), its group is the record's id, its record the index in
    the store. With `reverse_complement`, half of the windows are read from the other strand; with
    `shuffle_positions`, coordinates are permuted (an ablation: composition stays, arrangement
    goes). Both depend on (seed, epoch, index) alone.

    Training takes whole batches of a `ShardSampler` over these windows; reading one by one, as
    here, is for validation and test.
    """

    def __init__(
        self,
        store: SequenceStore,
        records: Sequence[int] | Int64[ndarray, "R"],
        targets: Sequence[int] | Shaped[ndarray, "R ..."] | None = None,
        *,
        context: int,
        overlap: int = 0,
        reverse_complement: bool = False,
        shuffle_positions: bool = False,
        tokenizer: Tokenizer | None = None,
        seed: int = 0,
    ) -> None:
        if targets is not None and len(targets) != len(records):
            raise ValueError(f"one target a record; got {len(records)=}, {len(targets)=}")
        self.store = store
        self.reverse_complement = reverse_complement
        self.shuffle_positions = shuffle_positions
        self.tokenizer = None if isinstance(tokenizer, BaseTokenizer) else tokenizer
        self.seed = seed
        chosen = np.asarray(records, dtype=np.int64)
        places, self.starts, self.ends = cut_windows(store.lengths[chosen], context, overlap)
        self.records = chosen[places]
        self.targets = None if targets is None else np.asarray(targets)[places]
        # Shared memory, so that workers which live on see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._flips: tuple[int, Bool[ndarray, W]] | None = None

    @property
    def lengths(self) -> list[int]:
        """Bases of each window, which its tokens do not exceed."""
        lengths: list[int] = (self.ends - self.starts).tolist()
        return lengths

    @property
    def epoch(self) -> int:
        """Which epoch's augmentations are drawn."""
        return int(self._epoch)

    def take(self, chosen: Bool[ndarray, "W"]) -> "WindowDataset":
        """Keep some of the windows."""
        self.records, self.starts = self.records[chosen], self.starts[chosen]
        self.ends, self._flips = self.ends[chosen], None
        if self.targets is not None:
            self.targets = self.targets[chosen]
        return self

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on."""
        self._epoch.fill_(epoch)

    def flips(self) -> Bool[ndarray, "W"]:
        """Say which windows this epoch reads from the other strand."""
        epoch = self.epoch
        if self._flips is None or self._flips[0] != epoch:
            coins = np.random.default_rng((self.seed, epoch)).random(len(self), dtype=np.float32)
            self._flips = epoch, (coins < 0.5) & self.reverse_complement
        return self._flips[1]

    def coords(self, index: int, count: int) -> Int64[ndarray, "T"]:
        """Count a window's bases from 0, in this epoch's order."""
        if not self.shuffle_positions:
            return np.arange(count, dtype=np.int64)
        return np.random.default_rng((self.seed, self.epoch, index)).permutation(count)

    def batches(
        self,
        *,
        epoch: int = 0,
        max_tokens: int,
        max_sequences: int | None = None,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> "ShardSampler":
        """Make the batches of an epoch, read shard by shard."""
        from pipelines.genomics.sampler import ShardSampler

        return ShardSampler(
            self,
            epoch=epoch,
            max_tokens=max_tokens,
            max_sequences=max_sequences,
            weights=weights,
            rank=rank,
            num_ranks=num_ranks,
        )

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = int(self.records[index])
        bases = self.store.read(record, int(self.starts[index]), int(self.ends[index]))
        if self.flips()[index]:
            bases = reverse_complement(bases)
        coords = self.coords(index, bases.size)
        inputs = bases
        if self.tokenizer is not None:
            tokens = self.tokenizer.encode(bases)
            inputs, coords = tokens.ids, coords[tokens.starts]
        name = self.store.ids[record]
        return Example(
            inputs=torch.from_numpy(inputs),
            coords=torch.from_numpy(coords)[:, None],
            target=self._target(index),
            id=name,
            group=name,
            record=record,
        )

    def _target(self, index: int) -> Target | None:
        if self.targets is None:
            return None
        target: Target | list[float] = self.targets[index].tolist()
        return tuple(target) if isinstance(target, list) else target


def cut_windows(
    lengths: Int64[ndarray, "R"], context: int, overlap: int = 0
) -> tuple[Int64[ndarray, "W"], Int64[ndarray, "W"], Int64[ndarray, "W"]]:
    """Cover records with windows of `context` bases, neighbours sharing at least `overlap`.

    Returns which of `lengths` each window lies in, and its start and end there. A record no longer
    than the context is one window of its own length. Of a longer one, the last window is shifted
    inwards, so that every window is full.
    """
    if not 0 <= overlap < context:
        raise ValueError(f"0 <= overlap < context must hold; got {overlap=}, {context=}")
    lengths = np.asarray(lengths, dtype=np.int64)
    step = context - overlap
    counts = 1 + np.maximum(0, -(-(lengths - context) // step))
    places = np.repeat(np.arange(lengths.size), counts)
    number = np.arange(places.size) - np.repeat(np.cumsum(counts) - counts, counts)
    last = np.maximum(lengths - context, 0)[places]
    starts = np.minimum(number * step, last)
    return places, starts, np.minimum(starts + context, lengths[places])


def average_windows(
    logits: Float[Tensor, "W C"], records: Int64[Tensor, "W"]
) -> tuple[Int64[Tensor, "R"], Float[Tensor, "R C"]]:
    """Average the logits of each record's windows; records come back in ascending order."""
    unique, inverse, counts = torch.unique(records, return_inverse=True, return_counts=True)
    total = torch.zeros(len(unique), logits.shape[1], dtype=torch.float64, device=logits.device)
    total.index_add_(0, inverse, logits.double())
    return unique, (total / counts[:, None]).to(logits.dtype)


def read_label_table(
    path: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
    sets: LabelSets | None = None,
    numbers: bool = False,
) -> pd.DataFrame:
    """Read a table of labels: columns id, label, group (the id where there is none), maybe split.

    With `sets` the label of a row is made of several columns of 1 and 0, with `numbers` it is a
    number. `columns` says under which other names they stand in the file ({"id": "record_id"}),
    `where` which rows count ({"task": "Vertebrates"}). All values are strings. Rows of one group
    belong into one split. Raises InputError as `read_labels` does.
    """
    names = {role: role for role in COLUMNS} | dict(columns or {})
    if sets is not None:
        del names["label"]
    mapped = [name for role, name in names.items() if name != role]
    for role in ("group", "split"):
        if names[role] == role and role in mapped:
            names[role] = ""  # that column was given another meaning
    table = read_labels(
        Path(path),
        id_column=names["id"],
        label_column=None if numbers else names.get("label"),
        numbers=(names["label"],) if numbers else sets.columns if sets else (),
        group_column=names["group"] or None,
        split_column=names["split"],
        required=mapped,
        where=where,
        remedy="say which it is with columns.id=NAME and columns.label=NAME",
    )
    if numbers:
        table[names["label"]] = table[names["label"]].map(repr)
    found = {role: table[name] for role, name in names.items() if name in table.columns}
    found.setdefault("group", found["id"])
    if sets is not None:
        found["label"] = sets.join(Path(path), table)
    return pd.DataFrame({role: found[role] for role in COLUMNS if role in found})


def match_labels(ids: Sequence[str], table: pd.DataFrame, *, name: str = "the sequences") -> Match:
    """Match records, by their ids, with the rows of a label table; `name` is what holds them.

    What has no partner is listed in the result (the caller trains on the rest and reports it).
    Raises InputError when nothing matches.
    """
    row_of = {name: row for row, name in enumerate(table["id"])}
    pairs = [(i, row_of[item]) for i, item in enumerate(ids) if item in row_of]
    if not pairs:
        raise InputError(
            f"{name}: no record has a label: ids of the records are {_some(ids)}, of the labels "
            f"{_some(tuple(table['id']))}; in FASTA the id is the first word after '>'"
        )
    records, rows = np.array(pairs, dtype=np.int64).T
    known = set(ids)
    return Match(
        records=records,
        rows=rows,
        unlabelled=tuple(item for item in ids if item not in row_of),
        unknown=tuple(item for item in table["id"] if item not in known),
    )


def _some(names: Sequence[str]) -> str:
    dots = ", ..." if len(names) > _NUM_SHOWN else ""
    return ", ".join(map(repr, names[:_NUM_SHOWN])) + dots
