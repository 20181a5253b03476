"""Features of GenBank records as intervals, read by Biopython.

Biopython counts from 0, half-open; the file from 1, end included. Locations: INSDC Feature Table
Definition, section 3.4.
"""

import io
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from Bio import BiopythonParserWarning, SeqIO
from Bio.SeqFeature import (
    AfterPosition,
    BeforePosition,
    ExactPosition,
    SeqFeature,
    SimpleLocation,
)
from Bio.SeqRecord import SeqRecord

from pipelines.genomics.intervals import Interval, IntervalFile, Part, choose_kind, describe_place
from pipelines.genomics.opening import open_source, reading_errors
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure

_NAMES = ("protein_id", "locus_tag", "gene", "label", "product")
_STRANDS = {1: "+", -1: "-", 0: ".", None: "."}
_KNOWN_ENDS = (ExactPosition, BeforePosition, AfterPosition)


def read_features(path: Path, columns: Mapping[str, str], feature: str | None) -> IntervalFile:
    """Read the features of GenBank records; see `read_intervals`.

    A `join` is read as one, across a circular origin too. What is no exact stretch of the record's
    own bases (one-of, order, positions between bases, other records) is listed as skipped.
    """
    kinds: Counter[str] = Counter()
    intervals: list[Interval] = []
    skipped: list[Failure] = []
    aliases: dict[str, tuple[str, ...]] = {}
    circular = set()
    lengths: dict[str, int] = {}
    for record in _records(path):
        _check_nucleotides(path, record)
        lengths[record.id] = len(record.seq)
        aliases[record.id] = tuple(dict.fromkeys(_other_names(record)))
        if record.annotations.get("topology") == "circular":
            circular.add(record.id)
        for number, found in enumerate(record.features, start=1):
            if found.type == "source":
                continue
            kinds[found.type] += 1
            if feature in (None, found.type):
                where = f"{path}: record {record.id!r}, feature {number:,} ({found.type})"
                problem = _problem(found)
                if problem:
                    name = _name(record, found, columns)
                    skipped.append(Failure(name, where, "inexact", *problem))
                else:
                    intervals.append(_interval(record, found, where, columns))
    if not kinds:
        raise InputError(f"{path} has no features; give intervals=FILE with some")
    choose_kind(path, kinds, feature)
    return IntervalFile(
        path,
        "GenBank",
        tuple(intervals),
        tuple(skipped),
        aliases=aliases,
        circular=frozenset(circular),
        lengths=lengths,
    )


def _records(path: Path) -> Iterator[SeqRecord]:
    """Parse records one by one; what Biopython raises becomes an error with file and record."""
    last = "before the first record"
    with open_source(path, wanted="a GenBank file") as source:
        text = io.TextIOWrapper(source.stream, encoding="utf-8-sig")
        try:
            with reading_errors(str(path), lambda: last):
                records = SeqIO.parse(text, "genbank")
                while (record := _next_record(path, records, last)) is not None:
                    yield record
                    last = f"after record {record.id!r}"
        finally:
            text.detach()


def _next_record(path: Path, records: Iterator[SeqRecord], last: str) -> SeqRecord | None:
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", BiopythonParserWarning)
        try:
            record = next(records, None)
        except (ValueError, AssertionError) as error:
            raise InputError(
                f"{path}: damaged GenBank {last}: {error}; mend the record or copy it again"
            ) from error
    for warning in noted:
        if "Premature end" in str(warning.message):
            raise InputError(
                f"{path}: the record {last} is cut short: it lacks its end marker //; copy it again"
            )
    return record


def _check_nucleotides(path: Path, record: SeqRecord) -> None:
    if record.annotations.get("molecule_type") == "protein":
        raise InputError(
            f"{path}: record {record.id!r} is protein, not DNA (its LOCUS line counts aa); give "
            "the nucleotide record"
        )


def _other_names(record: SeqRecord) -> Iterator[str]:
    yield record.name
    yield from record.annotations.get("accessions", ())
    for found in record.features[:1]:
        if found.type == "source":
            yield from found.qualifiers.get("chromosome", ())


def _problem(feature: SeqFeature) -> tuple[str, str] | None:
    """Say why a location is no exact stretch of bases, and what to do; None if it is one."""
    location = feature.location
    if location is None:
        return "its location cannot be read", "correct its location in the file"
    remedy = "write one exact location for it"
    if getattr(location, "operator", "join") != "join":
        return f"{location.operator}(...) does not say how its parts are joined", remedy
    for part in location.parts:
        if part.ref is not None:
            return f"a part lies on another record, {part.ref}", "give that record's features too"
        for position in (part.start, part.end):
            if not isinstance(position, _KNOWN_ENDS):
                return f"its position {position} is not exact", remedy
        if int(part.start) >= int(part.end):
            return f"{part} lies between two bases and holds none", "none is needed for a site"
    return None


def _interval(
    record: SeqRecord, feature: SeqFeature, where: str, columns: Mapping[str, str]
) -> Interval:
    parts = tuple(_part(part) for part in feature.location.parts)
    told = {key: " ".join(map(str, values)) for key, values in feature.qualifiers.items()}
    codon_start = told.get("codon_start", "")
    kind = feature.type
    label, split = (
        kind if columns.get(role) == "type" else told.get(columns.get(role, "")) or None
        for role in ("label", "split")
    )
    return Interval(
        record.id,
        min(part.start for part in parts),
        max(part.end for part in parts),
        parts[0].strand,
        _name(record, feature, columns),
        where,
        label=label,
        split=split,
        parts=parts,
        kind=kind,
        phase=int(codon_start) - 1 if codon_start in ("1", "2", "3") else None,
        attributes=told,
    )


def _part(location: SimpleLocation) -> Part:
    return Part(int(location.start), int(location.end), _STRANDS[location.strand])


def _name(record: SeqRecord, feature: SeqFeature, columns: Mapping[str, str]) -> str:
    names = [columns["name"]] if "name" in columns else _NAMES
    found = [feature.qualifiers[name][0] for name in names if feature.qualifiers.get(name)]
    if found:
        return str(found[0])
    location = feature.location
    if location is None:
        return feature.type
    return describe_place(record.id, int(location.start), int(location.end))
