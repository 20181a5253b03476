"""Which of two motifs in real DNA comes first, up to 131,072 bases: how far a pattern carries.

    python -m tests.benchmarks.order_task BACKGROUND.fa ... --out DIR
        [--lengths 2048 8192 32768 131072] [--seeds 0 1 2] [--jobs 1] [OVERRIDE ...]

At each length `train experiment=order` trains on motifs that stand 0.3 to 0.6 of the length apart,
in stretches of BACKGROUND, and goes on from the network of the length before, as HyenaDNA warms up
(Nguyen et al., NeurIPS 2023); the window alone is trained beside it. Seeds run side by side as
`--jobs` allows. OVERRIDE are further settings of `train`, such as trainer=cpu. Runs that are
finished are not run again.
"""

import argparse
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.benchmarks.processes import run_verb

LENGTHS = (2_048, 8_192, 32_768, 131_072)
BASES = 4_194_304
"""Bases of a step, at most."""


def main() -> int:
    """Train, print a table; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("background", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1)
    overrides = [word for word in sys.argv[1:] if "=" in word]
    given = parser.parse_args([word for word in sys.argv[1:] if "=" not in word])
    if given.jobs < 1:
        parser.error(f"--jobs is 1 or more; got {given.jobs}")
    with ThreadPoolExecutor(given.jobs) as pool:
        found = list(
            pool.map(
                lambda seed: _train(given.background, given.lengths, seed, given.out, overrides),
                given.seeds,
            )
        )
    print("| bases | seed | ours, AUROC | window alone |\n|--:|--:|--:|--:|")
    for row, length in enumerate(given.lengths):
        for seed, scores in zip(given.seeds, found, strict=True):
            if row < len(scores):
                print(f"| {length:,} | {seed} | {_cells(scores[row])} |")
    return int(any(len(scores) < len(given.lengths) for scores in found))


def _train(
    files: list[Path], lengths: list[int], seed: int, folder: Path, overrides: list[str]
) -> list[dict]:
    """Train one length after the other; their scores, up to the first that failed."""
    scores, before = [], []
    for length in lengths:
        out = folder / f"{length}_{seed}"
        if not (out / "metrics.json").exists():
            gaps = f"{3 * length // 10},{6 * length // 10}"
            settings = [
                "experiment=order", f"data.background=[{','.join(map(str, files))}]",
                f"data.length={length}", f"data.context={length}", f"data.right_gap=[{gaps}]",
                f"batch_size={min(32, BASES // length)}", f"data_root={out / 'data'}",
                f"seed={seed}", f"data.seed={seed}", f"out={out}",
            ]  # fmt: skip
            if run_verb("train", *settings, *before, *overrides):
                break
        scores.append(json.loads((out / "metrics.json").read_text(encoding="utf-8"))["scores"])
        before = [f"pretrained={out / 'model.ckpt'}"]
    return scores


def _cells(scores: dict) -> str:
    known = [scores[model]["auroc"] for model in ("model", "window") if model in scores]
    return " | ".join(f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in known)


if __name__ == "__main__":
    raise SystemExit(main())
