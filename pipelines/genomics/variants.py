"""Variants of a VCF: one per alternative allele, trimmed, left-aligned, REF held to the sequences.

Format: VCF 4.5 (hts-specs), positions from 1. The lines are parsed here and not by htslib, which
refuses a file without its #CHROM line (as tools for variant effects write them), and names neither
the line of an error nor the remedy.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS, decode, encode
from pipelines.genomics.contigs import ContigMatch, compare_lengths, match_contigs
from pipelines.genomics.lines import bad_line, read_lines, whole_number
from pipelines.genomics.store import SequenceStore
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure

ReferencePolicy = Literal["error", "warn", "use_vcf"]
POLICIES = get_args(ReferencePolicy)

_CONTIG = re.compile(r"##contig=<(?:.*,)?ID=([^,>]+),(?:.*,)?length=(\d+)")
_NUM_SHOWN = 3
_STEP = 256
"""Bases read at once on the way to the left."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One alternative allele of one line."""

    contig: str
    position: int
    """From 1, as in the file, of the first base of `ref`."""
    ref: str
    alt: str
    id: str
    source: str
    """File and line, for messages."""

    @property
    def start(self) -> int:
        """0-based."""
        return self.position - 1

    @property
    def end(self) -> int:
        """0-based, exclusive."""
        return self.start + len(self.ref)

    def __str__(self) -> str:
        return f"{self.contig}:{self.position} {self.ref}>{self.alt}"


@dataclass(frozen=True, slots=True)
class VariantFile:
    """The alleles of a VCF in its order, those that are no sequence listed apart."""

    path: Path
    lines: tuple[Variant, ...]
    """What each line says of REF: variants without an ALT."""
    variants: tuple[Variant, ...]
    skipped: tuple[Failure, ...]
    lengths: Mapping[str, int]
    """Bases of contigs, by the header."""


@dataclass(frozen=True, slots=True)
class PlacedVariant:
    """A variant on a record, normalised; `ref_match` says whether the record has its REF."""

    written: Variant
    """As the file has it."""
    variant: Variant
    """Trimmed and left-aligned."""
    record: int
    ref_match: bool


