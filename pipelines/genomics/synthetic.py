"""DNA whose class is told by the order and distance of two motifs, and by nothing local.

Records come in pairs, one of each class, made of the same motifs and the same background letters;
only the placement differs. In class 1 the second motif follows the first at a right distance:

    class 1   ------M1----------M2------------      right order, right distance
    class 0   ------M2----------M1------------      other order, or
    class 0   --M1----------------------M2----      right order, too far

So counts of words are equal (but where motif and background meet), and so is all that a local model
sees: each gap is wider than two of its reaches, as a token half way between two motifs hears of
both, and the motifs keep more than one reach away from the ends, where position is told. A pair may
be read from the other strand; its classes stay, so reverse-complement augmentation is sound.
Backgrounds are random letters, or stretches of real DNA.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.random import Generator

from pipelines.genomics.alphabet import NUM_BASES, decode, encode, reverse_complement
from pipelines.genomics.genome import read_records
from pipelines.shared.errors import InputError

_LINE = 80
_SHARES = {"train": (0.0, 0.6), "val": (0.6, 0.8), "test": (0.8, 1.0)}
"""What part of each record of real DNA is background for a split."""
_ATTEMPTS = 1_000

Draw = Callable[[int, Generator], str]
"""Draws so many letters of background."""


@dataclass(frozen=True, slots=True)
class MotifPlan:
    """What the records look like; lengths and gaps in bases, ranges with both ends included.

    Raises ValueError when motifs could be confused or a local model could see the class.
    """

    length: int = 384
    reach: int = 40
    """How far the local model sees that must stay at chance: radius times depth, and its stem."""
    motifs: tuple[str, str] = ("CCAACACCAAAC", "GAAGGAGAAAGG")
    copies: int = 3
    """How often a motif stands in a row where it is planted; fewer are harder to find."""
    right_gap: tuple[int, int] = (84, 130)
    """Bases between the motifs in class 1, and in class 0 with the other order."""
    wrong_gap: tuple[int, int] = (170, 228)
    """Bases between the motifs in class 0 with the right order."""
    wrong_gap_share: float = 0.25
    """Share of pairs whose class 0 has the right order; 0 leaves the order alone to tell."""
    reverse_share: float = 0.5
    """Share of pairs read from the other strand."""

    def __post_init__(self) -> None:
        for name in ("motifs", "right_gap", "wrong_gap"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_motifs(self.motifs)
        if self.copies < 1:
            raise ValueError(f"a motif is planted at least once; got {self.copies=}")
        gaps = [self.right_gap, self.wrong_gap] if self.wrong_gap_share else [self.right_gap]
        if min(low for low, _ in gaps) <= 2 * self.reach:
            raise ValueError(f"gaps must exceed two reaches; got {gaps=}, {self.reach=}")
        if any(low > high for low, high in gaps):
            raise ValueError(f"a gap's range must not be empty; got {gaps=}")
        if self.wrong_gap_share and self.right_gap[1] >= self.wrong_gap[0]:
            raise ValueError(f"wrong gaps must lie above right ones; got {gaps=}")
        needed = 2 * self.margin + self.motif_bases + max(high for _, high in gaps)
        if self.length < needed:
            raise ValueError(f"these gaps and margins need {needed} bases; got {self.length=}")

    @property
    def margin(self) -> int:
        """Bases between a motif and the nearer end, at least."""
        return self.reach + 1

    @property
    def motif_bases(self) -> int:
        """Bases of both motifs, with all copies."""
        return self.copies * sum(map(len, self.motifs))


@dataclass(frozen=True, slots=True)
class MotifRecord:
    """One synthetic record; both records of a `pair` belong into one split."""

    sequence: str
    label: int
    pair: int


def check_motifs(motifs: tuple[str, ...]) -> None:
    """Raise ValueError when a motif or its reverse complement holds or overlaps another.

    Two overlap when an end of one, half a motif or longer, is a beginning of the other: then a
    stretch of letters could be read as both.
    """
    if len(motifs) != 2 or not all(set(motif) <= set("ACGT") and motif for motif in motifs):
        raise ValueError(f"two motifs of A C G T are needed; got {motifs}")
    words = [word for motif in motifs for word in (motif, _opposite(motif))]
    for i, first in enumerate(words):
        for j, second in enumerate(words):
            if i != j and (first in second or _overlap(first, second)):
                raise ValueError(f"motifs can be confused: {first} and {second}; choose others")


def make_records(
    plan: MotifPlan, *, num_pairs: int, seed: int | Generator, draw: Draw | None = None
) -> list[MotifRecord]:
    """Draw pairs of records, class 1 before class 0 in each; random letters without `draw`."""
    generator = np.random.default_rng(seed)
    records = []
    for pair in range(num_pairs):
        positive, negative = _make_pair(plan, generator, draw or _random_letters)
        records += [MotifRecord(positive, 1, pair), MotifRecord(negative, 0, pair)]
    return records


class RealBackground:
    """Stretches of A C G T from files of DNA, each split's from its own part of every record.

    Raises InputError for a file that cannot be read, and where a split has no stretch that long.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self._names = ", ".join(map(str, files))
        self._records = [record.tokens for file in files for record in read_records(file)]

    def of(self, split: str) -> Draw:
        """Draw for a split; every start is as likely as another."""
        low, high = _SHARES[split]
        parts = [x[round(low * x.size) : round(high * x.size)] for x in self._records]

        def draw(length: int, generator: Generator) -> str:
            starts = np.array([max(part.size - length + 1, 0) for part in parts])
            for _ in range(_ATTEMPTS if starts.any() else 0):
                place = generator.integers(starts.sum())
                record = int(np.searchsorted(starts.cumsum(), place, side="right"))
                first = int(place - starts[:record].sum())
                stretch = parts[record][first : first + length]
                if ((stretch >= 1) & (stretch <= NUM_BASES)).all():
                    return decode(stretch)
            raise InputError(
                f"data.background: {self._names} has no {length:,} bases of A C G T in a row in "
                f"the {high - low:.0%} of each record that serve {split}; give longer records, or "
                "a smaller data.length"
            )

        return draw


