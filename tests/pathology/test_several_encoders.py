"""Two encoders share a store: either trains and predicts."""

from pathlib import Path

import pandas as pd
import pytest

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.store import list_slides
from pipelines.pathology.stored_features import find_source
from pipelines.pathology.synthetic import make_cohort
from pipelines.shared.cli import main


def test_train_and_predict_take_either_of_two_encoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, store = tmp_path / "cohort", tmp_path / "store"
    make_cohort(cohort, variant="near", num_pairs=3, test_pairs=1, val_pairs=1, seed=0)
    slides, labels = f"slides={cohort / 'slides'}", f"labels={cohort / 'labels.csv'}"
    tiles = ["tile_px=64", "mpp=0.5", "min_tissue=0.25", "leave_out=[]", "num_workers=1"]
    for name in ("stats", "stats_grey"):
        given = ["embed", slides, f"features={store}", f"out={tmp_path / name}", "progress=false"]
        assert main("pathology", VERBS, [*given, *tiles, f"encoder={name}"]) == 0
    quick = ["baselines=[]", "epochs=1", "heatmaps=0", "trainer.progress=false"]
    train = ["train", f"features={store}", labels, *quick]
    assert main("pathology", VERBS, [*train, f"out={tmp_path / 'open'}"]) == 2
    assert "stats, stats_grey); choose one by stored_encoder=" in capsys.readouterr().err
    dims = {name: StatsEncoder(grey=name == "stats_grey").dim for name in ("stats", "stats_grey")}
    for name, dim in dims.items():
        assert find_source(store, list_slides(store), name).dim == dim
    assert (
        main(
            "pathology", VERBS, [*train, "out=" + str(tmp_path / "t"), "stored_encoder=stats_grey"]
        )
        == 0
    )
    assert f"{dims['stats_grey']} features" in capsys.readouterr().out
    given = [f"features={store}", f"ckpt={tmp_path / 't' / 'model.ckpt'}", "heatmaps=false"]
    assert main("pathology", VERBS, ["predict", *given, f"out={tmp_path / 'p'}"]) == 0
    assert len(pd.read_csv(tmp_path / "p" / "predictions.csv")) == 6
