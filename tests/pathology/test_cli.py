"""Both verbs, through the command line, on small real files."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.synthetic import make_cohort
from pipelines.shared.cli import main

QUICK = ["epochs=2", "logger=none", "trainer.progress=false", "num_workers=1"]
SMALL = ["data.num_pairs=9", "data.test_pairs=3", "data.val_pairs=2", *QUICK]
TILES = ["tile_px=64", "mpp=0.5"]


def run(*arguments: object) -> int:
    return main("pathology", VERBS, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    make_cohort(folder, num_pairs=9, test_pairs=3, val_pairs=2, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def trained(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    code = run(
        "train", f"slides={cohort / 'slides'}", f"labels={cohort / 'labels.csv'}", f"out={out}",
        *TILES, *QUICK,
    )  # fmt: skip
    assert code == 0
    return out


def test_default_makes_its_cohort_and_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    code = run("train", f"out={out}", f"data_root={tmp_path / 'data'}", *SMALL)
    assert code == 0
    shown = capsys.readouterr().out
    for words in ("ABMIL", "attention off", "positions shuffled", "model.ckpt", "predict slides="):
        assert words in shown
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["scores"]) == {"model", "abmil", "no_attention", "shuffled"}
    assert metrics["engine"] == "blockwise"
    trained = [report["engine_calls"] for report in metrics["training"].values()]
    assert trained[1:3] == [{}, {}]  # ABMIL and attention off
    assert metrics["engine_calls"]["blockwise"] > sum(
        calls.get("blockwise", 0) for calls in trained
    )
    for name in ("abmil", "no_attention"):
        assert metrics["scores"][name]["auroc"]["value"] == 0.5
    table = pd.read_csv(out / "predictions.csv")
    assert table["split"].value_counts().to_dict() == {"test": 6, "val": 4}
    assert pd.read_csv(out / "models" / "abmil" / "predictions.csv").shape == table.shape
    assert len(list((out / "heatmaps").glob("*.png"))) == 1
    assert (out / "versions.json").exists()


def test_finished_run_is_shown_again_and_another_configuration_refused(
    trained: Path, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [
        "train", f"slides={cohort / 'slides'}", f"labels={cohort / 'labels.csv'}",
        f"out={trained}", *TILES, *QUICK,
    ]  # fmt: skip
    before = (trained / "model.ckpt").stat().st_mtime_ns
    assert run(*same) == 0
    assert "finished run" in capsys.readouterr().out
    assert (trained / "model.ckpt").stat().st_mtime_ns == before
    assert run(*same, "window=3") == 2
    assert "window" in capsys.readouterr().err


def test_predict_goes_on_past_bad_slides_and_resumes(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides, out = tmp_path / "slides (new)", tmp_path / "out, 1"
    slides.mkdir()
    good = sorted((cohort / "slides").iterdir())[:3]
    for path in good:
        shutil.copy(path, slides)
    (slides / "text.svs").write_text("not a slide")
    whole = good[0].read_bytes()
    (slides / "cut.tiff").write_bytes(whole[: len(whole) // 2])
    command = ["predict", f"slides={slides}", f"ckpt={trained / 'model.ckpt'}", f"out={out}"]
    assert run(*command, "num_workers=1") == 3
    table = pd.read_csv(out / "predictions.csv")
    assert table["slide_id"].tolist() == [path.stem for path in good]
    failures = pd.read_csv(out / "failures.csv")
    assert list(failures) == ["slide_id", "path", "status", "reason", "remedy"]
    assert failures["slide_id"].tolist() == ["cut", "text"]
    assert (failures["status"] == "unreadable").all()
    drawn = sorted(path.name for path in (out / "heatmaps").glob("*.png"))
    ids = table["slide_id"].tolist()
    assert drawn == sorted([f"{i}.png" for i in ids] + [f"{i}.score.png" for i in ids])
    for folder in ("geojson", "tile_scores", "top_tiles"):
        assert len(list((out / folder).iterdir())) == 3
    kept = {p: p.stat().st_mtime_ns for p in (out / "slides").iterdir()}
    (slides / "text.svs").unlink()
    (slides / "cut.tiff").unlink()
    capsys.readouterr()
    assert run(*command, "num_workers=1") == 0
    assert {p: p.stat().st_mtime_ns for p in (out / "slides").iterdir()} == kept
    assert pd.read_csv(out / "predictions.csv").equals(table)


def test_predict_removes_only_the_features_that_it_made(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides, out = tmp_path / "slides", tmp_path / "out"
    slides.mkdir()
    shutil.copy(min((cohort / "slides").iterdir()), slides)
    command = ["predict", f"slides={slides}", f"ckpt={trained / 'model.ckpt'}", f"out={out}"]
    command += ["keep_features=false", "num_workers=1"]
    assert run(*command, f"features={trained / 'features'}") == 2
    assert "holds others too" in capsys.readouterr().err
    assert run(*command) == 0
    assert len(pd.read_csv(out / "predictions.csv")) == 1
    assert not [path for path in (out / "features").iterdir() if path.is_dir()]


def test_train_and_predict_agree(trained: Path, cohort: Path, tmp_path: Path) -> None:
    code = run(
        "predict", f"slides={cohort / 'slides'}", f"ckpt={trained / 'model.ckpt'}",
        f"out={tmp_path}", "heatmaps=false", "num_workers=1",
    )  # fmt: skip
    assert code == 0
    ours = pd.read_csv(trained / "predictions.csv").set_index("slide_id")
    assert set(ours["split"]) == {"val", "test"}
    again = pd.read_csv(tmp_path / "predictions.csv").set_index("slide_id").loc[ours.index]
    columns = [c for c in ours if c.startswith("probability")]
    assert (ours[columns] - again[columns]).abs().to_numpy().max() < 1e-5


def test_slides_and_labels_without_partner_are_listed(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(cohort / "labels.csv", dtype=str)
    lonely = table["slide_id"].iloc[0]
    table["slide_id"] = table["slide_id"].replace(lonely, "nowhere")
    table.to_csv(tmp_path / "labels.csv", index=False)
    code = run(
        "train", f"slides={cohort / 'slides'}", f"labels={tmp_path / 'labels.csv'}",
        f"out={tmp_path / 'out'}", "baselines=[]", "heatmaps=0",
        "checkpointing=true", *TILES, *QUICK,
    )  # fmt: skip
    assert code == 3
    failures = pd.read_csv(tmp_path / "out" / "failures.csv").set_index("slide_id")
    assert failures.loc[lonely, "status"] == "no_label"
    assert failures.loc["nowhere", "status"] == "no_slide"
    assert "row" in failures.loc["nowhere", "reason"]


def test_missing_mpp_is_listed_and_a_column_gives_it(
    tmp_path: Path, paint, write_tiff, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    for index in range(8):
        image = paint(640, 640, (slice(64, 576), slice(64, 512 + 8 * index)))  # no copies
        write_tiff(slides / f"s{index}.tiff", image, mpp=None if index == 7 else 0.5)
    table = pd.DataFrame({"slide_id": [f"s{i}" for i in range(8)], "label": ["a", "b"] * 4})
    table["split"] = ["train", "train", "val", "val", "test", "test", "train", "train"]
    table.to_csv(tmp_path / "labels.csv", index=False)
    command = [
        "train", f"slides={slides}", f"labels={tmp_path / 'labels.csv'}", "baselines=[colour]",
        "heatmaps=0", *TILES, *QUICK,
    ]  # fmt: skip
    assert run(*command, f"out={tmp_path / 'out'}") == 3
    failures = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert failures[["slide_id", "status"]].to_numpy().tolist() == [["s7", "missing_mpp"]]
    assert "mpp" in failures["remedy"].iloc[0]
    table["mpp"] = ["", "", "", "", "", "", "", "0.5"]
    table.to_csv(tmp_path / "labels.csv", index=False)
    assert run(*command, f"out={tmp_path / 'again'}") == 0
    table["mpp"] = ["", "", "", "", "", "", "", "half"]
    table.to_csv(tmp_path / "labels.csv", index=False)
    capsys.readouterr()
    assert run(*command, f"out={tmp_path / 'third'}") == 2
    assert "row 9: mpp must be a positive number; got 'half'" in capsys.readouterr().err


def table_text(*rows: str) -> str:
    return "\n".join(["slide_id,patient_id,label", *rows]) + "\n"


BAD_TABLES = {
    "no such file": (None, ["labels.csv", "not"]),
    "columns": ("name,kind\na,b\n", ["slide_id", "label", "name", "kind"]),
    "duplicate": (table_text("a,p,x", "a,q,y"), ["'a'", "2", "3"]),
    "empty label": (table_text("a,p,", "b,q,y"), ["label", "2"]),
    "one class": (table_text("a,p,x", "b,q,x"), ["two classes"]),
    "nothing in common": (table_text("a,p,x", "b,q,y"), ["no slide has a label", "'a'"]),
    "empty": ("", ["holds nothing"]),
}


@pytest.mark.parametrize("case", BAD_TABLES, ids=str)
def test_bad_tables_are_named(
    case: str, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, words = BAD_TABLES[case]
    labels = tmp_path / "labels.csv"
    if text is not None:
        labels.write_text(text)
    code = run(
        "train", f"slides={cohort / 'slides'}", f"labels={labels}", f"out={tmp_path / 'o'}", *QUICK
    )
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for word in words:
        assert word in error


BAD_COMMANDS = [
    (["slides={tmp}/absent", "labels={labels}"], ["absent"]),
    (["slides={tmp}/nothing", "labels={labels}"], ["nothing"]),
    (["slides={labels}", "labels={labels}"], ["labels.csv"]),
    (["slides={slides}"], ["labels=TABLE"]),
    (["labels={labels}"], ["slides=FOLDER"]),
    (["pattern=windo"], ["windo", "window_global"]),
    (["model=gigantic"], ["gigantic", "tiny"]),
    (["encoder=resnet"], ["resnet", "stats"]),
    (["baselines=[svm]"], ["svm", "abmil"]),
    (["pattern.expression=Windo(3)"], ["Windo", "SlidingWindow"]),
    (["tile_px=2"], ["tile_px"]),
    (["model.dim=28"], ["head_dim"]),
    (["epochs=0"], ["epochs"]),
    (["unknown=1"], ["unknown"]),
    (["trainer=gpu"], ["GPU"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD_COMMANDS, ids=lambda x: x[0][:24])
def test_bad_commands_are_named(
    arguments: list[str],
    words: list[str],
    cohort: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if arguments == ["trainer=gpu"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "nothing").mkdir()
    names = {"tmp": tmp_path, "labels": cohort / "labels.csv", "slides": cohort / "slides"}
    given = [argument.format(**names) for argument in arguments]
    defaults = [f"out={tmp_path / 'out'}", f"data_root={tmp_path / 'data'}"]
    if not any(word in argument for word in ("slides", "labels") for argument in given):
        defaults += SMALL[:3]
    code = run("train", *given, *defaults, "trainer.progress=false", "logger=none")
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_bad_checkpoints_are_named(
    cohort: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    for ckpt, word in (
        (tmp_path / "absent.ckpt", "absent.ckpt"),
        (text, "text.ckpt"),
        (trained, "folder"),
        (trained / "models" / "model" / "last.ckpt", "unfinished training"),
    ):
        code = run(
            "predict", f"slides={cohort / 'slides'}", f"ckpt={ckpt}", f"out={tmp_path / 'o'}"
        )
        error = capsys.readouterr().err
        assert code == 2, error
        assert word in error


def test_only_bad_slides_is_an_error(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    (slides / "a.svs").write_text("no")
    code = run(
        "predict", f"slides={slides}", f"ckpt={trained / 'model.ckpt'}", f"out={tmp_path / 'o'}"
    )
    assert code == 2
    assert "no slide could be predicted" in capsys.readouterr().err
    assert "unreadable" in (tmp_path / "o" / "failures.csv").read_text()


@pytest.mark.real_data
def test_real_slides_good_and_refused(
    real_data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    source = real_data / "slides"
    names = [
        "CMU-1-Small-Region.svs", "TCGA-CR-7395-01A-01-TS1.svs", "broken.svs", "unreadable.svs",
        "unopenable.tiff", "CMU-1-Small-Region.jp2.tiff", "CMU-1-Small-Region.jpeg.tiff",
        "small_vectra.qptiff",
    ]  # fmt: skip
    for name in names:
        target = name.replace("Region.jp2", "Region-jp2").replace("Region.jpeg", "Region-jpeg")
        shutil.copy(source / name, slides / target)
    shutil.copy(source / "colorectal" / "crc_H_00.tiff", slides)
    code = run(
        "predict", f"slides={slides}", f"ckpt={trained / 'model.ckpt'}", f"out={tmp_path / 'o'}"
    )
    assert code == 3
    table = pd.read_csv(tmp_path / "o" / "predictions.csv")
    assert table["slide_id"].tolist() == ["CMU-1-Small-Region", "crc_H_00"]
    failures = pd.read_csv(tmp_path / "o" / "failures.csv").set_index("slide_id")
    assert len(failures) == 7
    assert failures.loc["TCGA-CR-7395-01A-01-TS1", "status"] == "missing_mpp"
    assert failures.loc["unreadable", "status"] == "unreadable"
    assert failures.loc["CMU-1-Small-Region-jpeg", "status"] == "mpp_suspect"
    assert failures["remedy"].str.len().min() > 10
