"""The table of steps against tiles, on bags that a CPU can train."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.pathology import scale
from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.ordering import hilbert_index
from pipelines.pathology.scale import Row, draw_tissue, make_bag
from pipelines.pathology.store import read_slide, slide_folder
from pipelines.shared.batch import Example, ExampleList
from pipelines.shared.cli import main
from pipelines.shared.fit import FitSettings, fit
from pipelines.shared.objective import Classification

TINY = ["trainer=cpu", "model=tiny", "num_features=5", "steps=1", "trainer.progress=false"]


def run(*arguments: object) -> int:
    return main("pathology", VERBS, ["scale", *TINY, *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scale")
    assert run("tiles=[400,130,400]", f"out={out}") == 0
    return out


def test_the_table_holds_a_row_for_each_bag(measured: Path) -> None:
    metrics = json.loads((measured / "metrics.json").read_text())
    assert [row["tiles"] for row in metrics["rows"]] == [130, 400]
    for row in metrics["rows"]:
        assert 0 < row["layout_seconds"] < row["step_seconds"]
        assert row["peak_bytes"] > 2**20
    assert metrics["engine"] == "blockwise"
    assert metrics["summary"]["time_ratio"] > 0
    text = (measured / "scale.md").read_text()
    assert "SlidingWindow(radius=8) | GlobalTokens(first=4), 32-true, checkpointing on" in text
    for words in ("0.1 million weights", "| 130 |", "| 400 |", "x the time and", "blockwise |"):
        assert words in text


def test_a_finished_table_is_shown_and_an_interrupted_one_goes_on(
    measured: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tiles=[130,200]", f"out={tmp_path}", f"features={measured / 'features'}"]
    assert run(*command) == 0
    written = {path: path.stat().st_mtime_ns for path in (measured / "features").rglob("*.json")}
    kept = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "metrics.json").unlink()
    cut = kept | {"rows": kept["rows"][:1]}
    (tmp_path / "rows.json").write_text(json.dumps(cut))
    assert run(*command, "checkpointing=true") == 0
    again = json.loads((tmp_path / "rows.json").read_text())
    assert again["rows"][0] == kept["rows"][0]
    assert again["rows"][1] != kept["rows"][1]
    capsys.readouterr()
    assert run(*command) == 0
    assert "finished run" in capsys.readouterr().out
    assert written == {path: path.stat().st_mtime_ns for path in written}


def test_a_bag_that_does_not_fit_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    monkeypatch.setattr(scale, "fit", full)
    assert run("tiles=[130]", f"out={tmp_path}") == 3
    assert "130 tiles: CUDA out of memory. Tried to allocate 2 GiB.\n" in capsys.readouterr().out
    assert "| out of memory |" in (tmp_path / "scale.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiles=[]"], "tiles= takes"),
        (["tiles=[0,5]"], "above 0; got [0, 5]"),
        (["tiles=[1.5]"], "tiles= takes"),
        (["steps=0"], "at least 1"),
        (["model.dim=28"], "head_dim"),
        (["trainer.devices=2"], "one device"),
    ],
)
def test_wrong_settings_are_named(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, f"out={tmp_path / 'out'}") == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("num_tiles", [1, 63, 129, 5000])
def test_tissue_fills_its_share_of_a_square_in_hilbert_order(num_tiles: int) -> None:
    grid = draw_tissue(num_tiles)
    side = int(np.ceil((num_tiles / scale.TISSUE_SHARE) ** 0.5))
    assert grid.shape == (num_tiles, 2)
    assert grid.min() >= 0
    assert grid.max() < side
    assert (np.diff(hilbert_index(grid)) > 0).all()  # and no cell twice


def test_a_bag_is_kept_until_something_else_is_asked_for(tmp_path: Path) -> None:
    def made(**asked: int) -> tuple[int, np.ndarray]:
        folder = slide_folder(tmp_path, make_bag(tmp_path, 40, **asked))
        return (folder / "zarr.json").stat().st_mtime_ns, read_slide(folder).features()

    time, features = made(num_features=3, seed=0)
    assert features.shape == (40, 3)
    assert made(num_features=3, seed=0)[0] == time
    other = made(num_features=3, seed=1)
    assert other[0] != time
    assert not np.array_equal(other[1], features)
    assert made(num_features=4, seed=1)[1].shape == (40, 4)


def test_straight_lines_are_found() -> None:
    rows = [Row(t, 0.1, 0.1, 0.5 + 2e-6 * t, (1 << 30) + (t << 10), {}) for t in (10**5, 10**6)]
    rows.append(Row(2 * 10**6, 0.1, None, None, None, {}))
    found = scale._linearity(rows)
    assert found["seconds"] == pytest.approx(0.5)
    assert found["seconds_per_million"] == pytest.approx(2.0)
    assert found["gib_per_million"] == pytest.approx(1e6 * 1024 / 2**30)
    assert found["time_ratio"] == pytest.approx(2.5 / 7.0)
    assert max(found["seconds_off"], found["gib_off"]) < 1e-9
    assert "1,000,000 of what it takes at 100,000" not in scale._sentence(rows)
    assert "at 1,000,000 tiles of what it takes at 100,000" in scale._sentence(rows)


def test_calls_are_counted_over_all_starts_of_a_run(tmp_path: Path) -> None:
    config = {
        "num_features": 5, "model": {"dim": 16, "depth": 2, "num_heads": 2},
        "pattern": {"expression": "SlidingWindow(radius=1)"}, "checkpointing": False,
    }  # fmt: skip
    coords = torch.from_numpy(draw_tissue(30))
    bags = ExampleList(
        [Example(torch.randn(30, 5), coords, i, f"b{i}", f"b{i}", i) for i in (0, 1)]
    )
    settings = FitSettings(epochs=3, max_tokens=60, progress=False)
    given = {"objective": Classification(("0", "1")), "out": tmp_path, "settings": settings}
    _, report = fit(scale._build(config), bags, bags, **given)
    _, again = fit(scale._build(config), bags, bags, **given)
    assert report.engine_calls.keys() == {"blockwise"}
    assert report.engine_calls["blockwise"] >= 3 * 2 * 2  # epochs, batches of both sets, layers
    assert again.engine_calls == report.engine_calls
