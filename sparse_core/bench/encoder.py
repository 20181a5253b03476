"""Training steps of whole encoders, 12 layers of 768, bf16, batch 1.

A window of +-512 with 12 heads, and GigaPath's shape (Xu et al. 2024): LongNet with 16 heads of 48.
"""

import gc
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_core.bench.record import Machine, write_aside
from sparse_core.nn import SparseEncoder
from sparse_core.patterns import DilatedSegments, Pattern, SlidingWindow


@dataclass(frozen=True)
class Setting:
    """One row: how many tokens, whether layers are computed again in backward, or compiled."""

    tokens: int
    checkpointing: bool
    compiled: bool
    dim: int = 768
    depth: int = 12
    heads: int = 12
    name: str = "window"


LONGNET = sum(
    (
        DilatedSegments(segment, dilation)
        for segment, dilation in ((5_792, 2), (32_768, 4), (185_363, 8), (1_048_576, 16))
    ),
    start=DilatedSegments(1_024),
)
"""Segments and dilations of GigaPath's slide encoder."""

PATTERNS: dict[str, Pattern] = {"window": SlidingWindow(512), "LongNet": LONGNET}

SETTINGS: tuple[Setting, ...] = tuple(
    Setting(tokens, checkpointing, compiled=True)
    for tokens, checkpointing in (
        (65_536, False),
        (262_144, False),
        (65_536, True),
        (262_144, True),
        (1_048_576, True),
    )
) + tuple(
    Setting(tokens, checkpointing, compiled=True, heads=16, name="LongNet")
    for tokens, checkpointing in ((65_536, False), (262_144, False), (262_144, True))
)


@dataclass(frozen=True)
class StepFigure:
    """Median time of a step, peak memory, and what of it is neither weights nor optimizer."""

    setting: Setting
    step_ms: float | None = None
    peak_bytes: int | None = None
    activation_bytes: int | None = None
    failure: str | None = None


def measure_step(setting: Setting, device: torch.device, repeats: int = 5) -> StepFigure:
    """Time forward, backward and AdamW on random tokens; layouts are built once, before."""
    try:
        return _measure(setting, device, repeats)
    except torch.OutOfMemoryError:
        return StepFigure(setting, failure="out of memory")
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _measure(setting: Setting, device: torch.device, repeats: int) -> StepFigure:
    torch.manual_seed(0)
    encoder = SparseEncoder(
        setting.dim,
        setting.depth,
        setting.heads,
        PATTERNS[setting.name],
        checkpointing=setting.checkpointing,
        compiled=setting.compiled,
    ).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-4, fused=True)
    layouts = encoder.build_layouts(setting.tokens)
    x = torch.randn(1, setting.tokens, setting.dim, device=device, dtype=torch.bfloat16)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = _loss(encoder(x, layouts))
        loss.backward()
        optimizer.step()

    for _ in range(2):
        step()
    optimizer.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    peak = torch.cuda.max_memory_allocated()
    return StepFigure(setting, statistics.median(times), peak, peak - before)


def _loss(encoded: Tensor) -> Tensor:
    return nn.functional.mse_loss(encoded.float(), torch.zeros_like(encoded, dtype=torch.float32))


def run_encoder(machine: Machine, folder: Path | None, device: torch.device) -> int:
    """Measure every setting, print and write the table; 3 if one failed."""
    figures = []
    for setting in SETTINGS:
        figures.append(measure_step(setting, device))
        print(_line(figures[-1]), flush=True)
    text = "\n".join(["; ".join(f"{k} {v}" for k, v in machine.items()), "", *table(figures)])
    print(f"\n{text}")
    if folder is not None:
        write_aside(folder / "encoder.md", text + "\n")
        rows = {"machine": machine, "figures": [asdict(figure) for figure in figures]}
        write_aside(folder / "encoder.json", json.dumps(rows, indent=1) + "\n")
    return 3 if any(figure.failure for figure in figures) else 0


def table(figures: list[StepFigure]) -> list[str]:
    """Write the figures as a Markdown table."""
    head = (
        "| pattern | tokens | computed again | compiled | step ms | tokens/s | peak GiB | "
        "activations GiB |"
    )
    return [head, "|---|--:|---|---|--:|--:|--:|--:|", *map(_line, figures)]


def _line(figure: StepFigure) -> str:
    setting = figure.setting
    flags = [("yes" if flag else "no") for flag in (setting.checkpointing, setting.compiled)]
    cells = [setting.name, f"{setting.tokens:,}", *flags]
    if figure.step_ms is None or figure.peak_bytes is None or figure.activation_bytes is None:
        cells += [figure.failure or "-", "-", "-", "-"]
    else:
        cells += [
            f"{figure.step_ms:.1f}",
            f"{setting.tokens / figure.step_ms * 1e3:,.0f}",
            f"{figure.peak_bytes / 2**30:.1f}",
            f"{figure.activation_bytes / 2**30:.1f}",
        ]
    return f"| {' | '.join(cells)} |"
