import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.shared.assessment import Assessment, assess
from pipelines.shared.metrics import ClassPredictions, JointPredictions
from pipelines.shared.report import (
    NO_BREAK,
    Words,
    spread_over_folds,
    summarise,
    write_report,
)
from pipelines.shared.saved_predictions import read_parts
from tests.shared.tables_of_predictions import (
    write_classes,
    write_labels,
    write_risks,
    write_tracks,
    write_values,
)

WORDS = Words("slides", "patients", {"model": "ours <3>"})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Assessment:
    folder = tmp_path_factory.mktemp("tables")
    models = {
        name: [
            read_parts(
                write_classes(folder / f"{name}_{fold}.csv", seed=fold, start=30 * fold,
                              strength=strength, external=8),
                group_column="patient_id",
            )
            for fold in range(2)
        ]
        for name, strength in (("model", 3.0), ("abmil", 0.5))
    }  # fmt: skip
    site = {f"s{row}": "north" if row % 30 < 20 else "south" for row in range(60)}
    return assess(models, reference="abmil", attributes={"site": site}, resamples=50)


def test_the_page_holds_everything_itself(found: Assessment, tmp_path: Path) -> None:
    path = tmp_path / "report.html"

    write_report(
        path, found, title="A <title>", words=WORDS, facts={"labels": "a&b.csv"}, notes=["A note."]
    )

    page = path.read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "http" not in re.sub(r"data:[^\"]*", "", page)
    assert page.count("data:image/svg+xml;base64,") == 4
    assert "A &lt;title&gt;" in page
    assert "a&amp;b.csv" in page
    assert "ours &lt;3&gt;" in page
    assert 'name="viewport"' in page
    for words in (
        "Difference to abmil", "External test: 8 slides", "AUROC by site", "AUROC by fold",
        "Thresholds", "Calibration", "A note.", "Youden",
    ):  # fmt: skip
        assert words in page
    score = found.scores["model"]["auroc"]
    assert f"{score.value:.3f}{NO_BREAK}[{score.low:.3f}," in page
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_risks, "Survival by risk"),
        (write_values, "Predicted and true"),
        (write_tracks, "R2 by track"),
    ],
)
def test_other_tasks_have_their_figures(write: object, words: str, tmp_path: Path) -> None:
    assert callable(write)
    single = assess({"model": [read_parts(write(tmp_path / "t.csv"))]}, resamples=20)

    write_report(tmp_path / "r.html", single, title="t", words=WORDS, facts={}, notes=[])

    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert words in page
    assert "Youden" not in page


def test_labels_have_a_threshold_each_and_a_row_each(tmp_path: Path) -> None:
    single = assess({"model": [read_parts(write_labels(tmp_path / "t.csv"))]}, resamples=20)

    assert single.task == "multilabel"
    given = single.tested["model"][0].predictions
    assert isinstance(given, JointPredictions)
    cuts = [part.threshold for part in given.parts.values() if isinstance(part, ClassPredictions)]
    assert cuts[0] != cuts[1]
    assert min(cut or 0 for cut in cuts) > 0.2
    assert list(single.by_target) == ["common", "rare"]
    assert single.thresholds == {"model, common": [cuts[0]], "model, rare": [cuts[1]]}
    mean = np.mean([s["model"]["auroc"].value or 0 for s in single.by_target.values()])
    assert single.scores["model"]["auroc"].value == pytest.approx(mean)
    text = summarise(single, WORDS)
    assert "AUROC by label" in text
    assert "exact match" in text
    write_report(tmp_path / "r.html", single, title="t", words=WORDS, facts={}, notes=[])
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "ROC, mean over the labels" in page
    assert "probability of the label" in page
    assert page.count("data:image/svg+xml;base64,") == 2


def test_the_terminal_shows_models_differences_and_subgroups(found: Assessment) -> None:
    text = summarise(found, WORDS)

    assert text.startswith("40 slides of 20 patients in 2 folds; scores within folds, averaged")
    assert "difference to abmil, paired" in text
    assert "external test, 8 slides" in text
    assert "AUROC by site" in text
    assert "ECE after temperature" in text
    assert "standard deviation over the folds" in text


def test_a_part_of_the_rows_stands_beside_with_all_its_tables(
    found: Assessment, tmp_path: Path
) -> None:
    path = tmp_path / "r.html"
    write_report(
        path, found, title="t", words=WORDS, facts={}, notes=[], beside={"of the north": found}
    )
    page = path.read_text(encoding="utf-8")
    for words in (
        "Scores of the north", "Difference to abmil of the north", "AUROC by site of the north",
    ):  # fmt: skip
        assert words in page


def test_the_spread_is_that_of_the_folds(found: Assessment) -> None:
    areas = [value or 0 for value in found.by_fold["model"]["auroc"]]
    assert spread_over_folds(areas) == pytest.approx(np.std(areas, ddof=1))
    assert spread_over_folds([0.5, None]) is None
