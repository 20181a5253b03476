from pathlib import Path

import pandas as pd
import pytest

from pipelines.shared.errors import InputError
from pipelines.shared.metrics import (
    ClassPredictions,
    JointPredictions,
    RiskPredictions,
    ValuePredictions,
    measure,
)
from pipelines.shared.saved_predictions import find_tables, read_parts
from tests.shared.tables_of_predictions import (
    write_classes,
    write_labels,
    write_risks,
    write_tracks,
    write_values,
)


def test_classes_are_read_by_split(tmp_path: Path) -> None:
    path = write_classes(tmp_path / "t.csv", external=4)

    parts = read_parts(path, group_column="patient_id")

    assert {split: len(part) for split, part in parts.items()} == {
        "val": 10, "test": 20, "external": 4,
    }  # fmt: skip
    assert parts["test"].ids[0] == "s10"
    assert parts["test"].groups[:3] == ("p5", "p5", "p6")
    given = parts["test"].predictions
    assert isinstance(given, ClassPredictions)
    assert given.classes == ("a", "b")


def test_rows_of_a_group_are_averaged(tmp_path: Path) -> None:
    path = write_classes(tmp_path / "t.csv")
    rows = pd.read_csv(path)
    rows = rows[rows["split"] == "test"]

    part = read_parts(path, group_column="patient_id", by_group=True)["test"]

    assert part.ids == part.groups == tuple(f"p{number}" for number in range(5, 15))
    given = part.predictions
    assert isinstance(given, ClassPredictions)
    expected = rows.groupby("patient_id", sort=False)["probability_b"].mean()
    assert given.probabilities[:, 1] == pytest.approx(expected.to_numpy())


def test_risks_and_numbers_are_read_and_averaged(tmp_path: Path) -> None:
    risks = read_parts(write_risks(tmp_path / "r.csv"))["test"].predictions
    values = read_parts(write_values(tmp_path / "v.csv"))["test"].predictions

    assert isinstance(risks, RiskPredictions)
    assert risks.high is not None
    assert (risks.high == (risks.risks > 0)).all()
    assert isinstance(values, ValuePredictions)
    table = pd.DataFrame(
        {"slide_id": ["a", "b", "c"], "patient_id": ["p", "p", "q"], "time": [3, 3, 5],
         "event": [1, 1, 0], "risk": [1.0, 2.0, 0.0]}
    )  # fmt: skip
    table.to_csv(tmp_path / "two.csv", index=False)
    merged = read_parts(tmp_path / "two.csv", group_column="patient_id", by_group=True)["test"]
    assert isinstance(merged.predictions, RiskPredictions)
    assert merged.predictions.risks.tolist() == [1.5, 0.0]
    assert merged.predictions.times.tolist() == [3.0, 5.0]


def test_several_labels_are_read_and_averaged(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "t.csv")
    given = read_parts(path)["test"].predictions
    assert isinstance(given, JointPredictions)
    assert list(given.parts) == ["common", "rare"]
    assert given.parts["rare"].targets.sum() == 8
    table = pd.read_csv(path)
    table["group"] = table["id"].str[:-1]  # r0, r1 to r7: ten rows each, whose labels differ
    table.to_csv(path, index=False)
    with pytest.raises(InputError, match="differ in what is known"):
        read_parts(path, group_column="group", by_group=True)
    table = table.assign(label_rare="2")
    table.to_csv(path, index=False)
    with pytest.raises(InputError, match="row 2: label_rare is 1 or 0; got '2'"):
        read_parts(path)


def test_tracks_come_back_to_the_last_digit(tmp_path: Path) -> None:
    given = read_parts(write_tracks(tmp_path / "t.csv"))["test"].predictions
    assert isinstance(given, JointPredictions)
    assert list(given.parts) == ["one.plus", "two"]
    assert measure(given.parts["one.plus"])["r2"].value == pytest.approx(0.75, abs=0.05)
    table = pd.read_csv(tmp_path / "t.csv").drop(columns="two.covariance")
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(InputError, match=r"no column 'two\.covariance'"):
        read_parts(tmp_path / "t.csv")


def test_a_group_of_two_labels_cannot_be_one_row(tmp_path: Path) -> None:
    table = pd.read_csv(write_classes(tmp_path / "t.csv"))
    table.loc[table.index[-1], "label"] = "a" if table["label"].iloc[-1] == "b" else "b"
    table.to_csv(tmp_path / "t.csv", index=False)

    with pytest.raises(InputError, match="rows of 'p14' differ"):
        read_parts(tmp_path / "t.csv", group_column="patient_id", by_group=True)


def test_models_of_all_folds_are_found(tmp_path: Path) -> None:
    for fold in (0, 1, 10):
        write_classes(tmp_path / f"fold_{fold}" / "predictions.csv")
        write_classes(tmp_path / f"fold_{fold}" / "models" / "model" / "predictions.csv")
        write_classes(tmp_path / f"fold_{fold}" / "models" / "abmil" / "predictions.csv")

    found = find_tables(tmp_path)

    assert list(found) == ["model", "abmil"]
    assert [path.parent.name for path in found["model"]] == ["fold_0", "fold_1", "fold_10"]
    assert list(find_tables(tmp_path / "fold_0")) == ["model", "abmil"]
    (tmp_path / "fold_1" / "models" / "abmil" / "predictions.csv").unlink()
    with pytest.raises(InputError, match="no predictions of abmil"):
        find_tables(tmp_path)


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_tables(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no predictions\.csv"):
        find_tables(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"probability_a": "high"}, "probability_a must be a number"),
        ({"probability_a": "0.9", "probability_b": "0.9"}, "add up to 1.8"),
        ({"label": "c"}, "label 'c' has no column"),
        ({"split": "dev"}, "split 'dev'"),
        ({"slide_id": "s0"}, "stands twice"),
        ({"split": "val", "slide_id": None}, "no test row"),
    ],
)
def test_a_wrong_table_is_refused(
    tmp_path: Path, change: dict[str, str | None], words: str
) -> None:
    table = pd.read_csv(write_classes(tmp_path / "t.csv"), dtype=str)
    for column, value in change.items():
        table[column] = table[column] if value is None else value
    table.to_csv(tmp_path / "t.csv", index=False)

    with pytest.raises(InputError, match=words):
        read_parts(tmp_path / "t.csv")


def test_an_order_names_every_class(tmp_path: Path) -> None:
    path = write_classes(tmp_path / "t.csv", classes=("low", "mid", "high"))

    given = read_parts(path, order=["low", "mid", "high"])["test"].predictions
    assert isinstance(given, ClassPredictions)
    assert given.ranks is not None
    assert given.ranks.tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="class_order must name each"):
        read_parts(path, order=["low", "high"])
