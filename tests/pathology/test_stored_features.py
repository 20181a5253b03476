"""Train and predict on features that came from another tool, without a slide."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.scale import make_bag
from pipelines.pathology.store import read_index
from pipelines.pathology.stored_features import find_source, match_stored
from pipelines.shared.cli import main
from pipelines.shared.errors import InputError

QUICK = ["epochs=1", "logger=none", "trainer.progress=false", "model=tiny"]


def run(*arguments: object) -> int:
    return main("pathology", VERBS, [str(argument) for argument in arguments])


def write_clam(root: Path, slide_id: str, seed: int, dim: int = 5) -> None:
    """A slide in CLAM's folders, by tensors and tile lists."""
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(144)[:30]
    coords = np.stack([chosen % 12, chosen // 12], axis=-1) * 512
    for folder in ("pt_files", "patches"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "patches" / f"{slide_id}.h5", "w") as file:
        made = file.create_dataset("coords", data=coords)
        made.attrs["patch_size"], made.attrs["patch_level"] = 512, 0
        made.attrs["downsample"] = (1.0, 1.0)
    features = rng.standard_normal((30, dim)).astype(np.float32) + seed % 2
    torch.save(torch.from_numpy(features), root / "pt_files" / f"{slide_id}.pt")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `features` and `labels.csv`; one slide has no label, one label no slide."""
    folder = tmp_path_factory.mktemp("imported")
    for number in range(17):
        write_clam(folder / "clam", f"s{number}", number)
    assert run("import", f"source={folder / 'clam'}", f"out={folder}", "mpp=0.5") == 0
    rows = [f"s{number},{'ab'[number % 2]}" for number in range(18) if number != 16]
    (folder / "labels.csv").write_text("\n".join(["slide_id,label", *rows]) + "\n")
    return folder


@pytest.fixture(scope="module")
def trained(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    labels = f"labels={imported / 'labels.csv'}"
    assert run("train", f"features={imported / 'features'}", labels, f"out={out}", *QUICK) == 3
    return out


def test_train_takes_imported_features_without_slides(trained, imported):
    failures = pd.read_csv(trained / "failures.csv")
    assert failures[["slide_id", "status"]].values.tolist() == [
        ["s16", "no_label"],
        ["s17", "no_slide"],
    ]
    summary = (trained / "summary.txt").read_text()
    assert "ABMIL" in summary
    assert "colour" not in summary  # there is no picture to take it from
    assert "predict features=FOLDER" in summary
    assert not (trained / "heatmaps").exists()


def test_predict_takes_features_that_fit_the_model(trained, imported, tmp_path, capsys):
    store = imported / "features"
    arguments = ["predict", f"features={store}", f"ckpt={trained / 'model.ckpt'}"]
    assert run(*arguments, f"out={tmp_path / 'all'}") == 0
    table = pd.read_csv(tmp_path / "all" / "predictions.csv")
    assert table["slide_id"].tolist() == sorted(f"s{number}" for number in range(17))
    test = pd.read_csv(trained / "predictions.csv").set_index("slide_id")
    again = table.set_index("slide_id").loc[test.index]
    columns = [name for name in again if name in test and again[name].dtype == float]
    assert columns
    assert np.allclose(again[columns], test[columns], atol=1e-5)
    assert not (tmp_path / "all" / "heatmaps").exists()

    write_clam(tmp_path / "other", "x", 1, dim=7)
    given = [f"source={tmp_path / 'other'}", f"features={tmp_path / 'mixed'}", "mpp=0.5"]
    assert run("import", *given, f"out={tmp_path / 'import'}") == 0
    out = tmp_path / "none"
    arguments = ["predict", f"features={tmp_path / 'mixed'}", f"ckpt={trained / 'model.ckpt'}"]
    assert run(*arguments, f"out={out}") == 2
    failures = pd.read_csv(out / "failures.csv")
    assert failures["status"].tolist() == ["other_features"]
    stores = (tmp_path / "mixed", store)
    prints = [read_index(folder)["encoder_fingerprint"].iloc[0] for folder in stores]
    assert prints[0] != prints[1]
    assert all(f"({made}" in failures["reason"][0] for made in prints)


def test_copies_of_a_slide_in_two_splits_are_a_leak(tmp_path, capsys):
    for number in range(8):
        write_clam(tmp_path / "clam", f"s{number}", number)
    write_clam(tmp_path / "clam", "copy", 0)
    given = [f"source={tmp_path / 'clam'}", f"features={tmp_path / 'store'}", "mpp=0.5"]
    assert run("import", *given, f"out={tmp_path / 'import'}") == 0
    splits = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
    rows = [f"s{number},{'ab'[number % 2]},{word}" for number, word in enumerate(splits)]
    table = tmp_path / "labels.csv"
    command = ["train", f"features={tmp_path / 'store'}", f"labels={table}", *QUICK]

    table.write_text("\n".join(["slide_id,label,split", *rows, "copy,a,test"]) + "\n")
    assert run(*command, f"out={tmp_path / 'leak'}") == 2
    error = capsys.readouterr().err
    assert "train: s0" in error
    assert "test: copy" in error
    assert not (tmp_path / "leak" / "models").exists()

    table.write_text("\n".join(["slide_id,label,split", *rows, "copy,a,train"]) + "\n")
    assert run(*command, f"out={tmp_path / 'whole'}") == 0


def test_an_encoder_is_refused_where_features_are_taken_as_they_are(imported, tmp_path, capsys):
    given = [f"features={imported / 'features'}", f"labels={imported / 'labels.csv'}"]
    assert run("train", *given, "encoder=uni", f"out={tmp_path / 'out'}", *QUICK) == 2
    assert "choose among them by stored_encoder=NAME" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_slides_cannot_be_predicted_by_an_encoder_that_is_not_here(
    trained, tissue_slide, tmp_path, capsys
):
    arguments = [f"ckpt={trained / 'model.ckpt'}", f"out={tmp_path / 'out'}"]
    assert run("predict", f"slides={tissue_slide.parent}", *arguments) == 2
    assert "features=FOLDER" in capsys.readouterr().err
    assert run("predict", *arguments) == 2
    assert "features=FOLDER" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["max_tokens=0", "top_tiles=-1"])
def test_numbers_that_predict_cannot_use_are_refused(trained, imported, tmp_path, capsys, setting):
    given = [f"features={imported / 'features'}", f"ckpt={trained / 'model.ckpt'}", setting]
    assert run("predict", *given, f"out={tmp_path / 'out'}") == 2
    assert f"error: {setting.split('=')[0]} must be at least" in capsys.readouterr().err


def test_features_of_two_kinds_are_not_mixed(tmp_path):
    one = make_bag(tmp_path, 30, num_features=3, seed=0)
    two = make_bag(tmp_path, 40, num_features=4, seed=0)
    with pytest.raises(InputError, match=f"{two}.*{one}|{one}.*{two}"):
        find_source(tmp_path, [one, two])
    source = find_source(tmp_path, [one])
    assert source.dim == 3
    fitting, failures = match_stored(tmp_path, source.metadata)
    assert fitting == [one]
    assert [failure.id for failure in failures] == [two]
    assert len(read_index(tmp_path)) == 2