@dataclass(frozen=True, slots=True)
class CheckedVariants:
    """What the sequences say of the variants of a file."""

    placed: tuple[PlacedVariant, ...]
    failures: tuple[Failure, ...]
    contigs: ContigMatch
    num_checked: int
    """Lines whose REF was compared."""
    num_matching: int
    """Lines whose REF is what stands in the sequences."""
    suspicions: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Say in a line each what was renamed, moved, and left out."""
        moved = sum(item.variant.position != item.written.position for item in self.placed)
        statuses = Counter(failure.status for failure in self.failures)
        return [
            *self.suspicions,
            *self.contigs.notes(),
            f"{self.num_matching:,} of {self.num_checked:,} REF alleles match the sequences",
            *([f"alleles trimmed or moved to the left: {moved:,}"] if moved else []),
            *(f"alleles left out ({status}): {count:,}" for status, count in statuses.items()),
        ]


def read_vcf(path: str | Path) -> VariantFile:
    """Read a VCF (plain, gzip or block gzip): one variant per alternative allele, as written.

    Symbolic alleles, breakends, `*` and `.` are listed as skipped. Raises InputError, with file and
    line, for what is no VCF, a position that is no number, and alleles that are no DNA.
    """
    path = Path(path)
    lines: list[Variant] = []
    variants: list[Variant] = []
    skipped: list[Failure] = []
    lengths: dict[str, int] = {}
    for number, line in read_lines(path, "VCF file"):
        if number == 1 and not line.startswith("##fileformat=VCF"):
            raise InputError(
                f"{path} is no VCF: its first line is {line[:40]!r}, not ##fileformat=VCFv4...; "
                "give a VCF file"
            )
        if contig := _CONTIG.match(line):
            lengths[contig[1]] = int(contig[2])
        if not line.strip() or line.startswith("#"):
            continue
        written, alts = _line(path, number, line)
        lines.append(written)
        for alt in alts.split(","):
            reason = _no_sequence(alt, written.position)
            if reason is None:
                variants.append(_allele(path, number, written, alt))
            else:
                skipped.append(_left_out(written, alt, reason))
    if not lines:
        raise InputError(f"{path} has no variants, only its header; give a VCF with some")
    return VariantFile(path, tuple(lines), tuple(variants), tuple(skipped), lengths)


def check_reference(
    file: VariantFile, store: SequenceStore, *, policy: ReferencePolicy = "error"
) -> CheckedVariants:
    """Place variants on a store's records, compare REF with what stands there, and normalise.

    A REF that differs is an error by default; `warn` keeps the variant, flagged, on the sequences'
    own bases; `use_vcf` writes the file's REF into the sequence instead. A variant on an unknown
    contig or beyond its end is listed. Alleles are trimmed and, where REF matches, left-aligned
    (Tan, Abecasis and Kang 2015). Raises InputError for mismatches under `error`, for contigs that
    cannot be told apart, and when nothing is left.
    """
    if policy not in POLICIES:
        raise InputError(f"check_ref is {', '.join(POLICIES)}; got {policy!r}")
    contigs = match_contigs((line.contig for line in file.lines), store.ids, where=str(file.path))
    suspicions = compare_lengths(
        contigs, file.lengths, store.lengths.tolist(), where=str(file.path)
    )
    matches = _compare(file.lines, store, contigs)
    wrong = [line for line in file.lines if matches.get(line.source) is False]
    if wrong and policy == "error":
        raise InputError(_describe_mismatches(file, wrong, len(matches), store, contigs))
    placed: list[PlacedVariant] = []
    failures = list(file.skipped)
    for variant in file.variants:
        record = contigs.record_of.get(variant.contig)
        if record is None or variant.source not in matches:
            failures.append(_unplaced(variant, store, record))
            continue
        match = matches[variant.source]
        normal = left_align(variant, store, record) if match else trim(variant)
        placed.append(PlacedVariant(variant, normal, record, match))
    if not placed:
        reason = f": {failures[0].reason}" if failures else ""
        raise InputError(f"{file.path}: no variant is left{reason}")
    return CheckedVariants(
        tuple(placed),
        tuple(failures),
        contigs,
        len(matches),
        sum(matches.values()),
        tuple(suspicions),
    )


def trim(variant: Variant) -> Variant:
    """Take away what both alleles have in common, at the end first, leaving a base of each."""
    ref, alt, position = variant.ref, variant.alt, variant.position
    while len(ref) > 1 and len(alt) > 1 and ref[-1] == alt[-1]:
        ref, alt = ref[:-1], alt[:-1]
    while len(ref) > 1 and len(alt) > 1 and ref[0] == alt[0]:
        ref, alt, position = ref[1:], alt[1:], position + 1
    return replace(variant, ref=ref, alt=alt, position=position)


def left_align(variant: Variant, store: SequenceStore, record: int) -> Variant:
    """Trim, and move an insertion or deletion as far to the left as it can go.

    Algorithm 1 of Tan, Abecasis and Kang (Bioinformatics 31:2202, 2015): while the last bases are
    equal drop them, and while an allele is empty put the base before in front of both.
    """
    ref, alt, start = variant.ref, variant.alt, variant.start
    before = _bases_before(store, record, start)
    while ref[-1:] == alt[-1:] and (min(len(ref), len(alt)) > 1 or start > 0):
        ref, alt = ref[:-1], alt[:-1]
        if not ref or not alt:
            base = next(before)
            ref, alt, start = base + ref, base + alt, start - 1
    return trim(replace(variant, ref=ref, alt=alt, position=start + 1))


def allele_windows(
    store: SequenceStore, placed: PlacedVariant, width: int, *, policy: ReferencePolicy
) -> tuple[int, UInt8[ndarray, "W"], UInt8[ndarray, "W"]]:
    """Return where a window around a variant begins, and its bases with REF and with ALT.

    The window has `width` bases, those of the whole record if that is shorter, with the variant's
    first base at `width // 2`, shifted inwards at the record's ends. Behind the variant the ALT
    window goes on until it has as many bases, or the record ends.
    """
    variant, record = placed.variant, placed.record
    length = int(store.lengths[record])
    start = max(0, min(variant.start - width // 2, length - width))
    left = store.read(record, start, variant.start)
    here = store.read(record, variant.start, variant.end)
    if policy == "use_vcf":
        here = encode(variant.ref)
    alt = encode(variant.alt)
    longest = max(width - left.size - min(here.size, alt.size), 0)
    right = store.read(record, variant.end, min(variant.end + longest, length))
    return (
        start,
        np.concatenate([left, here, right])[:width],
        np.concatenate([left, alt, right])[:width],
    )


def _line(path: Path, number: int, line: str) -> tuple[Variant, str]:
    """Read a line: what it says of REF, and its ALT."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) < 5:
        raise bad_line(
            path, number, f"{len(fields)} columns by tabs where a VCF has at least 5 (CHROM, POS, "
            "ID, REF, ALT); put tabs between them",
        )  # fmt: skip
    contig, text, name, ref, alts = fields[:5]
    position = whole_number(path, number, "POS", text)
    if position < 0 or not contig:
        raise bad_line(path, number, "CHROM is empty, or POS below 0; VCF counts from 1")
    ref = _bases(path, number, "REF", ref)
    source = f"{path}: line {number:,}"
    return Variant(contig, position, ref, "", name.strip("."), source), alts


