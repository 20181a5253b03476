"""What reaching far costs, bf16, 12 heads of 64: blocks chosen by learned routing, pooled cells.

Beside a window at 1,048,576 tokens, and beside dense FlashAttention-2 where that is still quick.
"""

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_core.bench.cases import MILLION
from sparse_core.bench.measure import median_ms
from sparse_core.bench.record import Machine, write_aside
from sparse_core.building import build_layout
from sparse_core.listing import with_chosen
from sparse_core.ops import sparse_attention
from sparse_core.patterns import Hierarchical, Routed, SlidingWindow
from sparse_core.pooling import build_pooled_layout, pooled_attention
from sparse_core.routing import (
    build_routed_layout,
    choose_blocks,
    describe_blocks,
    routed_attention,
)

WINDOW = SlidingWindow(512)
ROUTED = Routed(128, 16)
POOLED = Hierarchical(cell=128, near=4, factor=4)
DENSE_TOKENS = (8_192, 16_384, 65_536)
HEADS, HEAD_DIM = 12, 64
GRAPHED = "routed, as a graph"
"""Recorded as CUDA graphs: short sequences otherwise wait for the host's launches."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """Medians of forward and backward, and what both hold at most beside q, k and v."""

    name: str
    tokens: int
    forward_ms: float | None = None
    backward_ms: float | None = None
    peak_bytes: int | None = None

    @property
    def both_ms(self) -> float | None:
        """Forward and backward."""
        if self.forward_ms is None or self.backward_ms is None:
            return None
        return self.forward_ms + self.backward_ms


def run_long_range(
    machine: Machine,
    folder: Path | None,
    device: torch.device,
    *,
    tokens: int = MILLION,
    dense_tokens: tuple[int, ...] = DENSE_TOKENS,
) -> int:
    """Measure, print and write the table with its ratios; 3 if something did not fit."""
    rows = []
    for name, count in [
        ("window", tokens), ("choosing", tokens), ("routed", tokens), ("hierarchical", tokens),
        *((name, n) for n in dense_tokens for name in ("routed", GRAPHED, "dense")),
    ]:  # fmt: skip
        rows.append(measure(name, count, device))
        print(_line(rows[-1]), flush=True)
    text = "\n".join(
        ["; ".join(f"{k} {v}" for k, v in machine.items()), "", *table(rows), "", *ratios(rows)]
    )
    print(f"\n{text}")
    if folder is not None:
        write_aside(folder / "long_range.md", text + "\n")
        found = {"machine": machine, "rows": [asdict(row) for row in rows]}
        write_aside(folder / "long_range.json", json.dumps(found, indent=1) + "\n")
    return 3 if any(row.forward_ms is None for row in rows) else 0


def measure(name: str, tokens: int, device: torch.device) -> Row:
    """Time one way to attend; layouts that need no queries are built before."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, tokens, HEADS, HEAD_DIM)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, grad_out = (
        torch.randn(shape, device=device, dtype=dtype, generator=generator) for _ in range(4)
    )
    try:
        if name == "choosing":
            routed = build_routed_layout(ROUTED, tokens, device=device)

            def choose() -> object:
                with torch.no_grad():
                    about = describe_blocks(q, k, routed)
                    chosen = choose_blocks(*about, routed)
                    return with_chosen(routed.seen, chosen, chosen < len(routed.tokens))

            return Row(name, tokens, median_ms(choose, device), 0.0, _peak(choose, device))
        return _time(name, tokens, _attend(name, tokens, device), (q, k, v), grad_out)
    except torch.OutOfMemoryError:
        return Row(name, tokens)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _attend(name: str, tokens: int, device: torch.device) -> Attend:
    if name == "window":
        layout = build_layout(WINDOW, tokens, device=device)
        return lambda q, k, v: sparse_attention(q, k, v, layout)  # type: ignore[return-value]
    if name in ("routed", GRAPHED):
        routed = build_routed_layout(ROUTED, tokens, device=device)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return routed_attention(q, k, v, routed)  # type: ignore[return-value]

        return _as_graph(attend, tokens, device) if name == GRAPHED else attend
    if name == "hierarchical":
        pooled = build_pooled_layout(POOLED, tokens, device=device)
        return lambda q, k, v: pooled_attention(q, k, v, pooled)  # type: ignore[return-value]

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    return dense


def _as_graph(attend: Attend, tokens: int, device: torch.device) -> Attend:
    if device.type != "cuda":
        return attend
    shape, dtype = (1, tokens, HEADS, HEAD_DIM), torch.bfloat16
    like = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    return cast(Attend, torch.cuda.make_graphed_callables(attend, tuple(like)))


def _time(
    name: str, tokens: int, attend: Attend, inputs: tuple[Tensor, ...], grad_out: Tensor
) -> Row:
    device = grad_out.device
    leaves = [x.requires_grad_() for x in inputs]

    def both() -> object:
        return torch.autograd.grad(attend(*leaves), leaves, grad_out)

    peak = None if name == GRAPHED else _peak(both, device)  # a graph has memory of its own
    forward_ms = median_ms(lambda: attend(*leaves), device)
    if name == GRAPHED:  # each backward pass follows its own forward pass
        return Row(name, tokens, forward_ms, median_ms(both, device) - forward_ms, peak)
    out = attend(*leaves)
    backward_ms = median_ms(
        lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True), device
    )
    return Row(name, tokens, forward_ms, backward_ms, peak)


def _peak(run: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def table(rows: list[Row]) -> list[str]:
    """Write the rows as a Markdown table."""
    head = "| | tokens | forward ms | backward ms | peak GiB |"
    return [head, "|---|--:|--:|--:|--:|", *map(_line, rows)]


def ratios(rows: list[Row]) -> list[str]:
    """Say what choosing, routing and pooling cost beside what they are measured against."""
    held = {(row.name, row.tokens): row for row in rows}
    most = max(row.tokens for row in rows)
    lines = []
    for name, other, what in (
        (
            "choosing",
            "routed",
            "of forward and backward of the attention that it routes",
        ),
        ("routed", "window", "of the window's time"),
        ("hierarchical", "window", "of the window's time"),
    ):
        ours, theirs = held[name, most].both_ms, held[other, most].both_ms
        if ours is None or theirs is None:
            continue
        if name == "choosing":
            theirs -= ours
        lines.append(f"- {name} at {most:,} tokens takes {ours / theirs:.2f} {what}")
    ours_peak, window_peak = (held[name, most].peak_bytes for name in ("routed", "window"))
    if ours_peak and window_peak:
        lines.append(f"- routed attention holds {ours_peak / window_peak:.2f} of the window's peak")
    for row in rows:
        against = held.get(("dense", row.tokens))
        routes = row.name in ("routed", GRAPHED)
        if routes and against and row.both_ms and against.both_ms:
            ratio = against.both_ms / row.both_ms
            lines.append(f"- {row.name} at {row.tokens:,} tokens is {ratio:.2f} x as fast as dense")
    return lines


def _line(row: Row) -> str:
    cells = [row.name, f"{row.tokens:,}"]
    if row.forward_ms is None or row.backward_ms is None:
        cells += ["out of memory", "-", "-"]
    else:
        peak = "-" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.2f}"
        cells += [f"{row.forward_ms:.2f}", f"{row.backward_ms:.2f}", peak]
    return f"| {' | '.join(cells)} |"
