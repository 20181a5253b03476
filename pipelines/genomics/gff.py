"""GFF3 and GTF: features with their attributes, those of several lines joined.

Formats: Sequence Ontology's GFF3 1.26; GTF2.2 (Brent lab). Both count from 1, end included; here
everything is 0-based and half-open.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from pipelines.genomics.intervals import (
    Interval,
    IntervalFile,
    Part,
    choose_kind,
    describe_place,
)
from pipelines.genomics.lines import bad_line, read_lines, whole_number
from pipelines.shared.errors import InputError

_CONTIG_KINDS = ("region", "chromosome", "contig", "scaffold", "source", "biological_region")
"""Types whose rows describe a whole contig, and may name it otherwise."""
_NAMES = ("Name", "chromosome", "Alias")
_SEQUENCE_REGION = re.compile(r"##sequence-region\s+(\S+)\s+1\s+(\d+)\s*$")
_ENOUGH = 3
_GTF_ATTRIBUTE = re.compile(r'\s*([\w.:-]+)\s+(?:"([^"]*)"|([^";\s]+))\s*(?:;|$)')


@dataclass(frozen=True, slots=True)
class _Row:
    number: int
    contig: str
    kind: str
    part: Part
    score: float | None
    phase: int | None
    attributes: Mapping[str, str]


def read_gff(
    path: Path, columns: Mapping[str, str], feature: str | None, *, gtf: bool
) -> IntervalFile:
    """Read GFF3 or GTF; see `read_intervals`.

    Lines of one ID (and type and contig) are one feature, read in the order of their coordinates,
    from the end on the minus strand; by the attribute `part` where it is given (trans-splicing).
    CDS lines without an ID are joined by their Parent, those of GTF by their transcript (there the
    stop codon is not part of the CDS).
    """
    groups: dict[tuple[str, ...], list[_Row]] = {}
    kinds: Counter[str] = Counter()
    aliases: dict[str, tuple[str, ...]] = {}
    circular = set()
    lengths: dict[str, int] = {}
    for number, line in read_lines(path, "GFF file"):
        if line.startswith("##FASTA"):
            break
        if region := _SEQUENCE_REGION.match(line):
            lengths[unquote(region[1])] = int(region[2])
        if not line.strip() or line.startswith("#"):
            continue
        row = _row(path, number, line, gtf=gtf)
        if row.kind in _CONTIG_KINDS and row.part.start == 0:
            given = (row.attributes.get(name, "") for name in _NAMES)
            aliases[row.contig] = tuple(dict.fromkeys(name for name in given if name))
        if row.attributes.get("Is_circular", "").lower() == "true":
            circular.add(row.contig)
        if feature in (None, row.kind):
            groups.setdefault(_key(row, gtf=gtf), []).append(row)
        kinds[row.kind] += 1
    if not kinds:
        raise InputError(f"{path} has no features, only comments; give a file with some")
    counted = {kind: count for kind, count in kinds.items() if kind not in _CONTIG_KINDS}
    kind = choose_kind(path, counted if feature is None and counted else kinds, feature)
    chosen = (rows for rows in groups.values() if rows[0].kind == kind)
    intervals = tuple(_feature(path, rows, columns) for rows in chosen)
    _check_attributes(path, intervals, columns)
    return IntervalFile(
        path,
        "GTF" if gtf else "GFF3",
        intervals,
        aliases=aliases,
        circular=frozenset(circular),
        lengths=lengths,
        notes=tuple(_suspicions(path, intervals)),
    )


def _row(path: Path, number: int, line: str, *, gtf: bool) -> _Row:
    fields = [text.strip() for text in line.split("\t")]
    if len(fields) != 9:
        raise bad_line(
            path, number, f"{len(fields)} columns by tabs where GFF has 9; put tabs between them"
        )
    contig, _, kind, low, high, score, strand, phase, attributes = fields
    start = whole_number(path, number, "the start", low) - 1
    end = whole_number(path, number, "the end", high)
    if start < 0:
        raise bad_line(
            path, number, f"the start is {start + 1}; GFF counts from 1: add 1 if the file counts "
            "from 0",
        )  # fmt: skip
    if start >= end:
        raise bad_line(
            path, number, f"the start {start + 1:,} lies behind the end {end:,}; put the smaller "
            "first, the strand says which way it is read",
        )  # fmt: skip
    if strand not in ("+", "-", ".", "?"):
        raise bad_line(path, number, f"the strand is {strand!r}; it is +, -, . or ?")
    if phase not in ("0", "1", "2", "."):
        raise bad_line(path, number, f"the phase is {phase!r}; it is 0, 1, 2 or .")
    if not contig or not kind:
        raise bad_line(path, number, "the contig or the type is empty; name both")
    parse = _gtf_attributes if gtf else _gff_attributes
    return _Row(
        number,
        unquote(contig),
        kind,
        Part(start, end, strand.replace("?", ".")),
        _score(path, number, score),
        None if phase == "." else int(phase),
        parse(path, number, attributes),
    )


def _gff_attributes(path: Path, number: int, text: str) -> dict[str, str]:
    found = {}
    for item in text.split(";") if text != "." else ():
        if not item.strip():
            continue
        key, sign, value = item.partition("=")
        if not sign:
            raise bad_line(
                path, number, f"the attribute {item.strip()!r} has no '='; write KEY=VALUE, with ; "
                "between them and %3B within",
            )  # fmt: skip
        found[unquote(key.strip())] = unquote(value.strip())
    return found


def _gtf_attributes(path: Path, number: int, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    place = 0
    while place < len(text.rstrip()):
        match = _GTF_ATTRIBUTE.match(text, place)
        if match is None:
            raise bad_line(
                path, number, f"the attributes cannot be read from {text[place:][:30]!r} on; write "
                'key "value"; ...',
            )  # fmt: skip
        value = match[2] if match[2] is not None else match[3]
        found[match[1]] = f"{found[match[1]]},{value}" if match[1] in found else value
        place = match.end()
    return found


def _score(path: Path, number: int, text: str) -> float | None:
    try:
        return None if text in (".", "") else float(text)
    except ValueError:
        raise bad_line(path, number, f"the score is {text!r}; it is a number or .") from None


def _key(row: _Row, *, gtf: bool) -> tuple[str, ...]:
    """What lines of one feature have in common."""
    own = row.attributes.get("ID")
    if gtf:
        own = None
    if own is None and row.kind == "CDS":
        parent = "transcript_id" if gtf else "Parent"
        own = row.attributes.get(parent)
    return (own, row.kind, row.contig) if own else (f"line {row.number}",)


def _feature(path: Path, rows: list[_Row], columns: Mapping[str, str]) -> Interval:
    first = rows[0]
    ordered = _in_reading_order(path, rows)
    attributes = first.attributes
    names = [columns["name"]] if "name" in columns else ["ID", "Name", "transcript_id", "gene_id"]
    start, end = min(row.part.start for row in rows), max(row.part.end for row in rows)
    found = [attributes[name] for name in names if attributes.get(name)]
    return Interval(
        first.contig,
        start,
        end,
        ordered[0].part.strand,
        found[0] if found else describe_place(first.contig, start, end),
        f"{path}: line {first.number:,}",
        score=first.score,
        label=_told("label", first, columns),
        split=_told("split", first, columns),
        parts=tuple(row.part for row in ordered),
        kind=first.kind,
        phase=ordered[0].phase,
        attributes=attributes,
    )


def _in_reading_order(path: Path, rows: list[_Row]) -> list[_Row]:
    if len(rows) == 1:
        return rows
    numbers = [row.attributes.get("part", "").partition("/")[0] for row in rows]
    if all(text.isdigit() for text in numbers):
        return [row for _, row in sorted(zip(map(int, numbers), rows, strict=True), key=_first)]
    strands = {row.part.strand for row in rows}
    if len(strands) > 1:
        name = rows[0].attributes.get("ID", "")
        raise bad_line(
            path, rows[1].number, f"feature {name!r} (from line {rows[0].number:,}) changes its "
            "strand; say the order of its lines with the attribute part=1, part=2, ...",
        )  # fmt: skip
    return sorted(rows, key=lambda row: row.part.start, reverse=strands == {"-"})


def _first(item: tuple[int, _Row]) -> int:
    return item[0]


def _suspicions(path: Path, intervals: tuple[Interval, ...]) -> Iterator[str]:
    """Note coding sequences that are all one base too long: starts that count from 0."""
    coding = [item for item in intervals if item.kind == "CDS" and item.phase == 0]
    if len(coding) >= _ENOUGH and all(item.length % 3 == 1 for item in coding):
        yield (
            f"{path}: all {len(coding):,} coding sequences are one base longer than whole codons; "
            "the file seems to count starts from 0, where GFF counts from 1"
        )


def _told(role: str, row: _Row, columns: Mapping[str, str]) -> str | None:
    name = columns.get(role)
    if name is None:
        return None
    return row.kind if name == "type" else row.attributes.get(name) or None


def _check_attributes(
    path: Path, intervals: Iterable[Interval], columns: Mapping[str, str]
) -> None:
    """Refuse a column's name that no feature has as an attribute."""
    known = {name for interval in intervals for name in interval.attributes} | {"type"}
    for role, name in columns.items():
        if role in ("label", "split", "name") and name not in known:
            raise InputError(
                f"{path}: no feature has the attribute {name!r} for columns.{role}; they have "
                f"{', '.join(sorted(known))}"
            )
