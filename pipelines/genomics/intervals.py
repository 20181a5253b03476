"""Intervals of a genome, 0-based and half-open whatever the file counts, and how they are read."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from pipelines.genomics.lines import read_lines
from pipelines.genomics.opening import refuse_pipe
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure

COLUMNS = ("contig", "start", "end", "name", "score", "strand", "label", "split")
"""What a column of an interval file may be; `columns.label=NAME` says which one is."""

_LOOK = 4_000


class Part(NamedTuple):
    """A stretch of a contig, 0-based half-open, read on its strand (`.` as `+`)."""

    start: int
    end: int
    strand: str


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval or a feature: a stretch of a contig, or several that are read as one."""

    contig: str
    start: int
    """0-based; below 0 if the file says so (placing decides what becomes of it)."""
    end: int
    """Exclusive."""
    strand: str
    """`+`, `-` or `.`; that of the first part."""
    name: str
    source: str
    """File and line, or record, for messages."""
    score: float | None = None
    label: str | None = None
    split: str | None = None
    parts: tuple[Part, ...] = ()
    """In reading order: of a spliced feature on the minus strand the last stretch comes first."""
    kind: str = ""
    """The type of a feature, such as CDS."""
    phase: int | None = None
    """Bases to skip before the first whole codon (GFF3)."""
    summit: int | None = None
    """0-based position of the peak (narrowPeak)."""
    attributes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.parts:
            object.__setattr__(self, "parts", (Part(self.start, self.end, self.strand),))

    @property
    def length(self) -> int:
        """Bases of all parts."""
        return sum(part.end - part.start for part in self.parts)


@dataclass(frozen=True, slots=True)
class IntervalFile:
    """The intervals of a file, in its order, and what else it says of its contigs."""

    path: Path
    format: str
    intervals: tuple[Interval, ...]
    skipped: tuple[Failure, ...] = ()
    """Features that are no exact stretch of bases."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other names of contigs."""
    circular: frozenset[str] = frozenset()
    """Contigs that the file calls circular: a feature may run on past the origin."""
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Bases of contigs, where the file says so."""
    notes: tuple[str, ...] = ()
    """What looks wrong and is taken as it is written."""

    def __len__(self) -> int:
        return len(self.intervals)

    def __iter__(self) -> Iterator[Interval]:
        return iter(self.intervals)


def read_intervals(
    path: str | Path,
    *,
    columns: Mapping[str, str | None] | None = None,
    feature: str | None = None,
) -> IntervalFile:
    """Read BED3 to BED12, narrowPeak, a table with a header, GFF3, GTF or GenBank features.

    The format is told by content. `columns` says which column (by the header's name, or by its
    number from 1), attribute or qualifier is the label, the split, the name, the score or the
    strand (`type`: the type of a feature). `feature` is the type of features that count, such as
    CDS; without it a file of several types is refused. Raises InputError, with file, line and
    remedy, for whatever is no interval.
    """
    path = Path(path)
    refuse_pipe(path, "intervals")
    named = {role: name for role, name in (columns or {}).items() if name}
    unknown = sorted(set(named) - set(COLUMNS))
    if unknown:
        raise InputError(f"columns.{unknown[0]}: a column is {', '.join(COLUMNS)}")
    kind = tell_format(path)
    if kind == "BED":
        from pipelines.genomics.bed import read_bed

        if feature is not None:
            raise InputError(f"feature={feature}: {path} is BED, whose intervals have no type")
        file = read_bed(path, named)
    elif kind == "GenBank":
        from pipelines.genomics.features import read_features

        file = read_features(path, named, feature)
    else:
        from pipelines.genomics.gff import read_gff

        file = read_gff(path, named, feature, gtf=kind == "GTF")
    if not file.intervals:
        raise InputError(f"{path} has no intervals{_why(file)}; give a file with some")
    return file


def tell_format(path: Path) -> str:
    """Tell BED, GFF3, GTF and GenBank by content; raises InputError for what is none of them."""
    lines = read_lines(path, "file of intervals")
    for number, line in islice(lines, _LOOK):
        if line.startswith("##gff-version"):
            return "GTF" if line.split()[-1].startswith("2") else "GFF3"
        for start, (found, remedy) in _NOT_INTERVALS.items():
            if line.startswith(start) and number == 1:
                raise InputError(f"{path} is no interval file but {found}; {remedy}")
        if number == 1 and line.startswith("LOCUS "):
            return "GenBank"
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) >= 8 and not fields[1].lstrip("-").isdigit() and fields[3].isdigit():
            is_gtf = len(fields) > 8 and _GTF_ATTRIBUTE.match(fields[8]) is not None
            return "GTF" if is_gtf else "GFF3"
        return "BED"
    return "BED"


def choose_kind(path: Path, kinds: Mapping[str, int], feature: str | None) -> str:
    """Choose the type of features that count; raises InputError when that is not clear."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in kinds.items())
    if feature is not None:
        if feature not in kinds:
            raise InputError(f"{path} has no features of type {feature!r}; it has {shown}")
        return feature
    if len(kinds) != 1:
        raise InputError(
            f"{path} has features of {len(kinds)} types: {shown}; say which with feature=TYPE"
        )
    return next(iter(kinds))


def describe_place(contig: str, start: int, end: int) -> str:
    """Name an interval that has no name by its coordinates as they are here, 0-based."""
    return f"{contig}:{start}-{end}"


def _why(file: IntervalFile) -> str:
    if not file.skipped:
        return ""
    first = file.skipped[0]
    return f" that can be cut (the first, {first.id}: {first.reason})"


_GTF_ATTRIBUTE = re.compile(r'\s*\w+ +"')
_NOT_INTERVALS = {
    "##fileformat=VCF": ("VCF", "give it as variants=FILE"),
    ">": ("FASTA", "give it as sequences=FILE"),
    "@": ("FASTQ or SAM", "give BED, GFF, GTF or GenBank"),
    "fixedStep": ("wiggle", "give BED, GFF, GTF or GenBank"),
    "variableStep": ("wiggle", "give BED, GFF, GTF or GenBank"),
}
