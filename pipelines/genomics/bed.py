"""BED3 to BED12, BED with further columns, narrowPeak, and tables of intervals with a header.

Formats: GA4GH BED v1.0; ENCODE narrowPeak as UCSC describes it. All count from 0, half-open.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipelines.genomics.intervals import Interval, IntervalFile, Part, describe_place
from pipelines.genomics.lines import bad_line, read_lines, whole_number

_HEADER_NAMES = {
    "contig": ("contig", "chrom", "chr", "chromosome", "seqname", "seqnames", "region"),
    "start": ("start", "chromstart", "chrom_start"),
    "end": ("end", "chromend", "chrom_end", "stop"),
    "name": ("name", "id"),
    "score": ("score",),
    "strand": ("strand",),
    "label": ("label",),
    "split": ("split",),
}
_PLACES = {"contig": 0, "start": 1, "end": 2, "name": 3, "score": 4, "strand": 5}
_NARROW_PEAK, _BED12 = 10, 12


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where each role stands in a line, and what else the lines hold."""

    places: Mapping[str, int]
    width: int
    separator: str | None
    kind: str = "BED"

    def split(self, line: str) -> list[str]:
        return [text.strip() for text in line.split(self.separator)]


def read_bed(path: Path, columns: Mapping[str, str]) -> IntervalFile:
    """Read a BED file, a narrowPeak file or a table with a header; see `read_intervals`."""
    intervals = []
    layout: _Layout | None = None
    for number, line, comment in _content(path):
        if layout is None:
            layout, is_header = _choose_layout(path, number, line, comment, columns)
            if is_header:
                continue
        intervals.append(_interval(path, number, layout.split(line), layout))
    return IntervalFile(path, layout.kind if layout else "BED", tuple(intervals))


