"""Contigs under other names: chr1, 1 and NC_000001.11; chrM and MT. A renaming, never a guess."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.shared.errors import InputError

_NUM_SHOWN = 5
_MITOCHONDRIA = frozenset({"m", "mt", "mito", "mitochondrion", "mtdna"})
_PREFIX = re.compile(r"^(chromosome|chrom|chr)[_\s-]?", re.IGNORECASE)
_ACCESSION = re.compile(
    r"\b(?P<number>[a-z]{1,6}_?[a-z]{0,4}\d{5,})\.(?P<version>\d+)$", re.IGNORECASE
)
"""An accession with its version (INSDC, RefSeq): another version is another sequence."""
_REFSEQ_CHROMOSOMES = {
    # accessions of one species stand in the order of its chromosomes (NCBI RefSeq)
    "human": (1, [*map(str, range(1, 23)), "x", "y"]),
    "mouse": (67, [*map(str, range(1, 20)), "x", "y"]),
}
_REFSEQ = {
    f"nc_{first + place:06d}": name
    for first, names in _REFSEQ_CHROMOSOMES.values()
    for place, name in enumerate(names)
} | {"nc_012920": "mt", "nc_005089": "mt"}


@dataclass(frozen=True, slots=True)
class ContigMatch:
    """Which record each contig of a file is, and what has been renamed."""

    record_of: Mapping[str, int]
    renamed: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Say in a line each what was renamed and what is unknown; empty when all are equal."""
        notes = []
        if self.renamed:
            pairs = [f"{theirs} is {ours}" for theirs, ours in self.renamed.items()]
            notes.append(
                f"contigs named otherwise in the sequences ({len(pairs):,}): {_some(pairs)}"
            )
        if self.unknown:
            missing = _some(self.unknown)
            notes.append(
                f"contigs that are not in the sequences ({len(self.unknown):,}): {missing}"
            )
        return notes


def match_contigs(
    names: Iterable[str],
    ids: Sequence[str],
    *,
    aliases: Mapping[str, Sequence[str]] | None = None,
    where: str,
) -> ContigMatch:
    """Match names of contigs with the ids of records.

    A name is looked for as it is; then among the ids by what `aliases` says of it (the rows of a
    GFF that describe a contig); then by what all spellings of one contig have in common: `chr`
    before it, capitals, the several names of a mitochondrion, an accession with or without its
    version (not two versions), one among bars, and the accessions of human and mouse chromosomes.
    The first that finds anything counts. Raises InputError where it finds two records, where two
    names find one record, and where no name finds any; `where` is the file that messages name.
    """
    exact = {name: row for row, name in enumerate(ids)}
    spellings: dict[str, set[int]] = {}
    for row, name in enumerate(ids):
        for spelling in _spellings(name):
            spellings.setdefault(spelling, set()).add(row)
    distinct = list(dict.fromkeys(names))
    found = {
        name: _find(name, ids, exact, spellings, (aliases or {}).get(name, ())) for name in distinct
    }
    for name, rows in found.items():
        if len(rows) > 1:
            several = _some([ids[row] for row in sorted(rows)])
            raise InputError(
                f"{where}: contig {name!r} may be any of {several}; name it as the sequences do"
            )
    record_of = {name: next(iter(rows)) for name, rows in found.items() if rows}
    _refuse_shared(record_of, ids, where)
    if distinct and not record_of:
        raise InputError(
            f"{where}: none of its contigs ({_some(distinct)}) is in the sequences, whose ids are "
            f"{_some(ids)}; give the sequences that it is of, or rename the contigs"
        )
    return ContigMatch(
        record_of,
        {name: ids[row] for name, row in record_of.items() if name != ids[row]},
        tuple(name for name in distinct if name not in record_of),
    )


def compare_lengths(
    match: ContigMatch, said: Mapping[str, int], lengths: Sequence[int], *, where: str
) -> list[str]:
    """Note where a file says another length of a contig than its record has: another assembly."""
    differing = [
        f"{name} has {said[name]:,} there and {int(lengths[row]):,} here"
        for name, row in match.record_of.items()
        if name in said and said[name] != int(lengths[row])
    ]
    if not differing:
        return []
    count, shown = f"{len(differing):,}", _some(differing)
    return [f"{where}: lengths of contigs differ ({count}): {shown}; is it another assembly?"]


def _find(
    name: str,
    ids: Sequence[str],
    exact: Mapping[str, int],
    spellings: Mapping[str, set[int]],
    others: Sequence[str],
) -> set[int]:
    if name in exact:
        return {exact[name]}
    for candidates in (others, [name]):
        rows = {exact[other] for other in candidates if other in exact}
        if not rows:
            found = (
                (row, candidate)
                for candidate in candidates
                for spelling in _spellings(candidate)
                for row in spellings.get(spelling, ())
            )
            rows = {row for row, candidate in found if _same_version(candidate, ids[row])}
        if rows:
            return rows
    return set()


def _spellings(name: str) -> Iterator[str]:
    """Yield what all names of one contig have in common; several where a name holds several."""
    for word in _words(name):
        plain = _PREFIX.sub("", word).lower() or word.lower()
        if plain in _MITOCHONDRIA:
            yield "mt"
            continue
        accession = _ACCESSION.fullmatch(plain)
        number = accession["number"] if accession else plain
        if number in _REFSEQ:
            yield _REFSEQ[number]
        yield number.lstrip("0") if number.isdigit() else number


def _words(name: str) -> list[str]:
    """The names among bars (gi|...|ref|...|), without those of databases; else the name itself."""
    if "|" not in name:
        return [name.strip()]
    return [word.strip() for word in name.split("|") if re.search(r"\d", word)]


def _same_version(name: str, other: str) -> bool:
    """Tell whether neither name says the version of an accession that the other contradicts."""
    mine, theirs = _versions(name), _versions(other)
    return not (mine and theirs) or bool(mine & theirs)


def _versions(name: str) -> set[str]:
    found = (_ACCESSION.fullmatch(word) for word in _words(name))
    return {match["version"] for match in found if match}


def _refuse_shared(record_of: Mapping[str, int], ids: Sequence[str], where: str) -> None:
    first: dict[int, str] = {}
    for name, row in record_of.items():
        if row in first:
            raise InputError(
                f"{where}: contigs {first[row]!r} and {name!r} would both be {ids[row]!r}; name "
                "each as the sequences do"
            )
        first[row] = name


def _some(names: Sequence[str]) -> str:
    dots = ", ..." if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + dots