def write_dataset(
    folder: str | Path,
    plan: MotifPlan | None = None,
    *,
    num_train: int = 2400,
    num_val: int = 200,
    num_test: int = 600,
    seed: int = 0,
    background: Sequence[str | Path] = (),
) -> tuple[Path, Path]:
    """Write `motifs.fa` and `motifs.tsv` (id, label, split, group: the pair), in mixed order.

    Numbers are of records, half of them of each class. Equal arguments give equal bytes. Motifs are
    planted into stretches of the files of `background`, or random letters.
    """
    sizes = {"train": num_train, "val": num_val, "test": num_test}
    if any(size % 2 for size in sizes.values()):
        raise ValueError(f"records come in pairs: even numbers are needed; got {sizes}")
    plan, generator = plan or MotifPlan(), np.random.default_rng(seed)
    real = RealBackground(background) if background else None
    records: list[MotifRecord] = []
    for split, size in sizes.items():
        draw = None if real is None else real.of(split)
        for record in make_records(plan, num_pairs=size // 2, seed=generator, draw=draw):
            records.append(replace(record, pair=len(records) // 2))
    splits = np.repeat(list(sizes), list(sizes.values()))
    order = np.random.default_rng((seed, 1)).permutation(len(records))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fasta, table = folder / "motifs.fa", folder / "motifs.tsv"
    rows = ["id\tlabel\tsplit\tgroup"]
    entries = []
    for number, index in enumerate(order):
        record = records[index]
        rows.append(f"seq{number:05d}\t{record.label}\t{splits[index]}\tpair{record.pair:05d}")
        entries.append(f">seq{number:05d}\n{_wrap(record.sequence)}")
    _write_lines(fasta, entries)
    _write_lines(table, rows)
    return fasta, table


def _random_letters(length: int, generator: Generator) -> str:
    return decode(generator.integers(1, 5, length, np.uint8))


def _make_pair(plan: MotifPlan, generator: Generator, draw: Draw) -> tuple[str, str]:
    first, second = (motif * plan.copies for motif in plan.motifs)
    while True:
        background = draw(plan.length - plan.motif_bases, generator)
        places = _draw_places(plan, plan.right_gap, generator)
        positive = _plant(background, (first, second), places)
        if generator.random() < plan.wrong_gap_share:
            places = _draw_places(plan, plan.wrong_gap, generator)
            negative = _plant(background, (first, second), places)
        else:
            negative = _plant(background, (second, first), places)
        if _holds_only_planted(positive, plan) and _holds_only_planted(negative, plan):
            break
    if generator.random() < plan.reverse_share:
        return _opposite(positive), _opposite(negative)
    return positive, negative


def _draw_places(plan: MotifPlan, gaps: tuple[int, int], generator: Generator) -> tuple[int, int]:
    """Cut the background twice: the motifs stand where it is cut."""
    gap = int(generator.integers(gaps[0], gaps[1] + 1))
    last = plan.length - plan.motif_bases - plan.margin - gap
    start = int(generator.integers(plan.margin, last + 1))
    return start, start + gap


def _plant(background: str, motifs: tuple[str, str], places: tuple[int, int]) -> str:
    start, end = places
    return background[:start] + motifs[0] + background[start:end] + motifs[1] + background[end:]


def _holds_only_planted(sequence: str, plan: MotifPlan) -> bool:
    """Refuse a motif that the background holds by chance, on either strand."""
    return all(
        sequence.count(motif) == plan.copies and _opposite(motif) not in sequence
        for motif in plan.motifs
    )


def _overlap(first: str, second: str) -> bool:
    shortest = min(len(first), len(second)) // 2
    return any(
        first.endswith(second[:size]) for size in range(shortest, min(len(first), len(second)))
    )


def _opposite(sequence: str) -> str:
    return decode(reverse_complement(encode(sequence)))


def _wrap(sequence: str) -> str:
    return "\n".join(sequence[i : i + _LINE] for i in range(0, len(sequence), _LINE))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
