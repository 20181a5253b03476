"""`variants`: what a model says of both alleles of each variant, as a table and as a VCF."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import NUM_BASES, encode, reverse_complement
from pipelines.genomics.ingest import require_input
from pipelines.genomics.lines import read_lines
from pipelines.genomics.predict import ModelRun
from pipelines.genomics.selection import (
    Windows,
    check_variants,
    describe_variants,
    select_variants,
)
from pipelines.genomics.store import SequenceStore
from pipelines.genomics.tasks import (
    DnaObjective,
    is_odds,
    name_outputs,
    read_values,
    score_outputs,
)
from pipelines.genomics.variants import (
    PlacedVariant,
    ReferencePolicy,
    allele_windows,
)
from pipelines.shared.objective import DECIMALS
from pipelines.shared.tables import write_table

_COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
_NUM_COLUMNS = 8


def variants(config: dict[str, Any]) -> int:
    """Score every allele; 0, or 3 if some fell out and are listed."""
    require_input(config)
    check_variants(config)
    return _VariantRun({**config, "outputs": ["tsv"]}).score_variants()


@dataclass(frozen=True, slots=True)
class View:
    """One window: of which variant, held at which end, with which allele, from which strand."""

    variant: int
    anchor: str
    allele: int
    strand: str


class AlleleViews:
    """Windows with REF and with ALT, equally long; see `anchored_windows`."""

    def __init__(
        self,
        store: SequenceStore,
        placed: Sequence[PlacedVariant],
        width: int,
        *,
        policy: ReferencePolicy,
        strands: str,
    ) -> None:
        self.store, self.placed, self.width, self.policy = store, tuple(placed), width, policy
        self.views = [
            View(number, anchor, allele, strand)
            for number, item in enumerate(self.placed)
            for anchor in ("left", "right")[: 1 + (len(item.variant.ref) != len(item.variant.alt))]
            for strand in strands
            for allele in (0, 1)
        ]
        self._pair = lru_cache(maxsize=64)(self._read_pair)
        self.lengths = np.array(
            [self._pair(view.variant, view.anchor)[0].size for view in self.views], dtype=np.int64
        )

    def read(self, index: int, start: int, end: int) -> UInt8[ndarray, "T"]:
        """Read the bases [start, end) of a window."""
        view = self.views[index]
        bases = self._pair(view.variant, view.anchor)[view.allele]
        return (reverse_complement(bases) if view.strand == "-" else bases)[start:end]

    def _read_pair(self, variant: int, anchor: str) -> tuple[ndarray, ndarray]:
        item = self.placed[variant]
        return anchored_windows(self.store, item, self.width, policy=self.policy, anchor=anchor)


def anchored_windows(
    store: SequenceStore,
    placed: PlacedVariant,
    width: int,
    *,
    policy: ReferencePolicy,
    anchor: str,
) -> tuple[UInt8[ndarray, "W"], UInt8[ndarray, "W"]]:
    """Windows around a variant with REF and with ALT, both of `width` bases at most, equally long.

    Held at the left, what follows an insertion or deletion is shifted; held at the right, what goes
    before it. Where a record ends, both are as long as the shorter one.
    """
    if anchor == "left":
        _, ref, alt = allele_windows(store, placed, width, policy=policy)
        size = min(ref.size, alt.size)
        return ref[:size], alt[:size]
    variant, record = placed.variant, placed.record
    length = int(store.lengths[record])
    here = store.read(record, variant.start, variant.end)
    here = encode(variant.ref) if policy == "use_vcf" else here
    other = encode(variant.alt)
    shorter = min(here.size, other.size)
    # as many bases behind for both alleles, and for alleles that are swapped
    behind = max(width - width // 2 - shorter, width - shorter - variant.start, 0)
    right = store.read(record, variant.end, min(variant.end + behind, length))
    room = max(width - right.size - shorter, 0)
    left = store.read(record, max(variant.start - room, 0), variant.start)
    ref, alt = (np.concatenate([left, allele, right])[-width:] for allele in (here, other))
    size = min(ref.size, alt.size)
    return ref[ref.size - size :], alt[alt.size - size :]


class _VariantRun(ModelRun):
    """Scores of both alleles of every variant of a file."""

    def score_variants(self) -> int:
        checked = select_variants(self.config, self.store)
        table = describe_variants(checked, self.store)
        strands = "+-" if self.config["both_strands"] else "+"
        views = AlleleViews(
            self.store,
            checked.placed,
            self.context,
            policy=self.config["check_ref"],
            strands=strands,
        )
        names = [f"{table['id'][v.variant]}:{v.anchor}:{v.strand}:{v.allele}" for v in views.views]
        windows = self._windows(views, names)
        scores = self._score(windows, table, checked.notes(), checked.failures)
        if scores is None:
            return 3 if checked.failures else 0
        logits = mean_logits(self._by_window(scores.logits, windows), views.views, len(table))
        table = pd.concat([table, describe_effects(logits, self.objective)], axis=1)
        counts = np.bincount([view.variant for view in views.views], minlength=len(table))
        table["num_windows"] = counts
        table["flags"] = _flags(views, len(table))
        written = [self.out / "variants.tsv", self.out / "variants.vcf"]
        write_table(written[0], table)
        write_vcf(written[1], Path(self.config["variants"]), table, checked.placed, self.objective)
        return self._finish(written, table, windows, checked.failures)

    def _by_window(self, logits: Float[ndarray, "N C"], windows: Windows) -> Float[ndarray, "W C"]:
        """Numbers of each window; of tracks, the mean over its bases."""
        found = logits.astype(np.float64)
        if not self.along:
            return found
        lengths = np.array(windows.lengths)
        return np.add.reduceat(found, np.cumsum(lengths) - lengths, axis=0) / lengths[:, None]


def mean_logits(
    logits: Float[ndarray, "W C"], views: Sequence[View], num_variants: int
) -> Float[ndarray, "V 2 C"]:
    """Average the windows of each allele, over strands and ends."""
    rows: Int64[ndarray, W] = np.array([2 * view.variant + view.allele for view in views])
    total = np.zeros((2 * num_variants, logits.shape[1]))
    np.add.at(total, rows, logits)
    mean = total / np.bincount(rows, minlength=2 * num_variants)[:, None]
    return mean.reshape(num_variants, 2, -1)


def describe_effects(logits: Float[ndarray, "V 2 C"], objective: DnaObjective) -> pd.DataFrame:
    """Say of each output what REF and ALT give it and the difference.

    Of classes and labels these are probabilities, and the difference of log odds stands beside.
    """
    ref, alt = (read_values(objective, logits[:, allele]).round(DECIMALS) for allele in (0, 1))
    odds = score_outputs(objective, logits)
    columns = {}
    for column, name in enumerate(name_outputs(objective)):
        columns[f"ref_{name}"], columns[f"alt_{name}"] = ref[:, column], alt[:, column]
        columns[f"delta_{name}"] = (alt[:, column] - ref[:, column]).round(DECIMALS)
        if is_odds(objective):
            columns[f"log_odds_{name}"] = (odds[:, 1, column] - odds[:, 0, column]).round(DECIMALS)
    return pd.DataFrame(columns)


def write_vcf(
    path: Path,
    source: Path,
    table: pd.DataFrame,
    placed: Sequence[PlacedVariant],
    objective: DnaObjective,
) -> None:
    """Write the lines of a VCF again, with the scores of their alleles in INFO.

    An allele that was left out has a dot. Names of outputs lose what INFO does not allow.
    """
    rows = {(item.written.source, item.written.alt): row for row, item in enumerate(placed)}
    keys = {
        f"{word}_{_info_name(name, place)}": f"{column}_{name}"
        for place, name in enumerate(name_outputs(objective))
        for word, column in (("DELTA", "delta"), ("LOGODDS", "log_odds"))[: 1 + is_odds(objective)]
    }
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in _lines(source, table, rows, keys))
    os.replace(aside, path)


def _lines(
    source: Path,
    table: pd.DataFrame,
    rows: dict[tuple[str, str], int],
    keys: dict[str, str],
) -> Iterator[str]:
    described = False
    for number, line in read_lines(source, "VCF file"):
        if line.startswith("##"):
            yield line
            continue
        if not described:
            yield from _header(keys)
            described = True
            if not line.startswith("#CHROM"):
                yield _COLUMNS
        if line.startswith("#") or not line.strip():
            yield line
            continue
        fields = line.split("\t")
        fields += ["."] * (_NUM_COLUMNS - len(fields))
        name = f"{source}: line {number:,}"
        alleles = [alt.strip().upper().replace("U", "T") for alt in fields[4].split(",")]
        found = [rows.get((name, alt)) for alt in alleles]
        fields[7] = ";".join([*_kept(fields[7]), *_said(table, found, keys)])
        yield "\t".join(fields)


def _header(keys: dict[str, str]) -> Iterator[str]:
    yield '##INFO=<ID=REF_MATCH,Number=1,Type=Integer,Description="REF stands in the sequences">'
    for key, column in keys.items():
        yield (
            f'##INFO=<ID={key},Number=A,Type=Float,Description="{column}: ALT minus REF, mean of '
            'strands and of windows held at either end">'
        )


def _kept(info: str) -> list[str]:
    return [] if info in (".", "") else [info]


def _said(table: pd.DataFrame, found: Sequence[int | None], keys: dict[str, str]) -> Iterator[str]:
    known = [row for row in found if row is not None]
    if not known:
        return
    yield f"REF_MATCH={int(table['ref_match'][known[0]])}"
    for key, column in keys.items():
        values = ("." if row is None else f"{table[column][row]:g}" for row in found)
        yield f"{key}={','.join(values)}"


def _info_name(name: str, place: int) -> str:
    plain = re.sub(r"[^A-Za-z0-9_.]", "_", name)
    return plain if plain == name else f"{plain}_{place}"


def _flags(views: AlleleViews, num_variants: int) -> list[str]:
    """Say which variants stand too near an end for a full window, and which among other letters."""
    said: list[list[str]] = [[] for _ in range(num_variants)]
    for index, view in enumerate(views.views):
        if (view.anchor, view.strand, view.allele) != ("left", "+", 0):
            continue
        size = int(views.lengths[index])
        unclear = int(np.count_nonzero(views.read(index, 0, size) > NUM_BASES))
        if size < views.width:
            said[view.variant].append(f"window of {size:,} bases")
        if unclear:
            said[view.variant].append(f"{unclear:,} ambiguous bases")
    return ["; ".join(words) for words in said]
