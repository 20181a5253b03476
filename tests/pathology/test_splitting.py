"""The verb split, through the command line."""

import json
from pathlib import Path

import pandas as pd
import pytest

from pipelines.pathology.__main__ import VERBS
from pipelines.shared.cli import main


def run(*arguments: object) -> int:
    return main("pathology", VERBS, ["split", *map(str, arguments)])


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """40 slides of 20 patients at 4 hospitals; two classes, survival, an age, two cohorts."""
    rows = [
        {
            "slide_id": f"s{row}.svs",
            "patient_id": f"p{row // 2:02d}",
            "label": "ab"[row // 2 % 2],
            "time": 10 + row,
            "event": row // 4 % 2,
            "age": 40 + row,
            "hospital": f"h{row // 2 % 4}",
            "cohort": "later" if row >= 36 else "first",
        }
        for row in range(40)
    ]
    path = tmp_path / "labels.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def _tables(out: Path) -> list[pd.DataFrame]:
    return [
        pd.read_csv(out / f"splits_{k}.csv", dtype=str) for k in range(len([*out.glob("s*_*")]))
    ]


def test_folds_are_written_with_their_counts(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    assert run(f"labels={labels}", "folds=5", f"out={out}") == 0

    shown = capsys.readouterr().out
    assert "40 slides of 20 patients, stratified by label" in shown
    tables = _tables(out)
    assert len(tables) == 5
    for table in tables:
        assert list(table.columns) == ["slide_id", "patient_id", "split"]
        assert table.groupby("patient_id")["split"].nunique().max() == 1
        assert table["split"].value_counts()["test"] == 8
    tested = pd.concat(table[table["split"] == "test"] for table in tables)
    assert sorted(tested["slide_id"]) == sorted(f"s{row}" for row in range(40))
    summary = pd.read_csv(out / "summary.csv")
    assert summary[summary["split"] == "test"]["patients"].tolist() == [2] * 10
    assert set(json.loads((out / "metrics.json").read_text())["sha256"]) == {
        f"splits_{fold}.csv" for fold in range(5)
    }
    assert run(f"labels={labels}", "folds=5", f"out={out}") == 0
    assert "holds these splits already" in capsys.readouterr().out
    assert run(f"labels={labels}", "folds=4", f"out={out}") == 2


def test_a_dry_run_writes_nothing(labels: Path, tmp_path: Path) -> None:
    assert run(f"labels={labels}", f"out={tmp_path / 'out'}", "dry_run=true") == 0

    assert not (tmp_path / "out").exists()


def test_sites_and_an_external_cohort(labels: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    code = run(
        f"labels={labels}", "scheme=site", "site=hospital", "folds=2", "external.cohort=later",
        f"out={out}",
    )  # fmt: skip

    assert code == 0
    hospital = pd.read_csv(labels, dtype=str).set_index("slide_id")["hospital"]
    hospital.index = hospital.index.str.removesuffix(".svs")
    for table in _tables(out):
        assert (table["split"] == "external").sum() == 4
        sites = hospital[table["slide_id"]].groupby(table["split"].to_numpy()).agg(set)
        assert not sites["test"] & sites["train"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["where.label=a"], "20 slides of 10 patients"),
        (["columns.label=none"], "no column 'none'"),
        (["stratify=age"], "stratified by age, cut at its quartiles"),
    ],
)
def test_other_columns_stratify(
    labels: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code = run(f"labels={labels}", "folds=2", "dry_run=true", *arguments)

    shown = capsys.readouterr()
    assert code == (2 if "no column" in words else 0)
    assert words in shown.out + shown.err


def test_survival_is_stratified_by_event(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "survival.csv"
    pd.read_csv(labels).drop(columns="label").to_csv(path, index=False)

    assert run(f"labels={path}", "folds=2", "dry_run=true") == 0

    assert "stratified by event" in capsys.readouterr().out


def test_patients_alone_may_be_split(labels: Path, tmp_path: Path) -> None:
    table = pd.read_csv(labels).drop_duplicates("patient_id").drop(columns="slide_id")
    table.rename(columns={"patient_id": "PATIENT"}).to_csv(tmp_path / "clini.csv", index=False)
    out = tmp_path / "out"

    assert run(f"labels={tmp_path / 'clini.csv'}", "folds=2", f"out={out}") == 0

    assert list(_tables(out)[0].columns) == ["patient_id", "split"]


def test_clams_splits_are_taken_over_and_checked(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = tmp_path / "given.csv"
    given.write_text(",train,val,test\n0,s0,s2,s4\n1,s1,s3,s6\n2,s8,,\n3,s10,,\n")
    out = tmp_path / "out"

    assert run(f"labels={labels}", f"splits={given}", f"out={out}") == 0

    assert len(_tables(out)[0]) == 8
    given.write_text(",train,val,test\n0,s0,s2,s4\n1,s6,s3,s1\n")
    assert run(f"labels={labels}", f"splits={given}", f"out={tmp_path / 'torn'}") == 2
    assert "group 'p00': train: s0; test: s1" in capsys.readouterr().err


def test_copies_in_two_splits_are_a_leak(
    labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    index = pd.DataFrame(
        {
            "slide_id": [f"s{row}" for row in range(40)],
            "digest": [f"d{row // 4}" for row in range(40)],
        }
    )
    here = "pipelines.pathology.stored_features"
    monkeypatch.setattr(f"{here}.read_index", lambda store: index)
    monkeypatch.setattr(f"{here}.list_slides", lambda store: index["slide_id"].tolist())

    assert run(f"labels={labels}", f"features={tmp_path}", "dry_run=true") == 2

    error = capsys.readouterr().err
    assert "contents stand in more than one split" in error
    assert "copies of each other" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scheme=random"], "scheme is one of kfold"),
        (["scheme=site"], "needs site=COLUMN"),
        (["scheme=site", "site=city"], "needs site=COLUMN"),
        (["stratify=grade"], "no column 'grade' to stratify by"),
        (["external.cohort=never"], "'never' in column 'cohort'"),
        (["folds=30"], "has 10 groups"),
    ],
)
def test_what_cannot_be_split_is_refused(
    labels: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(f"labels={labels}", *arguments) == 2

    assert words in capsys.readouterr().err


@pytest.mark.real_data
def test_real_slides_of_five_classes_are_split_evenly(real_data: Path, tmp_path: Path) -> None:
    labels = real_data / "slides" / "colorectal" / "labels.csv"
    out = tmp_path / "out"

    assert run(f"labels={labels}", "folds=5", f"out={out}") == 0

    summary = pd.read_csv(out / "summary.csv")
    tested = summary[summary["split"] == "test"]
    assert tested.groupby("label")["patients"].sum().tolist() == [17] * 5
    assert set(tested["patients"]) == {3, 4}
