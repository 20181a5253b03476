"""How far patterns carry information: `python -m sparse_core.recall [--out FOLDER]`.

Associative recall: a sequence of blanks holds pairs of a key and a value, and later, at distances
from 256 to 65,536 tokens (`--small`: 8 to 256), questions that name a key and ask for its value.
The same small encoder is trained with each pattern on all distances at once, without positions, and
asked afterwards. What comes out is accuracy by distance beside what each pattern costs: `recall.md`
and `recall.png`. Every run of a pattern and a seed leaves a file, so that the same command goes on
where it stopped. Without a GPU the small version runs.
"""

import argparse
import json
import sys
from collections.abc import Collection
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from sparse_core.patterns import Pattern
from sparse_core.recall.report import draw, write_table
from sparse_core.recall.task import Task
from sparse_core.recall.training import Result, Settings, describe, train

LARGE = Settings(
    Task(131_072, tuple(256 * 2**i for i in range(9)), per_distance=10, num_values=16),
    dim=256, heads=2, batch=1, steps=400, lr=2e-3, seeds=3,
)  # fmt: skip
SMALL = Settings(
    Task(512, tuple(8 * 2**i for i in range(6)), per_distance=3, num_values=8),
    dim=64, heads=1, batch=8, steps=80, lr=5e-3, seeds=1,
)  # fmt: skip

LARGE_PATTERNS = {
    "window": "SlidingWindow(128)",
    "window + random": "SlidingWindow(128) | RandomBlocks(3)",
    "window + global": f"SlidingWindow(128) | GlobalTokens({LARGE.task.num_keys})",
    "hierarchical": "Hierarchical(64)",
    "routed": "Routed(64, top=16)",
    "longnet": "DilatedSegments(1024) + DilatedSegments(5792, 2) + DilatedSegments(32768, 4)"
    " + DilatedSegments(185363, 8) + DilatedSegments(1048576, 16)",
    "dense": "Dense()",
}
SMALL_PATTERNS = {
    "window": "SlidingWindow(8)",
    "window + global": f"SlidingWindow(8) | GlobalTokens({SMALL.task.num_keys})",
    "hierarchical": "Hierarchical(16)",
    "routed": "Routed(16, top=4)",
    "dense": "Dense()",
}
ON_REQUEST = ("dense",)
"""Patterns that are trained if named, since they take much longer."""


def main(given: list[str] | None = None) -> int:
    """Train, and write what came out."""
    parser = argparse.ArgumentParser(prog="python -m sparse_core.recall", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/recall"), help="folder of results")
    parser.add_argument("--small", action="store_true", help="distances 8 to 256 (without a GPU)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these, such as dense")
    parser.add_argument("--seeds", type=int, help="how many")
    parser.add_argument("--steps", type=int, help="training steps of each run")
    arguments = parser.parse_args(given)
    small = arguments.small or not torch.cuda.is_available()
    settings, patterns = (SMALL, SMALL_PATTERNS) if small else (LARGE, LARGE_PATTERNS)
    settings = replace(
        settings,
        seeds=arguments.seeds or settings.seeds,
        steps=arguments.steps or settings.steps,
    )
    for name in arguments.only or ():
        if name not in patterns:
            parser.error(f"--only: no pattern {name!r}; there are {', '.join(patterns)}")
    names = arguments.only or [name for name in patterns if name not in ON_REQUEST]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        run_all(patterns, settings, arguments.out, device, only=names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print((arguments.out / "recall.md").read_text())
    print(arguments.out / "recall.png")
    return 0


def run_all(
    patterns: dict[str, str],
    settings: Settings,
    out: Path,
    device: torch.device | str,
    *,
    only: Collection[str],
) -> dict[str, list[Result]]:
    """Train the patterns named in `only` with each seed, but for those whose results are there.

    Results of other patterns are shown too, if there are any. Raises ValueError for results of
    other settings in the same folder.
    """
    found: dict[str, list[Result]] = {}
    (out / "results").mkdir(parents=True, exist_ok=True)
    for seed in range(settings.seeds):
        for name, text in patterns.items():
            path = out / "results" / f"{name.replace(' ', '')}-{seed}.json"
            pattern = Pattern.parse(text)
            if path.exists():
                result = _read(path, pattern, settings)
            elif name in only:
                report = partial(_report, f"{name}, seed {seed}")
                result = train(pattern, settings, seed, device=device, report=report)
                _write(path, result)
            else:
                continue
            found.setdefault(name, []).append(result)
        write_table(found, settings, out)
        draw(found, settings, out)
    return found


def _report(run: str, line: str) -> None:
    print(f"{run}: {line}", flush=True)


def _read(path: Path, pattern: Pattern, settings: Settings) -> Result:
    result = Result(**json.loads(path.read_text()))
    if (result.settings, result.pattern) != (describe(settings), str(pattern)):
        raise ValueError(f"{path} is of other settings; give another --out")
    return result


def _write(path: Path, result: Result) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(asdict(result), indent=1))
    aside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
