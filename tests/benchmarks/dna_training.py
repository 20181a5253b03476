"""Training steps on DNA from 1 k to 1 M bases a sequence: tokens/s, memory, waiting for data.

    python -m tests.benchmarks.dna_training [--contexts 1024 ...] [--device cuda] [--out DIR]

A classifier (6 layers of 256, window of 64 bases to each side and 4 registers, convolution stem)
trains on windows of random bases that one worker cuts from a store of several shards, in bfloat16
on a GPU: forward, loss, backward, clipping, AdamW. Batches hold at least 131,072 bases. Memory is
what PyTorch's allocator held at most; waiting is the share of a step in which no batch was there
yet. The last context is run with its layers recomputed in backward, too.
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from pipelines.genomics.data import WindowDataset
from pipelines.genomics.ingest import ingest
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.sampler import WindowBatch
from pipelines.genomics.store import SequenceStore
from pipelines.shared.optim import OptimSettings, build_optimizer

CONTEXTS = (1_024, 4_096, 16_384, 65_536, 131_072, 262_144, 1_048_576)
TOKENS = 131_072
SIZES = {"dim": 256, "depth": 6, "num_heads": 4, "mlp_ratio": 4.0, "num_classes": 2}
PATTERN = "SlidingWindow(radius=64) | GlobalTokens(first=4)"
WARM_UP, STEPS = 5, 12


@dataclass(frozen=True)
class Row:
    """One context: bases of a step, its median seconds, the share of waiting, bytes at most."""

    context: int
    checkpointing: bool
    bases: int
    seconds: float
    waiting: float
    peak_bytes: int


def main() -> int:
    """Measure, print a table; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, {SIZES['depth']} layers of {SIZES['dim']}, {PATTERN}"
    )
    print("| bases | checkpointing | tokens/s | step, ms | waiting | GB at most |")
    print("|--:|---|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as scratch:
        windows = max(given.contexts) * (WARM_UP + STEPS + 2)
        store = _random_store(Path(scratch), max(windows, 8 * TOKENS * (WARM_UP + STEPS)))
        for context in given.contexts:
            for checkpointing in (False, True) if context == max(given.contexts) else (False,):
                rows.append(_measure(store, context, given.device, checkpointing=checkpointing))
                print(_line(rows[-1]), flush=True)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(row) for row in rows], indent=1)
        (given.out / "dna_training.json").write_text(text, encoding="utf-8")
    return 0


def _measure(store: SequenceStore, context: int, device: str, *, checkpointing: bool) -> Row:
    torch.manual_seed(0)
    network = DnaClassifier(
        pattern=PATTERN, rc="augment", checkpointing=checkpointing, **SIZES
    ).to(device)  # fmt: skip
    optimizer, _ = build_optimizer(network, OptimSettings(), total_steps=1_000)
    gc.collect()
    on_gpu = device == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bases, seconds, waits = 0, [], []
    batches = _batches(store, context)
    for step in range(WARM_UP + STEPS):
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        pack = batch.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=on_gpu):
            logits = network(pack).logits.float()
        assert pack.targets is not None, "windows have a class"
        cross_entropy(logits, pack.targets).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()
        if step >= WARM_UP:
            seconds.append(time.perf_counter() - started)
            waits.append(waited)
            bases = max(bases, len(batch.inputs))
    peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    share = sum(waits) / sum(seconds)
    return Row(context, checkpointing, bases, statistics.median(seconds), share, peak)


def _batches(store: SequenceStore, context: int) -> Iterator[WindowBatch]:
    """Take batches epoch after epoch."""
    classes = np.arange(len(store)) % 2
    windows = WindowDataset(
        store, range(len(store)), classes, context=context, reverse_complement=True
    )
    for epoch in itertools.count():
        sampler = windows.batches(epoch=epoch, max_tokens=max(context, TOKENS))
        for (batch,) in sampler.loader(num_workers=1):
            yield batch


def _random_store(folder: Path, num_bases: int) -> SequenceStore:
    generator = np.random.default_rng(0)
    letters = np.frombuffer(b"ACGT", np.uint8)
    fasta = folder / "records.fa"
    with fasta.open("w", encoding="ascii") as file:
        for number in range(2):
            text = letters[generator.integers(0, 4, num_bases // 2)].tobytes().decode("ascii")
            file.write(f">record_{number}\n{text}\n")
    ingest(fasta, folder / "store", progress=False)
    return SequenceStore(folder / "store", memory_bytes=0)


def _line(row: Row) -> str:
    return (
        f"| {row.context:,} | {'on' if row.checkpointing else 'off'} | "
        f"{row.bases / row.seconds:,.0f} | {row.seconds * 1e3:.1f} | {row.waiting:.1%} | "
        f"{row.peak_bytes / 1e9:.1f} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
