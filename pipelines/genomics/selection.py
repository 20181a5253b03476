"""What a verb works on: the records of a store, intervals of them, or variants."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import NUM_BASES
from pipelines.genomics.data import cut_windows
from pipelines.genomics.ingest import provide_store
from pipelines.genomics.intervals import COLUMNS, Part, read_intervals
from pipelines.genomics.opening import refuse_pipe
from pipelines.genomics.placing import PAST_END, Placed, fetch, place, whole_records
from pipelines.genomics.sequence_tables import ROLES
from pipelines.genomics.store import SequenceStore
from pipelines.genomics.tokenizers import Tokenizer
from pipelines.genomics.variants import (
    POLICIES,
    CheckedVariants,
    check_reference,
    read_vcf,
)
from pipelines.shared.batch import Example
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure

_PIECE = 1 << 24


class Sequences(Protocol):
    """Sequences to be read in pieces."""

    @property
    def lengths(self) -> Int64[ndarray, "R"]:
        """Bases of each."""

    def read(self, index: int, start: int, end: int) -> UInt8[ndarray, "T"]:
        """Read the bases [start, end) of one."""


class Intervals:
    """Intervals of a store's records, as they are read: spliced, on their strand."""

    def __init__(self, store: SequenceStore, placed: Iterable[Placed]) -> None:
        self.store, self.placed = store, tuple(placed)
        self.lengths = np.array([item.length for item in self.placed], dtype=np.int64)

    def read(self, index: int, start: int, end: int) -> UInt8[ndarray, "T"]:
        """Read the bases [start, end) of an interval."""
        return fetch(self.store, self.placed[index], start, end)

    def count_ambiguous(self, index: int) -> int:
        """Count the bases of an interval that are not A, C, G or T."""
        length = int(self.lengths[index])
        pieces = (self.read(index, at, min(at + _PIECE, length)) for at in range(0, length, _PIECE))
        return sum(int(np.count_nonzero(piece > NUM_BASES)) for piece in pieces)

    def where(self, index: int, start: int, end: int) -> list[Part]:
        """Where these bases lie on the record."""
        return self.placed[index].cut(start, end)


class Windows:
    """Windows of sequences as examples, tokenised; an example's record is the sequence's number."""

    def __init__(
        self,
        sequences: Sequences,
        names: list[str],
        *,
        context: int,
        overlap: int,
        tokenizer: Tokenizer,
    ) -> None:
        self.sequences, self.names, self.tokenizer = sequences, names, tokenizer
        self.records, self.starts, self.ends = cut_windows(sequences.lengths, context, overlap)

    @property
    def lengths(self) -> list[int]:
        """Bases of each window, which its tokens do not exceed."""
        lengths: list[int] = (self.ends - self.starts).tolist()
        return lengths

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = int(self.records[index])
        bases = self.sequences.read(record, int(self.starts[index]), int(self.ends[index]))
        tokens = self.tokenizer.encode(bases)
        return Example(
            inputs=torch.from_numpy(tokens.ids),
            coords=torch.from_numpy(tokens.starts)[:, None],
            target=None,
            id=self.names[record],
            group=self.names[record],
            record=record,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """Chosen intervals (whole records among them), a row of `table` each, and what fell out.

    The table says id, contig, start, end (0-based, half-open), strand, the parts in reading order
    where some are spliced, label and split where one is known, and flags.
    """

    placed: tuple[Placed, ...]
    table: pd.DataFrame
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = field(default=())


def check_settings(config: Mapping[str, Any]) -> None:
    """Raise InputError for settings of a selection that go together with nothing."""
    if config["past_end"] not in PAST_END:
        raise InputError(f"past_end is {', '.join(PAST_END)}; got {config['past_end']!r}")
    for key in ("feature", "width"):
        if config[key] is not None and not config["intervals"]:
            raise InputError(f"{key}= goes with intervals=FILE")
    if config["width"] is not None and (type(config["width"]) is not int or config["width"] < 1):
        raise InputError(f"width is a whole number of bases above 0; got {config['width']!r}")
    if config["intervals"]:
        require_file(config, "intervals")


def check_variants(config: Mapping[str, Any]) -> None:
    """Raise InputError for a policy that there is not, and a VCF that is not there."""
    if config["check_ref"] not in POLICIES:
        raise InputError(f"check_ref is {', '.join(POLICIES)}; got {config['check_ref']!r}")
    require_file(config, "variants")


def require_file(config: Mapping[str, Any], key: str) -> None:
    """Raise InputError unless the setting names a file."""
    refuse_pipe(config[key], key)
    if not Path(config[key]).is_file():
        raise InputError(f"{key}={config[key]}: no such file; check the path")


def open_store(config: Mapping[str, Any], out: Path) -> SequenceStore:
    """Return the store of `sequences` or `store`, with the labels beside them if records count."""
    columns = {role: config["columns"][role] for role in ROLES}
    records = not (config.get("intervals") or config.get("variants"))
    return provide_store({**config, "columns": columns}, out, with_labels=records)


def select_intervals(config: Mapping[str, Any], store: SequenceStore) -> Selection:
    """Choose the intervals of `intervals=`, or all records without it."""
    if not config["intervals"]:
        placed = whole_records(store)
        return Selection(placed, _describe(placed, store.labels, store.splits))
    given = config["columns"].items()
    columns = {role: name for role, name in given if role in COLUMNS and name != role}
    file = read_intervals(config["intervals"], columns=columns, feature=config["feature"])
    placement = place(file, store, past_end=config["past_end"], width=config["width"])
    intervals = [item.interval for item in placement.placed]
    table = _describe(
        placement.placed, [item.label for item in intervals], [item.split for item in intervals]
    )
    return Selection(placement.placed, table, placement.failures, tuple(placement.notes()))


def select_variants(config: Mapping[str, Any], store: SequenceStore) -> CheckedVariants:
    """Read the variants of `variants=` and hold them to the sequences."""
    file = read_vcf(config["variants"])
    return check_reference(file, store, policy=config["check_ref"])


def describe_variants(checked: CheckedVariants, store: SequenceStore) -> pd.DataFrame:
    """A row per allele: as the file has it, and normalised; positions from 1 as in the file."""
    rows = [
        {
            "id": item.written.id,
            "contig": item.written.contig,
            "position": item.written.position,
            "ref": item.written.ref,
            "alt": item.written.alt,
            "record": store.ids[item.record],
            "aligned_position": item.variant.position,
            "aligned_ref": item.variant.ref,
            "aligned_alt": item.variant.alt,
            "ref_match": item.ref_match,
        }
        for item in checked.placed
    ]
    return pd.DataFrame(rows)


def _describe(
    placed: tuple[Placed, ...], labels: Sequence[str | None], splits: Sequence[str | None]
) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "id": [item.interval.name for item in placed],
            "contig": [item.interval.contig for item in placed],
            "start": [min(part.start for part in item.parts) for item in placed],
            "end": [max(part.end for part in item.parts) for item in placed],
            "strand": [item.parts[0].strand for item in placed],
        }
    )
    if any(len(item.parts) > 1 for item in placed):
        spelled = (",".join(f"{p.start}-{p.end}({p.strand})" for p in i.parts) for i in placed)
        table["parts"] = list(spelled)
    if any(labels):
        table["label"] = list(labels)
    if any(splits):
        table["split"] = list(splits)
    table["flags"] = ["; ".join(item.flags) for item in placed]
    return table
