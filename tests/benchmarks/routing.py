"""Does learned choice beat chance? `python -m tests.benchmarks.routing [--seeds N]`.

The small encoder of `sparse_core.recall` is trained on its task twice: with blocks that its router
chooses, and with as many drawn at random anew in every call. All else is equal, also what is added
to the scores of the blocks.
"""

import argparse
import sys
from statistics import mean
from unittest.mock import patch

import torch
from torch import Tensor

from sparse_core import routing
from sparse_core.patterns import Pattern
from sparse_core.recall.__main__ import SMALL, SMALL_PATTERNS
from sparse_core.recall.training import Result, Settings, train
from sparse_core.routing import RoutedLayout


def choose_at_random(about_q: Tensor, about_k: Tensor, routed: RoutedLayout) -> Tensor:
    """Take `choose_blocks`' place: the same number of blocks, of those it may choose from."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    shape = (*about_q.shape[:3], 16)
    noise = (torch.randn(shape, generator=generator).to(about_q.device) for _ in range(2))
    return _CHOOSE(*noise, routed)


_CHOOSE = routing.choose_blocks


def compare(pattern: Pattern, settings: Settings, seed: int) -> tuple[Result, Result]:
    """Train with the router, and at random."""
    results = []
    for choose in (_CHOOSE, choose_at_random):
        with patch.object(routing, "choose_blocks", choose):
            results.append(train(pattern, settings, seed, report=lambda _: None))
    return results[0], results[1]


def main() -> int:
    """Print accuracy by distance, with the router and at random."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.routing", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    pattern = Pattern.parse(SMALL_PATTERNS["routed"])
    print(f"{pattern}, sequences of {SMALL.task.length} tokens, {SMALL.steps} steps")
    print("| seed | blocks |" + "".join(f" {d:,} |" for d in SMALL.task.distances) + " mean |")
    print("|--:|---|" + "--:|" * (len(SMALL.task.distances) + 1))
    for seed in range(seeds):
        for name, result in zip(("routed", "random"), compare(pattern, SMALL, seed), strict=True):
            shares = list(result.accuracy.values())
            cells = "".join(f" {share:.2f} |" for share in (*shares, mean(shares)))
            print(f"| {seed} | {name} |{cells}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
