"""Time this machine: `python -m sparse_core.bench [--out FILE]`.

Three tables: building layouts of 1,048,576 tokens; attention forward and backward on a window
beside PyTorch's dense attention in the same process; memory of one call beyond inputs and
gradients. Medians of several runs. Run it on a quiet machine.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sparse_core.building import build_layout
from sparse_core.layout import BlockLayout
from sparse_core.ops import choose_engine, sparse_attention
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
from sparse_core.testing import make_tissue, peak_memory

MILLION = 1_048_576
HEADS, HEAD_DIM, RADIUS = 4, 64, 256

LAYOUTS: list[Pattern] = [
    Dense(),
    Causal(),
    SlidingWindow(512),
    SlidingWindow(256) | GlobalTokens(64),
    DilatedWindow(512, 8),
    Strided(8, block=128),
    SlidingWindow(96) | GlobalTokens(128) | RandomBlocks(3, block=64),
]


def main() -> int:
    """Measure, print, and write the same text to a file if asked."""
    parser = argparse.ArgumentParser(prog="python -m sparse_core.bench", description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the tables to this file (Markdown)")
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_only:
        print(_memory_of_one_call())
        return 0
    lines = [_machine(), "", *_layout_table(), "", *_attention_table(), "", _memory_line()]
    text = "\n".join(lines)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


def _machine() -> str:
    engine = choose_engine("auto")
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, engine {engine}, float32"
    )


def _layout_table() -> list[str]:
    lines = ["| layout of 1,048,576 tokens | seconds | MB | blocks |", "|---|--:|--:|--:|"]
    for pattern in LAYOUTS:
        lines.append(_layout_row(repr(pattern), partial(build_layout, pattern, MILLION)))
    tissue = make_tissue(MILLION)
    window = SlidingWindow(8)
    name = f"{window!r}, 2-D, {len(tissue):,} tiles of tissue"
    lines.append(_layout_row(name, lambda: build_layout(window, tissue)))
    documents = torch.randint(64, 350, (5_000,), generator=torch.Generator().manual_seed(0))
    total = int(documents.sum())
    pattern = SlidingWindow(64) | GlobalTokens(4)
    name = f"{pattern!r}, 5,000 documents, {total:,} tokens"
    lines.append(_layout_row(name, lambda: build_layout(pattern, total, segments=documents)))
    return lines


def _layout_row(name: str, build: Callable[[], BlockLayout]) -> str:
    layout = build()
    seconds = _median(build)
    name = name.replace("|", "or")
    return f"| {name} | {seconds:.3f} | {layout.nbytes() / 1e6:.1f} | {layout.num_blocks:,} |"


def _attention_table() -> list[str]:
    lines = [
        f"| window +-{RADIUS}, {HEADS} x {HEAD_DIM} | forward s | backward s | dense forward s "
        "| dense backward s | both, dense / ours |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for tokens in (16_384, 65_536):
        layout = build_layout(SlidingWindow(RADIUS), tokens)
        ours = _forward_backward(tokens, partial(sparse_attention, layout=layout))
        if tokens > 16_384:
            cells = "- | - | -"
        else:
            dense = _forward_backward(tokens, _dense)
            cells = f"{dense[0]:.2f} | {dense[1]:.2f} | {sum(dense) / sum(ours):.1f} x"
        lines.append(f"| {tokens:,} tokens | {ours[0]:.2f} | {ours[1]:.2f} | {cells} |")
    return lines


def _dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _forward_backward(
    tokens: int, attention: Callable[[Tensor, Tensor, Tensor], object], repeats: int = 3
) -> tuple[float, float]:
    q, k, v = (torch.randn(1, tokens, HEADS, HEAD_DIM, requires_grad=True) for _ in range(3))
    gradient = torch.randn(1, tokens, HEADS, HEAD_DIM)
    forward, backward = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        out = attention(q, k, v)
        middle = time.perf_counter()
        assert isinstance(out, Tensor)
        torch.autograd.grad(out, (q, k, v), gradient)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    return statistics.median(forward), statistics.median(backward)


def _memory_line() -> str:
    command = [sys.executable, "-m", "sparse_core.bench", "--memory-only"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return (
        f"65,536 tokens, window +-{RADIUS}, {HEADS} x {HEAD_DIM}, forward and backward: "
        f"{int(found) / 2**30:.2f} GiB beyond inputs and gradients"
    )


def _memory_of_one_call() -> int:
    """Measure in a process of its own: the peak of a process never falls."""
    warm = torch.randn(1, 256, HEADS, HEAD_DIM, requires_grad=True)
    out = sparse_attention(warm, warm, warm, build_layout(SlidingWindow(RADIUS), 256))
    assert isinstance(out, Tensor)
    out.sum().backward()
    shape = (1, 65_536, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape)
    layout = build_layout(SlidingWindow(RADIUS), shape[1])
    room = [torch.ones(shape) for _ in range(3)]
    before = peak_memory()
    del room
    out = sparse_attention(q, k, v, layout)
    assert isinstance(out, Tensor)
    out.backward(gradient)
    return peak_memory() - before


def _median(run: Callable[[], object], repeats: int = 3) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
