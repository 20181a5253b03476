"""The built-in cohort holds what it claims: only arrangement tells its classes apart."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pipelines.pathology.data import SlideDataset
from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.model import SlideClassifier
from pipelines.pathology.slides import find_slides
from pipelines.pathology.synthetic import MPP, TILE_PX, make_cohort
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.batch import pack

WINDOW = "SlidingWindow(radius=3)"
GLOBAL = "SlidingWindow(radius=3) | GlobalTokens(first=4)"


def load(folder: Path, variant: str) -> SlideDataset:
    table = make_cohort(
        folder, variant=variant, num_pairs=6, test_pairs=2, val_pairs=1, workers=1, progress=False
    )
    store = folder / "features"
    plan = TilePlan(TILE_PX, MPP)
    files = find_slides(folder / "slides")
    report = extract_features(
        files, store=store, plan=plan, encoder=StatsEncoder(), workers=1, progress=False
    )
    assert not report.failures
    return SlideDataset(store, table["slide_id"].tolist(), table["label"].astype(int).tolist())


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> SlideDataset:
    return load(tmp_path_factory.mktemp("near"), "near")


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> SlideDataset:
    return load(tmp_path_factory.mktemp("far"), "far")


def scores(data: SlideDataset, seed: int, **architecture: object) -> np.ndarray:
    """Score of class 1 by a random network in float64; rotary angles have the noise of float32."""
    torch.manual_seed(seed)
    network = SlideClassifier(
        num_features=66, dim=16, num_heads=2, num_classes=2, **{"depth": 2, **architecture}
    )
    examples = [data[index] for index in range(len(data))]
    network.stem.standardise(torch.cat([example.inputs for example in examples]))
    with torch.inference_mode():
        logits = network.double().eval()(pack(examples)).logits
    return (logits[:, 1] - logits[:, 0]).numpy().round(6)


@pytest.mark.parametrize("pooling", ["mean", "max", "attention"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pooling_is_at_chance_exactly(
    near: SlideDataset, far: SlideDataset, pooling: str, seed: int
) -> None:
    for data in (near, far):
        for depth in (0, 2):
            found = scores(data, seed, depth=depth, pattern=None, pooling=pooling)
            assert len(set(found)) == len(found) // 2
            assert roc_auc_score(data.targets, found) == 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_window_alone_cannot_tell_the_far_cohort(far: SlideDataset, seed: int) -> None:
    assert roc_auc_score(far.targets, scores(far, seed, pattern=WINDOW)) == 0.5
    connected = scores(far, seed, pattern=GLOBAL)
    assert len(set(connected)) == len(connected)


def test_a_window_sees_the_near_cohort(near: SlideDataset) -> None:
    found = scores(near, 0, pattern=WINDOW)
    assert len(set(found)) == len(found)


def test_moving_or_shuffling_tiles_changes_nothing(near: SlideDataset) -> None:
    torch.manual_seed(0)
    network = SlideClassifier(
        num_features=66, dim=16, depth=2, num_heads=2, num_classes=2, pattern=GLOBAL
    ).double()
    example = near[0]
    order = torch.randperm(len(example.inputs), generator=torch.Generator().manual_seed(0))
    shuffled = type(example)(
        example.inputs[order], example.coords[order], example.target, "s", "s", 0
    )
    with torch.inference_mode():
        first, second = network(pack([example, shuffled])).logits
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)
