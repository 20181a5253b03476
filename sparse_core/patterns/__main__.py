"""Draw every pattern: `python -m sparse_core.patterns [--out FOLDER]`.

Prints each pattern as text, with how many pairs it keeps and what that costs against dense
attention as the sequence grows, and writes `patterns.png`.
"""

import argparse
import re
import sys
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_core.building import build_layout
from sparse_core.listing import with_chosen
from sparse_core.patterns import (
    BlockList,
    Causal,
    Dense,
    DilatedSegments,
    DilatedWindow,
    GlobalTokens,
    Hierarchical,
    Pattern,
    RandomBlocks,
    Routed,
    SlidingWindow,
    Strided,
)
from sparse_core.pooling import build_pooled_layout
from sparse_core.routing import build_routed_layout, choose_blocks

TOKENS = 32
LENGTHS = (1_024, 16_384, 262_144)

SMALL: list[Pattern] = [
    Dense(),
    Causal(),
    SlidingWindow(3),
    SlidingWindow(left=6, right=0),
    DilatedWindow(3, 3),
    DilatedSegments(16, 3, offset=1),
    Strided(5),
    Strided(3, block=4),
    GlobalTokens(2, positions=(20,)),
    RandomBlocks(2, block=4),
    BlockList(((0, 0), (2, 1), (5, 5)), block=4),
    SlidingWindow(2) | GlobalTokens(2),
    SlidingWindow(3) | GlobalTokens(2) | RandomBlocks(1, block=4, seed=2),
    (SlidingWindow(3) | DilatedWindow(4, 4)) & Causal(),
    DilatedSegments(8) + DilatedSegments(16, 2, offset=0) + DilatedSegments(32, 4, offset=0),
]
"""What is drawn."""

POOLED = Hierarchical(2, factor=2)
ROUTED = Routed(4, top=2, near=0) | GlobalTokens(1)

LARGE: list[Pattern] = [
    Dense(),
    Causal(),
    SlidingWindow(256),
    DilatedWindow(256, 8),
    Strided(8, block=128),
    GlobalTokens(64),
    RandomBlocks(3, block=64),
    SlidingWindow(256) | GlobalTokens(64),
    SlidingWindow(96) | GlobalTokens(128) | RandomBlocks(3, block=64),
    DilatedSegments(1024, 1, 0) + DilatedSegments(8192, 8, 0) + DilatedSegments(65_536, 64, 0),
]
"""What is counted."""


def main() -> int:
    """Draw and count."""
    parser = argparse.ArgumentParser(prog="python -m sparse_core.patterns", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/patterns"), help="folder of the PNG")
    arguments = parser.parse_args()
    drawings: list[tuple[str, Tensor]] = [(repr(p), p.mask(TOKENS)) for p in SMALL]
    drawings.append(("SlidingWindow(radius=1) on a 6 x 6 grid", SlidingWindow(1).mask(_grid(6))))
    drawings.append((f"{ROUTED!r}, by random queries", _routed(ROUTED)))
    for name, mask in drawings:
        print(f"\n{name}")
        print("\n".join(_half_blocks(mask)))
    drawings.append((f"{POOLED!r}: paler where pooled", _shares(POOLED)))
    print("\n" + "\n".join(_cost_table()))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "patterns.png"
    _draw(drawings, path)
    print(f"\n{path}")
    return 0


def _shares(pattern: Pattern) -> Float[Tensor, "T T"]:
    """One over the tokens of the key in which a query sees each token."""
    pooled = build_pooled_layout(pattern, TOKENS)
    below = torch.eye(TOKENS)
    cells = []
    for level in pooled.levels:
        below = torch.segment_reduce(below[level.order], "sum", lengths=level.sizes)
        cells.append(below)
    members = torch.cat([torch.eye(TOKENS), torch.cat(cells)[pooled.entries.group_of]])
    return pooled.layout.counts().float() @ (members / members.sum(1, keepdim=True))


def _routed(pattern: Pattern) -> Bool[Tensor, "T T"]:
    """What is seen if blocks choose by random vectors."""
    routed = build_routed_layout(pattern, TOKENS)
    generator = torch.Generator().manual_seed(0)
    about_q, about_k = torch.randn(2, 1, len(routed.tokens), 1, 8, generator=generator)
    chosen = choose_blocks(about_q, about_k, routed)
    return with_chosen(routed.seen, chosen, chosen < len(routed.tokens)).mask()


def _grid(side: int) -> Tensor:
    axis = torch.arange(side)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def _half_blocks(mask: Bool[Tensor, "T T"]) -> list[str]:
    """Two rows of pairs to a line of text."""
    symbols = {(True, True): "█", (True, False): "▀", (False, True): "▄", (False, False): "·"}
    rows = mask.tolist()
    if len(rows) % 2:
        rows.append([False] * len(rows[0]))
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return ["".join(symbols[pair] for pair in zip(*two, strict=True)) for two in pairs]


def _cost_table() -> list[str]:
    """Keys per query, and visited pairs as a share of all, at each length."""
    title = "keys visited per query (share of dense) at " + ", ".join(f"{n:,}" for n in LENGTHS)
    lines = [title]
    for pattern in LARGE:
        cells = []
        for length in LENGTHS:
            visited = build_layout(pattern, length).visited_pairs()
            cells.append(f"{visited / length:>11,.0f} ({visited / length**2:>8.3%})")
        lines.append(f"{repr(pattern)[:64]:<64}" + "".join(cells))
    return lines


def _draw(drawings: list[tuple[str, Tensor]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    columns = 5
    rows = -(-len(drawings) // columns)
    figure = Figure(figsize=(3.1 * columns, 3.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    colours = LinearSegmentedColormap.from_list("shares", ["#f3f4f6", "#1d4ed8"])
    for place, (name, mask) in enumerate(drawings):
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(mask.numpy(), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(re.sub(r" ([|&+]) ", r"\n\1 ", name), fontsize=7)
        axes.set_xticks([])
        axes.set_yticks([])
    figure.supxlabel("key")
    figure.supylabel("query")
    aside = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(aside, dpi=110)
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
