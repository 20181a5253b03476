"""What predict writes: tables, embeddings, and scores along the sequences."""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import zarr
from jaxtyping import Float, Int64
from numpy import ndarray

from pipelines.genomics.selection import Intervals, Windows
from pipelines.genomics.tracks import (
    Track,
    blend,
    join_equal,
    require_bigwig,
    write_bedgraph,
    write_bigwig,
)
from pipelines.shared.errors import InputError
from pipelines.shared.tables import write_table

KINDS = ("tsv", "parquet", "embeddings", "bedgraph", "bigwig")
TRACKS = ("bedgraph", "bigwig")

EMBEDDINGS_SCHEMA = "gigasparse-embeddings/1"


def check_outputs(kinds: Sequence[str]) -> None:
    """Raise InputError for an output that there is not, or that cannot be written here."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise InputError(f"outputs are of {', '.join(KINDS)}; got {', '.join(kinds) or 'none'}")
    if "parquet" in kinds and importlib.util.find_spec("pyarrow") is None:
        raise InputError("parquet needs the package pyarrow: pip install 'gigasparse[parquet]'")
    if "bigwig" in kinds:
        require_bigwig()


def write_predictions(out: Path, table: pd.DataFrame, kinds: Sequence[str]) -> list[Path]:
    """Write the table of predictions as the outputs ask for; returns what was written."""
    written = []
    if "tsv" in kinds:
        written.append(out / "predictions.tsv")
        write_table(written[-1], table)
    if "parquet" in kinds:
        written.append(out / "predictions.parquet")
        aside = _aside(written[-1])
        table.to_parquet(aside, index=False)
        os.replace(aside, written[-1])
    return written


def write_embeddings(
    out: Path, table: pd.DataFrame, embeddings: Float[ndarray, "R E"]
) -> list[Path]:
    """Write a Zarr group: `embeddings` float32 [R, E], and what `write_places` says of its rows."""
    path = out / "embeddings.zarr"
    aside = _aside(path)
    group = zarr.create_group(aside)
    group.create_array("embeddings", data=embeddings.astype(np.float32))
    write_places(group, table)
    group.attrs["schema"] = EMBEDDINGS_SCHEMA
    shutil.rmtree(path, ignore_errors=True)
    os.replace(aside, path)
    return [path]


def write_places(group: zarr.Group, table: pd.DataFrame) -> None:
    """Write ids, contigs, strands, start and end (0-based, half-open) of the rows of a table.

    Texts are one blob of UTF-8, a line each, as Zarr v3 has no settled type for strings.
    """
    for name, column in {"ids": "id", "contigs": "contig", "strands": "strand"}.items():
        text = "".join(f"{value}\n" for value in table[column]).encode()
        group.create_array(name, data=np.frombuffer(text, dtype=np.uint8))
    for name in ("start", "end"):
        group.create_array(name, data=table[name].to_numpy(dtype=np.int64))


def read_embeddings(path: Path) -> tuple[list[str], Float[ndarray, "R E"]]:
    """Read what `write_embeddings` wrote: ids and vectors."""
    group = zarr.open_group(path, mode="r")
    names = np.asarray(group["ids"][:]).tobytes().decode().split("\n")[:-1]
    return names, np.asarray(group["embeddings"][:])


def write_tracks(
    out: Path,
    kinds: Sequence[str],
    intervals: Intervals,
    windows: Windows,
    values: Mapping[str, Float[ndarray, "W"]],
    *,
    per_base: bool,
) -> list[Path]:
    """Write a track of each output: a base has the mean of the windows over it.

    `values` are those of windows, or of all their bases, window after window.
    """
    wanted = [kind for kind in TRACKS if kind in kinds]
    if not wanted:
        return []
    store = intervals.store
    make = _tracks_of_bases if per_base else _tracks_of_windows
    written = []
    for name, track in make(intervals, windows, values):
        stem = out / "tracks" / _file_name(name)
        if "bedgraph" in wanted:
            written.append(stem.with_name(f"{stem.name}.bedgraph"))
            write_bedgraph(written[-1], track, store.ids, name=name)
        if "bigwig" in wanted:
            written.append(stem.with_name(f"{stem.name}.bw"))
            sizes = dict(zip(store.ids, store.lengths.tolist(), strict=True))
            write_bigwig(written[-1], track, sizes)
    return written


def _tracks_of_windows(
    intervals: Intervals, windows: Windows, values: Mapping[str, Float[ndarray, "W"]]
) -> Iterator[tuple[str, Track]]:
    order, records, starts, ends = _places(intervals, windows).T
    for name, column in values.items():
        yield name, blend(records, starts, ends, column[order])


def _tracks_of_bases(
    intervals: Intervals, windows: Windows, values: Mapping[str, Float[ndarray, "N"]]
) -> Iterator[tuple[str, Track]]:
    records, bases = _bases(intervals, windows)
    known = bases >= 0
    for name, column in values.items():
        tracks = [
            join_equal(int(record), bases[mine], column[mine])
            for record in np.unique(records[known])
            for mine in [known & (records == record)]
        ]
        yield name, Track.of(tracks)


def _bases(
    intervals: Intervals, windows: Windows
) -> tuple[Int64[ndarray, " N"], Int64[ndarray, " N"]]:
    """Record and place of every base of every window, as it is read; -1 beyond a record."""
    records, bases = [], []
    for window in range(len(windows)):
        index = int(windows.records[window])
        record = intervals.placed[index].record
        span = int(windows.starts[window]), int(windows.ends[window])
        for part in intervals.where(index, *span):
            here = np.arange(part.start, part.end)
            bases.append(here[::-1] if part.strand == "-" else here)
        records.append(np.full(span[1] - span[0], record))
    owner, place = np.concatenate(records), np.concatenate(bases)
    inside = (place >= 0) & (place < intervals.store.lengths[owner])
    return owner, np.where(inside, place, -1)


def _places(intervals: Intervals, windows: Windows) -> ndarray:
    """Where windows lie: rows of window, record, start and end; several where one is spliced."""
    rows = []
    for window in range(len(windows)):
        index = int(windows.records[window])
        record = intervals.placed[index].record
        length = int(intervals.store.lengths[record])
        span = int(windows.starts[window]), int(windows.ends[window])
        for part in intervals.where(index, *span):
            start, end = max(part.start, 0), min(part.end, length)
            if start < end:
                rows.append((window, record, start, end))
    return np.array(rows, dtype=np.int64).reshape(-1, 4)


def _file_name(name: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in name) or "class"


def _aside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.tmp-{os.getpid()}")
