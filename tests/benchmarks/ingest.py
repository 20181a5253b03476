"""Ingest against Biopython's SimpleFastaParser on the same file, turn by turn in one run.

    python tests/benchmarks/ingest.py RECORDS.fa.gz [REPEATS] [FOLDER]

Unpacks the file beside, then takes turns: the parser alone over the unpacked text (sequences are
joined and thrown away), ingest of that text and of the gzip file, each with every letter checked
and counted, digests of source, records and content, and the store written; the store of the turn
before is removed outside the clock. Medians of wall and CPU seconds, of all threads. Bars: 0.4 of
the parser's rate, 0.25 from gzip, both by wall clock; 0.35 byte a base on disk. Then the digest for
several numbers of workers. Exits with 1 where one is missed.
"""

import gzip
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from Bio.SeqIO.FastaIO import SimpleFastaParser

from pipelines.genomics.ingest import ingest
from pipelines.genomics.store import SequenceStore

PLAIN_BAR, GZIP_BAR, DISK_BAR = 0.4, 0.25, 0.35
WORKERS = (1, 2, 3, 8)


def main(packed: str, repeats: int = 7, folder: str | None = None) -> int:
    """Print a table; 0 if all bars are met."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        plain, store = Path(scratch) / "records.fa", Path(scratch) / "store"
        with gzip.open(packed, "rb") as source, plain.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        jobs: dict[str, Callable[[], object]] = {
            "SimpleFastaParser": lambda: _parse(plain),
            "ingest": lambda: ingest(plain, store, progress=False),
            "ingest of .gz": lambda: ingest(packed, store, progress=False),
        }
        seconds = _take_turns(jobs, repeats, store)
        made = SequenceStore(store)
        rates = _print_table(seconds, made.counts.bases)
        on_disk = _disk_bytes(store) / made.counts.bases
        digests = {made.fingerprint}
        for number in WORKERS:
            shutil.rmtree(store)
            digests.add(ingest(plain, store, num_workers=number, progress=False).fingerprint)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\n{made.counts}: {on_disk:.3f} byte a base on disk; peak memory {peak:,.0f} MiB")
    print(f"content digests for {WORKERS} workers and .gz: {len(digests)} ({min(digests)[:16]}...)")
    met = [
        rates["ingest"] >= PLAIN_BAR,
        rates["ingest of .gz"] >= GZIP_BAR,
        on_disk <= DISK_BAR,
        len(digests) == 1,
    ]
    print("all bars met" if all(met) else f"missed: {met}")
    return 0 if all(met) else 1


def _take_turns(
    jobs: dict[str, Callable[[], object]], repeats: int, store: Path
) -> dict[str, list[tuple[float, float]]]:
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for turn in range(repeats + 1):
        for name, job in jobs.items():
            shutil.rmtree(store, ignore_errors=True)
            wall, cpu = time.perf_counter(), time.process_time()
            job()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if turn:  # the first is for the file cache and the imports
                seconds[name].append(spent)
    return seconds


def _print_table(seconds: dict[str, list[tuple[float, float]]], bases: int) -> dict[str, float]:
    print("| | wall s | CPU s | Mbp/s | Mbp per CPU s | rate of the parser | by CPU |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    medians = {
        name: tuple(statistics.median(column) for column in zip(*spent, strict=True))
        for name, spent in seconds.items()
    }
    first = next(iter(medians.values()))
    rates = {}
    for name, (wall, cpu) in medians.items():
        rates[name] = first[0] / wall
        print(
            f"| {name} | {wall:.3f} | {cpu:.3f} | {bases / wall / 1e6:,.0f} | "
            f"{bases / cpu / 1e6:,.0f} | {rates[name]:.2f} | {first[1] / cpu:.2f} |"
        )
    return rates


def _parse(path: Path) -> int:
    with path.open(encoding="utf-8") as handle:
        return sum(len(sequence) for _, sequence in SimpleFastaParser(handle))


def _disk_bytes(folder: Path) -> int:
    return sum(512 * entry.stat().st_blocks for entry in folder.rglob("*"))


if __name__ == "__main__":
    path, *rest = sys.argv[1:]
    raise SystemExit(main(path, *map(int, rest[:1]), *rest[1:]))
