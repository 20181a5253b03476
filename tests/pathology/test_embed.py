"""The verb `embed`, through the command line."""

import json

import pandas as pd
import pytest

from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.store import list_slides, read_index, read_slide, slide_folder
from pipelines.shared.cli import main


@pytest.fixture
def slides(tmp_path, write_tiff, paint):
    folder = tmp_path / "slides"
    folder.mkdir()
    for number in range(4):
        side = 256 + 64 * number
        image = paint(512, 512, (slice(32, side), slice(32, side)))
        write_tiff(folder / f"s{number}.tiff", image)
    return folder


@pytest.fixture
def embed(slides, tmp_path):
    def run(*arguments, out="out"):
        given = [f"slides={slides}", f"out={tmp_path / out}", "tile_px=64", "progress=false"]
        return main("pathology", VERBS, ["embed", *given, "num_workers=1", *arguments])

    return run


def test_slides_are_embedded_once_and_a_bad_one_is_listed(embed, slides, tmp_path, capsys):
    (slides / "text.svs").write_text("not a slide")
    assert embed() == 3
    out = tmp_path / "out"
    store = out / "features"
    assert list_slides(store) == ["s0", "s1", "s2", "s3"]
    assert read_index(store)["encoder"].unique().tolist() == ["stats"]
    failures = pd.read_csv(out / "failures.csv")
    assert failures[["slide_id", "status"]].to_numpy().tolist() == [["text", "unreadable"]]
    reading = pd.read_csv(out / "reading.csv")
    assert reading["source"].unique().tolist() == ["openslide"]
    assert reading["why"].str.contains("DEFLATE").all()
    assert (reading["num_damaged"] == 0).all()
    capsys.readouterr()
    (slides / "text.svs").unlink()
    assert embed() == 0
    assert "4 slides, 4 of them as they were" in capsys.readouterr().out
    assert len(pd.read_csv(out / "reading.csv")) == 4


def test_dry_run_says_what_would_happen_and_writes_nothing(embed, slides, tmp_path, capsys):
    assert embed("dry_run=true") == 0
    shown = capsys.readouterr().out
    for words in ("s3", "openslide (tiles compressed by", "filter none", "8 x 8", "4 slides to"):
        assert words in shown
    assert not (tmp_path / "out").exists()
    (slides / "text.svs").write_text("not a slide")
    assert embed() == 3
    capsys.readouterr()
    assert embed("dry_run=true") == 3
    shown = capsys.readouterr().out
    assert "0 slides to embed with stats" in shown
    assert "4 as they are, 1 refused" in shown


def test_machines_share_a_cohort_and_a_store(embed, tmp_path):
    shared = f"features={tmp_path / 'shared'}"
    for number in (1, 2, 3):
        assert embed(shared, f"worker={number}/3", out="cluster") == 0
    assert embed(out="alone") == 0
    assert list_slides(tmp_path / "shared") == ["s0", "s1", "s2", "s3"]
    for slide_id in ("s0", "s3"):
        one, two = (
            read_slide(slide_folder(folder, slide_id)).attributes["digest"]
            for folder in (tmp_path / "shared", tmp_path / "alone" / "features")
        )
        assert one == two
    counts = [
        len(pd.read_csv(tmp_path / "cluster" / f"worker_{number}_of_3" / "reading.csv"))
        for number in (1, 2, 3)
    ]
    assert counts == [2, 1, 1]


def test_looser_thresholds_add_tiles_and_other_tiles_are_refused(embed, tmp_path, capsys):
    assert embed("min_tissue=0.9") == 0
    strict = pd.read_csv(tmp_path / "out" / "reading.csv")["num_tiles"].sum()
    assert embed("min_tissue=0.1") == 0
    reading = pd.read_csv(tmp_path / "out" / "reading.csv")
    assert reading["num_reused"].sum() == strict < reading["num_tiles"].sum()
    capsys.readouterr()
    features = f"features={tmp_path / 'out' / 'features'}"
    for change, words in (
        ("mpp=1.0", "mpp 0.5 -> 1.0"),
        ("tile_px=128", "tile_px 64 -> 128"),
        ("encoder=stats_grey", "of encoder stats, of tiles cut otherwise"),
    ):
        assert embed(features, change, out=f"other_{change[:3]}") == 2
        assert words in capsys.readouterr().err


