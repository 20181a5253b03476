"""From a sequence store and a label table to examples: windows of records, augmented or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor
from torch.utils.data import Dataset

from pipelines.genomics.alphabet import reverse_complement
from pipelines.genomics.store import SequenceStore
from pipelines.shared.batch import Example
from pipelines.shared.errors import InputError
from pipelines.shared.tables import read_labels

COLUMNS = ("id", "label", "group", "split")
"""What a table of labels says of a record; the columns have these names unless others are given."""

_NUM_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Match:
    """Which records of a store have a label, and what stayed without a partner.

    `records` and `rows` run in parallel, in the order of the store: record `records[i]` has row
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

    `records` are indices into the store, `targets` one class per record of them (None: to
    predict). An example's coordinates count the bases of its window from 0, its group is the
    record's id, its record the index in the store. With `reverse_complement`, a window is read
    from the other strand with probability 0.5; with `shuffle_positions`, its coordinates are
    permuted (an ablation: composition stays, arrangement goes). Both depend on (seed, epoch,
    index) alone.
    """

    def __init__(
        self,
        store: SequenceStore,
        records: Sequence[int] | Int64[ndarray, "R"],
        targets: Sequence[int] | Int64[ndarray, "R"] | None = None,
        *,
        context: int,
        overlap: int = 0,
        reverse_complement: bool = False,
        shuffle_positions: bool = False,
        seed: int = 0,
    ) -> None:
        if targets is not None and len(targets) != len(records):
            raise ValueError(f"one target a record; got {len(records)=}, {len(targets)=}")
        self.store = store
        self.reverse_complement = reverse_complement
        self.shuffle_positions = shuffle_positions
        self.seed = seed
        windows = [
            (position, start, end)
            for position, record in enumerate(records)
            for start, end in cut_windows(int(store.lengths[record]), context, overlap)
        ]
        position, self.starts, self.ends = np.array(windows, dtype=np.int64).reshape(-1, 3).T
        self.records = np.asarray(records, dtype=np.int64)[position]
        self.targets = None if targets is None else np.asarray(targets, dtype=np.int64)[position]
        # Shared memory, so that workers which live on see the next epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def lengths(self) -> list[int]:
        """Bases of each window."""
        lengths: list[int] = (self.ends - self.starts).tolist()
        return lengths

    def set_epoch(self, epoch: int) -> None:
        """Draw other augmentations from now on."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = int(self.records[index])
        tokens = self.store.read(record, int(self.starts[index]), int(self.ends[index]))
        coords = np.arange(tokens.size, dtype=np.int64)
        if self.reverse_complement or self.shuffle_positions:
            generator = np.random.default_rng((self.seed, int(self._epoch), index))
            flipped = generator.random() < 0.5
            if self.reverse_complement and flipped:
                tokens = reverse_complement(tokens)
            if self.shuffle_positions:
                coords = generator.permutation(coords)
        name = self.store.ids[record]
        return Example(
            inputs=torch.from_numpy(tokens),
            coords=torch.from_numpy(coords)[:, None],
            target=None if self.targets is None else int(self.targets[index]),
            id=name,
            group=name,
            record=record,
        )


def cut_windows(length: int, context: int, overlap: int = 0) -> list[tuple[int, int]]:
    """Cover [0, length) with windows of `context` bases, neighbours sharing at least `overlap`.

    A record no longer than the context is one window of its own length. Of a longer one, the
    last window is shifted inwards, so that every window is full.
    """
    if not 0 <= overlap < context:
        raise ValueError(f"0 <= overlap < context must hold; got {overlap=}, {context=}")
    if length <= context:
        return [(0, length)]
    step = context - overlap
    starts = [*range(0, length - context, step), length - context]
    return [(start, start + context) for start in starts]


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
) -> pd.DataFrame:
    """Read a table of labels: columns id, label, group (the id where there is none), maybe split.

    `columns` says under which other names they stand in the file ({"id": "record_id"}), `where`
    which rows count ({"task": "Vertebrates"}). All values are strings. Rows of one group belong
    into one split. Raises InputError as `read_labels` does.
    """
    names = {role: role for role in COLUMNS} | dict(columns or {})
    mapped = [name for role, name in names.items() if name != role]
    for role in ("group", "split"):
        if names[role] == role and role in mapped:
            names[role] = ""  # that column was given another meaning
    table = read_labels(
        Path(path),
        id_column=names["id"],
        label_column=names["label"],
        group_column=names["group"] or None,
        split_column=names["split"],
        required=mapped,
        where=where,
        remedy="say which it is with columns.id=NAME and columns.label=NAME",
    )
    found = {role: table[name] for role, name in names.items() if name in table.columns}
    found.setdefault("group", found["id"])
    return pd.DataFrame({role: found[role] for role in COLUMNS if role in found})


def match_labels(store: SequenceStore, table: pd.DataFrame) -> Match:
    """Match the records of a store with the rows of a label table by id.

    What has no partner is listed in the result (the caller trains on the rest and reports it).
    Raises InputError when nothing matches.
    """
    row_of = {name: row for row, name in enumerate(table["id"])}
    pairs = [(i, row_of[name]) for i, name in enumerate(store.ids) if name in row_of]
    if not pairs:
        raise InputError(
            f"{store.path}: no record has a label: ids of the FASTA are {_some(store.ids)}, of the "
            f"labels {_some(tuple(table['id']))}; the id is the first word after '>'"
        )
    records, rows = np.array(pairs, dtype=np.int64).T
    known = set(store.ids)
    return Match(
        records=records,
        rows=rows,
        unlabelled=tuple(name for name in store.ids if name not in row_of),
        unknown=tuple(name for name in table["id"] if name not in known),
    )


def _some(names: tuple[str, ...]) -> str:
    dots = ", ..." if len(names) > _NUM_SHOWN else ""
    return ", ".join(map(repr, names[:_NUM_SHOWN])) + dots