def _allele(path: Path, number: int, written: Variant, alt: str) -> Variant:
    bases = _bases(path, number, "ALT", alt)
    if bases == written.ref:
        raise bad_line(path, number, f"ALT is REF, {alt!r}; give another allele, or remove it")
    return replace(written, alt=bases, id=_name(written, bases))


def _left_out(written: Variant, alt: str, reason: str) -> Failure:
    name = _name(written, alt)
    return Failure(name, written.source, "no_sequence", reason, "none is needed: it is left out")


def _name(written: Variant, alt: str) -> str:
    return written.id or f"{written.contig}:{written.position}:{written.ref}:{alt}"


def _no_sequence(alt: str, position: int) -> str | None:
    if alt in (".", ""):
        return "no alternative allele (.)"
    if alt == "*":
        return "an allele that an upstream deletion takes away (*)"
    if alt.startswith("<"):
        return f"a symbolic allele ({alt})"
    if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith("."):
        return f"a breakend ({alt})"
    return "POS 0, the telomere" if position == 0 else None


def _bases(path: Path, number: int, column: str, text: str) -> str:
    """Read an allele: upper case, T for U; raises InputError for what is no DNA."""
    if not text:
        raise bad_line(path, number, f"{column} is empty; write its bases, or . for none")
    plain = text.upper().replace("U", "T")
    if plain.strip(LETTERS):
        raise bad_line(
            path, number, f"{column} is {text[:40]!r}, no DNA letters; a VCF writes a deletion or "
            "insertion with the base before it",
        )  # fmt: skip
    return plain


def _compare(
    lines: Sequence[Variant], store: SequenceStore, contigs: ContigMatch
) -> dict[str, bool]:
    """Say of each line on a record whether its REF stands there; others are left out."""
    matches = {}
    for line in lines:
        record = contigs.record_of.get(line.contig)
        if record is not None and line.position > 0 and line.end <= int(store.lengths[record]):
            matches[line.source] = _stands_there(line, store, record) == line.ref
    return matches


def _unplaced(variant: Variant, store: SequenceStore, record: int | None) -> Failure:
    if record is None:
        status, reason = "unknown_contig", f"contig {variant.contig!r} is not in the sequences"
    else:
        name, length = store.ids[record], store.lengths[record]
        status, reason = (
            "past_end",
            f"{variant} reaches beyond {name!r}, which has {length:,} bases",
        )
    remedy = "give the sequences that the variants were called on"
    return Failure(variant.id, variant.source, status, reason, remedy)


def _stands_there(variant: Variant, store: SequenceStore, record: int) -> str:
    return decode(store.read(record, variant.start, variant.end))


def _bases_before(store: SequenceStore, record: int, start: int) -> Iterator[str]:
    """Yield the bases before a place, going left."""
    while start > 0:
        low = max(0, start - _STEP)
        yield from reversed(decode(store.read(record, low, start)))
        start = low


def _describe_mismatches(
    file: VariantFile,
    wrong: Sequence[Variant],
    total: int,
    store: SequenceStore,
    contigs: ContigMatch,
) -> str:
    there = {
        line.source: _stands_there(line, store, contigs.record_of[line.contig]) for line in wrong
    }
    swapped = sum(there.get(item.source) == item.alt for item in file.variants)
    hint = f"in {swapped:,} of them ALT stands there: REF and ALT are swapped"
    shown = [
        f"line {line.source.rpartition(' ')[2]}: {line.contig}:{line.position} has REF "
        f"{line.ref[:20]}, where the sequences have {there[line.source][:20]}"
        for line in wrong[:_NUM_SHOWN]
    ]
    return (
        f"{file.path}: {len(wrong):,} of {total:,} REF alleles do not match the sequences "
        f"({hint if swapped else 'is it another assembly?'}): {'; '.join(shown)}"
        f"{'; ...' * (len(wrong) > _NUM_SHOWN)}; mend the file, give the sequences it was called "
        "on, or use check_ref=warn or check_ref=use_vcf"
    )
