"""Figures that need no GPU: layouts, a window beside dense attention, memory."""

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from sparse_core.bench.contenders import engine_of
from sparse_core.bench.layouts import layout_lines, measure_layouts
from sparse_core.building import build_layout
from sparse_core.ops import sparse_attention
from sparse_core.patterns import SlidingWindow
from sparse_core.testing import peak_memory

HEADS, HEAD_DIM, RADIUS = 4, 64, 256


def host_lines() -> list[str]:
    """Measure and write Markdown; medians of three runs."""
    layouts = layout_lines(list(measure_layouts("cpu")))
    return [_machine(), "", *layouts, "", *_attention_table(), "", _memory_line()]


def memory_of_one_call() -> int:
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


def _machine() -> str:
    engine = engine_of(torch.empty(1, 1, HEADS, HEAD_DIM))
    return (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, engine {engine}, float32"
    )


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
