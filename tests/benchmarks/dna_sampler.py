"""Training batches out of the DataLoader against one Zarr slice a window, in one run on one store.

    python tests/benchmarks/dna_sampler.py [MEGABASES] [SEQUENCES] [FOLDER]

Ingests SEQUENCES (any format; without it random letters with runs of N, of which 30 % are soft
masked) repeated up to MEGABASES into a store in FOLDER. Then takes an epoch's batches (labels,
soft mask, half of the windows from the other strand, shards read on the way) out of a DataLoader
with one worker, and the same windows by a slice of the Zarr array each. Starting the worker
counts, so that small stores look slow; CPU seconds are those of both processes, for a machine that
others use too. Bars: 50,000 windows/s of 512 bp, 500 Mbp/s of 131,072 bp. Exits with 1 where one
is missed.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr

from pipelines.genomics.alphabet import decode
from pipelines.genomics.data import WindowDataset
from pipelines.genomics.genome import read_records
from pipelines.genomics.ingest import ingest
from pipelines.genomics.packing import PER_BYTE, unpack
from pipelines.genomics.sampler import ShardSampler
from pipelines.genomics.store import SequenceStore

CONTEXTS = (512, 16_384, 131_072)
TOKENS = 1 << 20
SLICES = 400
MIN_WINDOWS, MIN_MEGABASES = 50_000, 500


def main(megabases: int = 1_600, sequences: str | None = None, folder: str | None = None) -> int:
    """Print a table; 0 if both bars are met."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fasta = Path(scratch) / "records.fa"
        _write(fasta, megabases * 1_000_000, sequences)
        ingest(fasta, Path(scratch) / "store", progress=False)
        fasta.unlink()
        return _measure(Path(scratch) / "store")


def _measure(path: Path) -> int:
    store = SequenceStore(path, memory_bytes=0)
    print(
        f"{store.counts}; {len(store.shards())} shards; batches of {TOKENS:,} bases, one worker\n"
    )
    print("| windows of | windows/s | Mbp/s | CPU s per Gbp | slice each: windows/s | CPU ratio |")
    print("|--:|--:|--:|--:|--:|--:|")
    met = True
    for context in CONTEXTS:
        rate, megabases, cpu = _sampled(store, context)
        slices, slice_cpu = _sliced(store, context)
        ratio = slice_cpu / (cpu * context / 1e9)
        print(
            f"| {context:,} bp | {rate:,.0f} | {megabases:,.0f} | {cpu:.2f} | {slices:,.0f} | "
            f"{ratio:,.0f} x |"
        )
        met &= rate >= MIN_WINDOWS if context == CONTEXTS[0] else True
        met &= megabases >= MIN_MEGABASES if context == CONTEXTS[-1] else True
    print("both bars met" if met else "a bar is missed")
    return 0 if met else 1


def _sampled(store: SequenceStore, context: int) -> tuple[float, float, float]:
    """Windows/s, Mbp/s and CPU seconds per Gbp of a whole epoch, from starting the worker on."""
    windows = WindowDataset(
        store,
        range(len(store)),
        np.arange(len(store)) % 3,
        context=context,
        reverse_complement=True,
    )
    sampler = ShardSampler(windows, max_tokens=TOKENS, soft_mask=True)
    bases, count, flipped = 0, 0, 0
    cpu, started = _cpu_seconds(), time.perf_counter()
    for (batch,) in sampler.loader(num_workers=1):
        assert batch.targets is not None
        assert batch.soft_mask is not None
        bases += len(batch.inputs)
        count += len(batch.targets)
        flipped += int(batch.flipped.sum())
    seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    assert bases == sum(windows.lengths), "every window comes once"
    assert 0.4 < flipped / count < 0.6, "half are read from the other strand"
    return count / seconds, bases / seconds / 1e6, cpu / bases * 1e9


def _sliced(store: SequenceStore, context: int) -> tuple[float, float]:
    """Windows/s, and CPU seconds of each, by one slice of the Zarr array a window."""
    bases = zarr.open_group(store.path, mode="r")["bases"]  # packed: a quarter of the bytes
    starts = np.random.default_rng(0).integers(0, store.num_positions - context, SLICES).tolist()
    cpu, started = _cpu_seconds(), time.perf_counter()
    for start in starts:
        packed = bases[start // PER_BYTE : -(-(start + context) // PER_BYTE)]
        torch.from_numpy(unpack(packed)[start % PER_BYTE :][:context])
    seconds, cpu = time.perf_counter() - started, _cpu_seconds() - cpu
    return SLICES / seconds, cpu / SLICES


def _cpu_seconds() -> float:
    """Of this process and of workers that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _write(path: Path, num_bases: int, sequences: str | None) -> None:
    """Write a FASTA file of `num_bases` or a little more."""
    texts = _random_letters() if sequences is None else _repeated(sequences)
    written = 0
    with path.open("w", encoding="ascii") as file:
        for number, text in enumerate(texts):
            file.write(f">record_{number}\n{text}\n")
            written += len(text)
            if written >= num_bases:
                return


def _random_letters():
    generator = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT", np.uint8)
    while True:
        text = letters[generator.integers(0, 4, 20_000_000)]
        masked = np.repeat(generator.random(len(text) // 1_000) < 0.3, 1_000)
        text = np.where(masked, text + np.uint8(32), text)
        text[1_000_000:1_050_000] = ord("N")
        yield text.tobytes().decode("ascii")


def _repeated(sequences: str):
    while True:
        for record in read_records(sequences):
            yield decode(record.tokens)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    raise SystemExit(main(*map(int, arguments[:1]), *arguments[1:]))
