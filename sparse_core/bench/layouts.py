"""How long layouts of a million tokens take to build, and what they hold."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from sparse_core.bench.cases import MILLION
from sparse_core.building import build_layout
from sparse_core.layout import BlockLayout
from sparse_core.patterns import (
    Causal,
    Dense,
    DilatedWindow,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
    Strided,
)
from sparse_core.testing import make_tissue

PATTERNS: tuple[Pattern, ...] = (
    Dense(),
    Causal(),
    SlidingWindow(512),
    SlidingWindow(256) | GlobalTokens(64),
    DilatedWindow(512, 8),
    Strided(8, block=128),
    SlidingWindow(96) | GlobalTokens(128) | RandomBlocks(3, block=64),
)


@dataclass(frozen=True)
class LayoutFigure:
    """One layout: median time of building it, bytes without coordinates, pairs of blocks."""

    name: str
    seconds: float
    nbytes: int
    num_blocks: int


def measure_layouts(device: torch.device | str) -> Iterator[LayoutFigure]:
    """Build each layout a few times on the device."""
    for name, build in _builds(device):
        layout = build()
        seconds = median_seconds(build, device)
        yield LayoutFigure(name.replace("|", "or"), seconds, layout.nbytes(), layout.num_blocks)


def layout_lines(figures: list[LayoutFigure]) -> list[str]:
    """Write the figures as a Markdown table."""
    lines = ["| layout of 1,048,576 tokens | seconds | MB | blocks |", "|---|--:|--:|--:|"]
    for row in figures:
        size = f"{row.nbytes / 1e6:.1f}"
        lines.append(f"| {row.name} | {row.seconds:.4f} | {size} | {row.num_blocks:,} |")
    return lines


def median_seconds(
    run: Callable[[], object], device: torch.device | str = "cpu", *, repeats: int = 3
) -> float:
    """Time by the wall clock, what the device still has to do included."""
    is_cuda = torch.device(device).type == "cuda"
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _builds(device: torch.device | str) -> Iterator[tuple[str, Callable[[], BlockLayout]]]:
    for pattern in PATTERNS:
        yield repr(pattern), partial(build_layout, pattern, MILLION, device=device)
    tissue = make_tissue(MILLION).to(device)
    window = SlidingWindow(8)
    name = f"{window!r}, 2-D, {len(tissue):,} tiles of tissue"
    yield name, partial(build_layout, window, tissue)
    documents = torch.randint(64, 350, (5_000,), generator=torch.Generator().manual_seed(0))
    total = int(documents.sum())
    pattern = SlidingWindow(64) | GlobalTokens(4)
    name = f"{pattern!r}, 5,000 documents, {total:,} tokens"
    yield name, partial(build_layout, pattern, total, segments=documents.to(device))
