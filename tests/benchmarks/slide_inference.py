"""How many slides a second? `python -m tests.benchmarks.slide_inference FOLDER`.

`predict` reads stored features (1,024 float16 numbers of each tile, drawn at random, kept in FOLDER
for the next time), computes `model=base` with random weights, and writes its results, slide by
slide. The rate is that from the first slide's result to the last one's: programs start and weights
load once for a folder of any size. Bars on an H200: 20 slides/s of 10,000 tiles, 2 of 100,000.
Exits with 1 where one is missed.
"""

import argparse
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.model import TASK, SlideClassifier
from pipelines.pathology.scale import make_bag
from pipelines.pathology.stored_features import find_source
from pipelines.shared.checkpoint import save_model
from pipelines.shared.cli import main as run
from pipelines.shared.conf_tree import conf_folder
from pipelines.shared.objective import Classification
from pipelines.shared.study import architecture_of

BARS = {10_000: 20.0, 100_000: 2.0}
NUM_FEATURES = 1024
SLIDES = {10_000: 60, 100_000: 10}


def main() -> int:
    """Print a table; 0 if all bars are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where features and results go")
    parser.add_argument("--model", default="base")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiles", type=int, nargs="+", default=list(BARS))
    given = parser.parse_args()
    rows = {tiles: _rate(tiles, given) for tiles in given.tiles}
    name = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"\n{name}, torch {torch.__version__}, model={given.model}, bf16")
    print("| tiles | slides | slides/s | median s | tiles/s | bar |\n|--:|--:|--:|--:|--:|--:|")
    for tiles, (rate, middle) in rows.items():
        print(
            f"| {tiles:,} | {SLIDES.get(tiles, 10)} | {rate:.1f} | {middle:.3f} | "
            f"{rate * tiles:,.0f} | {BARS.get(tiles, 0):g} |"
        )
    return 0 if all(rate >= BARS.get(tiles, 0) for tiles, (rate, _) in rows.items()) else 1


def _rate(tiles: int, given: argparse.Namespace) -> tuple[float, float]:
    """Slides per second, and the median of the seconds between two of them."""
    store, out = given.folder / f"features_{tiles}", given.folder / f"predicted_{tiles}"
    ids = [
        make_bag(store, tiles + number, num_features=NUM_FEATURES, seed=0)
        for number in range(SLIDES.get(tiles, 10))
    ]
    ckpt = given.folder / f"{given.model}.ckpt"
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        chosen = compose("pathology_scale", [f"model={given.model}"])
    config = OmegaConf.to_container(chosen, resolve=True)
    network = SlideClassifier(num_features=NUM_FEATURES, **architecture_of(config, num_classes=2))
    source = find_source(store, ids)
    save_model(
        ckpt,
        network,
        task=TASK,
        metadata={
            "task": Classification(("0", "1")).plain(),
            "unit": "slide",
            "temperature": 1.0,
            **source.metadata,
        },
    )
    shutil.rmtree(out, ignore_errors=True)
    arguments = [
        "predict", f"features={store}", f"ckpt={ckpt}", f"out={out}", f"device={given.device}",
        "precision=bf16-mixed", "heatmaps=false", "geojson=false", "tile_scores=false",
        "top_tiles=0", "progress=false",
    ]  # fmt: skip
    assert run("pathology", VERBS, arguments) == 0
    times = sorted(path.stat().st_mtime for path in (out / "slides").glob("*.json"))
    steps = [later - earlier for earlier, later in pairwise(times)]
    return (len(times) - 1) / (times[-1] - times[0]), median(steps)


if __name__ == "__main__":
    sys.exit(main())
