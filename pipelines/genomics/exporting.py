"""`export`: a store's sequences, intervals cut from them, or checked variants, as files."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import pandas as pd
from Bio.bgzf import BgzfWriter
from jaxtyping import UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.ingest import require_input
from pipelines.genomics.placing import Placed, fetch, fetch_mask
from pipelines.genomics.progress import track
from pipelines.genomics.selection import (
    check_settings,
    check_variants,
    describe_variants,
    open_store,
    select_intervals,
    select_variants,
)
from pipelines.genomics.store import SequenceStore
from pipelines.shared.errors import InputError
from pipelines.shared.record import RunState, finish_run, make_folder, open_run
from pipelines.shared.tables import Failure, write_failures, write_table

_PIECE_BASES = 16 << 20
_NEWLINE = ord("\n")
_LOWER = 0x20
"""The bit that tells lower case from upper case in ASCII."""


def export(config: dict[str, Any]) -> int:
    """Write what was asked for; 0, or 3 if intervals or alleles fell out and are listed."""
    require_input(config)
    check_settings(config)
    if config["variants"]:
        if config["intervals"]:
            raise InputError("intervals= and variants= are two exports; give one of them")
        check_variants(config)
    if type(config["line_width"]) is not int or config["line_width"] < 0:
        raise InputError(f"line_width is 0 or more letters; got {config['line_width']!r}")
    out = Path(config["out"])
    if not config["dry_run"]:
        make_folder(out)
    store = open_store(config, out)
    if config["variants"]:
        return _export_variants(config, out, store)
    return _export_sequences(config, out, store)


def write_fasta(
    path: Path,
    store: SequenceStore,
    placed: Sequence[Placed],
    headers: Sequence[str],
    *,
    line_width: int = 60,
    compress: bool = False,
) -> None:
    """Write intervals as FASTA, soft-masked bases in lower case, aside and renamed.

    `line_width` 0 writes a line for each sequence. `compress` writes block gzip (BGZF).
    """
    with _aside(path, compress=compress) as file:
        items = zip(placed, headers, strict=True)
        for item, header in track(items, total=len(placed), label="export", unit="sequences"):
            file.write(f">{header}\n".encode())
            for start, end in _pieces(item.length, line_width):
                letters = _letters(store, item, start, end)
                file.write(_wrap(letters, line_width) if line_width else letters.tobytes())
            if not line_width:
                file.write(b"\n")


def _export_sequences(config: dict[str, Any], out: Path, store: SequenceStore) -> int:
    selection = select_intervals(config, store)
    name = "intervals" if config["intervals"] else "sequences"
    bases = sum(item.length for item in selection.placed)
    print(f"{name}: {len(selection.placed):,}, bases: {bases:,}")
    if not _begin(config, out, store, selection.table, selection.notes, selection.failures):
        return _code(selection.failures)
    headers = _interval_headers(selection.table)
    if not config["intervals"]:
        pairs = zip(store.ids, store.descriptions, strict=True)
        headers = [f"{name} {text}".rstrip() for name, text in pairs]
    path = out / f"{name}.fa{'.gz' * config['compress']}"
    write_fasta(
        path,
        store,
        selection.placed,
        headers,
        line_width=config["line_width"],
        compress=config["compress"],
    )
    written = [path]
    if config["intervals"]:
        written.append(out / "intervals.tsv")
        write_table(written[-1], selection.table)
    return _finish(out, written, len(selection.placed), selection.failures)


def _export_variants(config: dict[str, Any], out: Path, store: SequenceStore) -> int:
    checked = select_variants(config, store)
    table = describe_variants(checked, store)
    print(f"alleles: {len(table):,}")
    if not _begin(config, out, store, table, checked.notes(), checked.failures):
        return _code(checked.failures)
    path = out / "variants.tsv"
    write_table(path, table)
    return _finish(out, [path], len(table), checked.failures)


def _begin(
    config: dict[str, Any],
    out: Path,
    store: SequenceStore,
    table: pd.DataFrame,
    notes: Sequence[str],
    failures: Sequence[Failure],
) -> bool:
    """Say what is to be written; False for a dry run, and where it is written already."""
    for note in notes:
        print(f"note: {note}")
    if config["dry_run"]:
        print("dry run: nothing is written")
        return False
    chosen = hashlib.sha256(table.to_csv(index=False).encode()).hexdigest()
    if open_run(out, {**config, "data": store.fingerprint, "chosen": chosen}) is RunState.FINISHED:
        print(f"{out} holds this export already; give another out= to repeat it")
        return False
    write_failures(out / "failures.csv", failures, id_column="id")
    return True


def _finish(out: Path, written: Sequence[Path], rows: int, failures: Sequence[Failure]) -> int:
    finish_run(out, {"rows": rows, "left_out": len(failures)})
    for path in written:
        print(path)
    if failures:
        print(f"{len(failures):,} left out: {out / 'failures.csv'}")
    return _code(failures)


def _code(failures: Sequence[Failure]) -> int:
    return 3 if failures else 0


def _interval_headers(table: pd.DataFrame) -> list[str]:
    labels = table["label"] if "label" in table else pd.Series([None] * len(table))
    rows = zip(
        table["id"], table["contig"], table["start"], table["end"], table["strand"], labels,
        strict=True,
    )  # fmt: skip
    return [
        f"{name} {contig}:{start}-{end}({strand})" + (f" {label}" if label else "")
        for name, contig, start, end, strand, label in rows
    ]


def _letters(store: SequenceStore, item: Placed, start: int, end: int) -> UInt8[ndarray, "T"]:
    letters = _ASCII[fetch(store, item, start, end)]
    letters[fetch_mask(store, item, start, end)] |= _LOWER
    return letters


def _pieces(length: int, line_width: int) -> Iterator[tuple[int, int]]:
    step = max(_PIECE_BASES // (line_width or 1), 1) * (line_width or 1)
    for start in range(0, length, step):
        yield start, min(start + step, length)


def _wrap(letters: UInt8[ndarray, "T"], width: int) -> bytes:
    """Break letters into lines, each with its break, the last one too."""
    whole = letters.size // width * width
    lines = np.full((whole // width, width + 1), _NEWLINE, dtype=np.uint8)
    lines[:, :width] = letters[:whole].reshape(-1, width)
    rest = letters[whole:].tobytes()
    return lines.tobytes() + (rest + b"\n" if rest else b"")


@contextmanager
def _aside(path: Path, *, compress: bool) -> Iterator[BinaryIO]:
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    opened: Callable[[], Any] = (
        (lambda: BgzfWriter(str(aside))) if compress else (lambda: aside.open("wb"))
    )
    try:
        with opened() as file:
            yield cast(BinaryIO, file)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


_ASCII = np.frombuffer(b"-" + LETTERS.encode(), dtype=np.uint8)
