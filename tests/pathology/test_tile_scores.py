"""Scores of tiles mean what they say: without the highest tiles the result is another."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import zarr

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.data import SlideDataset
from pipelines.pathology.model import build_network
from pipelines.pathology.pooling import PoolingClassifier
from pipelines.pathology.tile_scores import left_out
from pipelines.shared.batch import Example, pack
from pipelines.shared.checkpoint import load_model
from pipelines.shared.cli import main


def run(*arguments: object) -> int:
    return main("pathology", VERBS, [str(argument) for argument in arguments])


def keep(example: Example, rows: np.ndarray) -> Example:
    index = torch.from_numpy(np.sort(rows))
    return Example(example.inputs[index], example.coords[index], None, "kept", "p", 0)


@pytest.mark.parametrize("kind", ["mean", "gated_abmil"])
def test_a_score_is_what_leaving_the_tile_out_costs(kind: str) -> None:
    torch.manual_seed(0)
    network = (
        PoolingClassifier(kind=kind, num_features=4, num_classes=3, hidden=[8]).double().eval()
    )
    example = Example(torch.randn(9, 4), torch.zeros(9, 2).long(), None, "s", "p", 0)
    whole = network(pack([example]), explain=True)
    found = left_out(whole.attention.detach().numpy(), whole.contributions.detach().numpy())
    for tile in range(9):
        rest = network(pack([keep(example, np.delete(np.arange(9), tile))])).logits
        np.testing.assert_allclose(found[tile], (whole.logits - rest)[0].detach(), atol=1e-10)


@pytest.fixture(scope="module")
def cohort(draw_slides: Callable[..., list[str]], tmp_path_factory) -> Path:
    """Half of the slides hold a few tumour tiles, the others none."""
    folder = tmp_path_factory.mktemp("spots")
    burdens = [0.12, 0.0] * 30
    names = draw_slides(folder / "store", burdens)
    table = pd.DataFrame({"slide_id": names, "label": ["tumour", "none"] * 30})
    table["split"] = (["train"] * 6 + ["val"] * 2 + ["test"] * 2) * 6
    table.to_csv(folder / "labels.csv", index=False)
    return folder


@pytest.mark.parametrize("model", ["abmil", "tiny"])
def test_removing_the_highest_tenth_costs_more_than_any_tenth(
    cohort: Path, tmp_path: Path, model: str
) -> None:
    given = [f"features={cohort / 'store'}", f"labels={cohort / 'labels.csv'}"]
    quick = ["epochs=15", "optim.lr=0.01", "logger=none", "trainer.progress=false", "baselines=[]"]
    assert (
        run("train", *given, f"out={tmp_path / 'run'}", f"model={model}", "heatmaps=0", *quick) == 0
    )
    ckpt, out = tmp_path / "run" / "model.ckpt", tmp_path / "out"
    assert run("predict", given[0], f"ckpt={ckpt}", f"out={out}", "geojson=false") == 0
    saved = load_model(ckpt, task="pathology")
    network = build_network(saved.config).eval()
    network.load_state_dict(saved.state_dict)
    table = pd.read_csv(out / "predictions.csv").set_index("slide_id")
    column = saved.metadata["task"]["classes"].index("tumour")
    rng = np.random.default_rng(0)
    falls = []
    for slide_id in table.index[table["prediction"] == "tumour"]:
        group = zarr.open_group(out / "tile_scores" / f"{slide_id}.zarr", mode="r")
        assert list(group.attrs["scores"]) == ["none", "tumour"]
        assert group["attention"][:].sum() == pytest.approx(1, abs=1e-4)
        example = SlideDataset(cohort / "store", [slide_id])[0]
        order = np.argsort(-group["scores"][:, column])
        cut = round(len(order) / 10)
        draws = [rng.permutation(order) for _ in range(5)]
        parts = [example, *(keep(example, rows[cut:]) for rows in (order, *draws))]
        with torch.inference_mode():
            logits = network(pack(parts)).logits
        margin = logits[:, column] - logits[:, 1 - column]
        falls.append((margin[0] - margin[1], margin[0] - margin[2:].mean()))
    highest, other = np.mean(falls, axis=0)
    assert len(falls) > 10
    assert highest > 0
    assert highest > 2 * other


def test_predicting_loads_nothing_that_trains() -> None:
    """Lightning takes 200 MB and seconds, of every process that predicts."""
    code = "import sys, pipelines.pathology.predict; print('lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