def _content(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield lines that are no comment, track, browser or blank line, with the comment before."""
    comment = ""
    for number, line in read_lines(path, "BED file"):
        if line.startswith("#"):
            comment = line.lstrip("#").strip()
        elif line.strip() and line.split(maxsplit=1)[0] not in ("track", "browser"):
            yield number, line, comment


def _choose_layout(
    path: Path, number: int, line: str, comment: str, columns: Mapping[str, str]
) -> tuple[_Layout, bool]:
    """Say where things stand, by the first line of content, and whether it is a header."""
    separator = "\t" if "\t" in line else "," if line.count(",") >= 2 and " " not in line else None
    fields = [text.strip() for text in line.split(separator)]
    if _is_header(fields):
        return _by_header(path, number, fields, separator, columns), True
    above = [text.strip() for text in comment.split(separator)]
    if len(above) == len(fields) and _is_header(above):
        return _by_header(path, number - 1, above, separator, columns), False
    return _by_position(path, number, fields, separator, columns), False


def _is_header(fields: Sequence[str]) -> bool:
    names = {text.lower() for text in fields}
    return all(names.intersection(_HEADER_NAMES[role]) for role in ("start", "end"))


def _by_header(
    path: Path, number: int, header: list[str], separator: str | None, columns: Mapping[str, str]
) -> _Layout:
    lowered = [text.lower() for text in header]
    places = {}
    for role, names in _HEADER_NAMES.items():
        found = [place for place, text in enumerate(lowered) if text in names]
        if role not in columns and found:
            places[role] = found[0]
    for role, name in columns.items():
        if name not in header:
            raise bad_line(
                path, number, f"no column {name!r} for columns.{role}; it has {', '.join(header)}"
            )
        places[role] = header.index(name)
    if "contig" not in places:
        raise bad_line(
            path, number, f"no column for the contig among {', '.join(header)}; say which it is "
            "with columns.contig=NAME",
        )  # fmt: skip
    return _Layout(places, len(header), separator, "table")


def _by_position(
    path: Path, number: int, fields: list[str], separator: str | None, columns: Mapping[str, str]
) -> _Layout:
    width = len(fields)
    if separator == "," or width < 3:
        raise bad_line(
            path, number, f"{width} column{'s' * (width > 1)} where BED has at least 3 (contig, "
            "start, end, by tabs); add what is missing",
        )  # fmt: skip
    numbered = {role: _column(path, number, role, name, width) for role, name in columns.items()}
    places = {
        role: place
        for role, place in _PLACES.items()
        if place < width and place not in numbered.values()
    }
    kind = "BED"
    if width == _NARROW_PEAK and not numbered and _is_peak(fields[9]):
        kind = "narrowPeak"
    elif width >= _BED12 and "," in fields[10] + fields[11] + ",":
        kind = "BED12"
    return _Layout(places | numbered, width, separator, kind)


def _column(path: Path, number: int, role: str, name: str, width: int) -> int:
    if not name.isdigit():
        raise bad_line(
            path, number, f"columns.{role}={name}, but {path.name} has no header; give the "
            f"column's number, 1 to {width}",
        )  # fmt: skip
    if not 1 <= int(name) <= width:
        raise bad_line(path, number, f"columns.{role}={name}, but there are {width} columns")
    return int(name) - 1


def _interval(path: Path, number: int, fields: list[str], layout: _Layout) -> Interval:
    if len(fields) != layout.width:
        raise bad_line(
            path, number, f"{len(fields)} columns where the lines before have {layout.width}; "
            "give every line the same columns, by tabs",
        )  # fmt: skip
    told = {role: fields[place] for role, place in layout.places.items()}
    start = whole_number(path, number, "the start", told["start"])
    end = whole_number(path, number, "the end", told["end"])
    check_span(path, number, told["contig"], start, end)
    strand = told.get("strand", ".") or "."
    if strand not in ("+", "-", "."):
        raise bad_line(path, number, f"the strand is {strand!r}; it is +, - or .")
    name = told.get("name", "")
    parts: tuple[Part, ...] = ()
    summit = None
    if layout.kind == "BED12":
        parts = _blocks(path, number, fields, start, end, strand)
    elif layout.kind == "narrowPeak" and fields[9] != "-1":
        summit = start + whole_number(path, number, "the summit", fields[9])
        if not start <= summit < end:
            raise bad_line(
                path, number, f"the summit is {fields[9]}, bases behind the start, in an interval "
                f"of {end - start:,}; write -1 where none is known",
            )  # fmt: skip
    return Interval(
        told["contig"],
        start,
        end,
        strand,
        name if name not in ("", ".") else describe_place(told["contig"], start, end),
        f"{path}: line {number:,}",
        score=_score(path, number, told.get("score", ".")),
        label=told.get("label") or None,
        split=told.get("split") or None,
        parts=parts,
        summit=summit,
    )


def check_span(path: Path, number: int, contig: str, start: int, end: int) -> None:
    """Refuse an interval without a contig or without bases."""
    if not contig:
        raise bad_line(path, number, "the contig is empty; name one")
    if start == end:
        raise bad_line(
            path, number, f"start and end are both {start:,}: an interval of no bases (BED counts "
            "from 0, half-open: the first base is 0 to 1); mend or remove it",
        )  # fmt: skip
    if start > end:
        raise bad_line(
            path, number, f"the start {start:,} lies behind the end {end:,}; put the smaller "
            "first, the strand says which way it is read",
        )  # fmt: skip


def _score(path: Path, number: int, text: str) -> float | None:
    if text in (".", ""):
        return None
    try:
        return float(text)
    except ValueError:
        raise bad_line(
            path, number, f"the score is {text!r}, no number; if that column is something else, "
            "say so, as with columns.label=5",
        ) from None  # fmt: skip


def _is_peak(text: str) -> bool:
    return text == "-1" or text.isdigit()


def _blocks(
    path: Path, number: int, fields: list[str], start: int, end: int, strand: str
) -> tuple[Part, ...]:
    """Read BED12's blocks (columns 10 to 12), put in reading order."""
    count = whole_number(path, number, "the number of blocks", fields[9])
    sizes, offsets = (_numbers(path, number, fields[column]) for column in (10, 11))
    if not len(sizes) == len(offsets) == count:
        raise bad_line(
            path, number, f"{count} blocks, but {len(sizes)} sizes and {len(offsets)} starts; give "
            "as many of each",
        )  # fmt: skip
    parts = [
        Part(start + offset, start + offset + size, strand)
        for size, offset in zip(sizes, offsets, strict=True)
    ]
    apart = all(a.end <= b.start for a, b in pairwise(parts))
    inside = parts and parts[0].start == start and parts[-1].end == end
    if not (apart and inside and all(part.end > part.start for part in parts)):
        raise bad_line(
            path, number, "the blocks do not reach from start to end in order without overlap; "
            "their starts count from the interval's start",
        )  # fmt: skip
    return tuple(reversed(parts) if strand == "-" else parts)


def _numbers(path: Path, number: int, text: str) -> list[int]:
    items = text.removesuffix(",").split(",")
    return [whole_number(path, number, "a block's size or start", item) for item in items]