def test_several_encoders_on_one_plan(embed, tmp_path):
    assert embed("--multirun", "encoder=stats,stats_grey") == 0
    stores = [tmp_path / "out" / f"encoder-{name}" / "features" for name in ("stats", "stats_grey")]
    one, two = (read_index(store) for store in stores)
    assert one["plan_hash"].tolist() == two["plan_hash"].tolist()
    assert one["num_tiles"].tolist() == two["num_tiles"].tolist()
    assert one["encoder"].tolist() != two["encoder"].tolist()
    shared = tmp_path / "shared"
    assert embed("--multirun", "encoder=stats,stats_grey", f"features={shared}", out="both") == 0
    both = read_index(shared)
    assert sorted(both["encoder"].unique()) == ["stats", "stats_grey"]
    assert len(both) == len(one) + len(two)
    assert embed("encoder=stats_grey", f"features={shared}", out="again") == 0
    assert read_index(shared).equals(both)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("worker=3/2", "worker=2/4"),
        ("worker=half", "worker=2/4"),
        ("worker=1/9", "4 slides for 9 workers"),
        ("slide_mpp=-1", "slide_mpp must be a positive number"),
        ("read_with=cucim", "read_with=cucim"),
        ("encoder=resnet", "encoder is one of: conch"),
        ("encoder=timm", "encoder.model"),
        ("tile_px=4", "tile_px"),
    ],
)
def test_wrong_settings_are_named(embed, argument, words, capsys):
    assert embed(argument) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_only_bad_slides_is_an_error(embed, slides, capsys):
    for path in slides.iterdir():
        path.write_text("not a slide")
    assert embed() == 2
    assert "no slide could be embedded" in capsys.readouterr().err


def test_help_shows_the_encoders(capsys):
    assert main("pathology", VERBS, ["embed", "--help"]) == 0
    shown = capsys.readouterr().out
    for words in ("worker=1/1", "dry_run=false", "uni2", "gigapath", "conch", "huggingface"):
        assert words in shown


def test_tiles_are_chosen_from_the_surveys_of_tile(embed, slides, tmp_path, capsys):
    given = [f"slides={slides}", "tile_px=64", "progress=false", "preview=false"]
    tile = ["tile", *given, f"out={tmp_path / 'tiles'}"]
    assert main("pathology", VERBS, tile) == 0
    surveyed = f"tiles={tmp_path / 'tiles'}"
    assert embed(surveyed) == 0
    assert embed(out="plain") == 0
    store = tmp_path / "out" / "features"
    one, two = (read_index(folder) for folder in (store, tmp_path / "plain" / "features"))
    assert one["num_tiles"].tolist() == two["num_tiles"].tolist()
    outlines = tmp_path / "edited"
    outlines.mkdir()
    corner = [[0, 0], [256, 0], [256, 256], [0, 256], [0, 0]]
    polygon = {"type": "Polygon", "coordinates": [corner]}
    feature = {"type": "Feature", "geometry": polygon, "properties": {}}
    (outlines / "s3.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": [feature]}), encoding="utf-8"
    )
    assert main("pathology", VERBS, [*tile, f"outlines={outlines}"]) == 0
    capsys.readouterr()
    assert embed(surveyed) == 0
    assert "4 slides, 3 of them as they were" in capsys.readouterr().out
    grid = read_slide(slide_folder(store, "s3")).grid
    assert grid.max() < 4
    (tmp_path / "tiles" / "surveys" / "s0.npz").unlink()
    assert embed(surveyed, out="other") == 3
    failures = pd.read_csv(tmp_path / "other" / "failures.csv")
    assert failures[["slide_id", "status"]].to_numpy().tolist() == [["s0", "no_survey"]]
    assert embed(surveyed, "tile_px=32", out="third") == 2
    assert "stale_survey" in capsys.readouterr().out
    assert embed(f"tiles={slides}", out="fourth") == 2
    assert "holds no surveys" in capsys.readouterr().err
