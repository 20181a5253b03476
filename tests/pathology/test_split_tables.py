"""Tables of splits as the tools write them, in small."""

import json
from pathlib import Path

import pytest

from pipelines.pathology.split_tables import SplitTable, read_split_tables
from pipelines.shared.errors import InputError

SLIDES = [f"s{number}" for number in range(6)]
PATIENTS = ["p0", "p0", "p1", "p2", "p2", "p3"]
EXPECTED = ["train", "train", "train", "val", "val", "test"]


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _rows(table: SplitTable) -> list[str | None]:
    return table.split_rows(SLIDES, PATIENTS)


def test_clams_table_of_ids_and_its_bool_form_say_the_same(tmp_path: Path) -> None:
    ids = _write(tmp_path / "splits_0.csv", ",train,val,test\n0,s0,s3,s5\n1,s1,s4,\n2,s2,,\n")
    truth = _write(
        tmp_path / "splits_0_bool.csv",
        ",train,val,test\n"
        + "".join(f"{name},{word == 'train'},{word == 'val'},{word == 'test'}\n"
                  for name, word in zip(SLIDES, EXPECTED, strict=True)),
    )  # fmt: skip

    assert [_rows(table) for table in read_split_tables(ids)] == [EXPECTED]
    assert [_rows(table) for table in read_split_tables(truth)] == [EXPECTED]


def test_a_folder_of_clam_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        _write(tmp_path / f"splits_{number}.csv", f",train,val,test\n0,s{number % 4},s4,s5\n")
    _write(tmp_path / "splits_0_bool.csv", "not,this\n1,2\n")

    folds = read_split_tables(tmp_path)

    assert [_rows(fold).index("train") for fold in folds] == [0, 2, 2]
    assert [fold.source.name for fold in folds] == ["splits_0.csv", "splits_2.csv", "splits_10.csv"]


def test_clams_ids_may_be_patients(tmp_path: Path) -> None:
    path = _write(tmp_path / "splits_0.csv", ",train,val,test\n0,p0,p2,p3\n1,p1,,\n")

    assert _rows(read_split_tables(path)[0]) == EXPECTED


def test_stamps_patients_have_no_validation(tmp_path: Path) -> None:
    folds = [{"train_patients": ["p0", "p1"], "test_patients": ["p3"]}] * 2
    path = _write(tmp_path / "splits.json", json.dumps({"splits": folds}))

    tables = read_split_tables(path)

    assert len(tables) == 2
    assert _rows(tables[0]) == ["train", "train", "train", None, None, "test"]


def test_patho_bench_has_a_column_per_fold(tmp_path: Path) -> None:
    lines = ["case_id\tslide_id\tlabel\tfold_0\tfold_1"]
    lines += [
        f"{patient}\t{slide}.svs\t1\t{'test' if patient == 'p3' else 'train'}\t"
        f"{'test' if patient == 'p0' else 'train'}"
        for slide, patient in zip(SLIDES, PATIENTS, strict=True)
    ]
    path = _write(tmp_path / "k=all.tsv", "\n".join(lines) + "\n")

    first, second = read_split_tables(path)

    assert _rows(first) == ["train"] * 5 + ["test"]
    assert _rows(second) == ["test"] * 2 + ["train"] * 4


def test_our_own_table_may_name_patients(tmp_path: Path) -> None:
    path = _write(tmp_path / "splits_0.csv", "patient_id,split\np0,train\np2,external\np3,test\n")

    found = _rows(read_split_tables(path)[0])

    assert found == ["train", "train", None, "external", "external", "test"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", ",train,val,test\n0,s0,s1,s0\n", "s0: test, train"),
        ("a.csv", ",train,val,test\ns0,True,True,False\ns1,False,False,True\n", "row 2: s0 is in"),
        ("a.csv", "slide_id,split\ns0,dev\n", "split of 's0' is 'dev'"),
        ("a.csv", "slide_id,split\ns0,train\n", "no id is in test"),
        ("a.csv", "slide_id,label\ns0,1\n", "no table of splits"),
        ("a.csv", "name,fold_0\ns0,train\n", "no column slide_id or patient_id"),
        ("a.json", "[]", "not as STAMP writes it"),
        ("a.json", "{", "not as STAMP writes it"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_split_tables(_write(tmp_path / name, text))

    assert words in str(caught.value)


def test_a_table_of_others_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.csv", "slide_id,split\nx0,train\nx1,test\n")

    with pytest.raises(InputError, match="names none of the slides"):
        _rows(read_split_tables(path)[0])


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no splits_0\.csv"):
        read_split_tables(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "slide_id,patient_id,split\ns0,p0,train\ns1,p0,test\ns2,p1,val\n",
        "case_id,slide_id,fold_0\np0,s0,train\np0,s1.svs,test\np1,s2,train\n",
    ],
    ids=["ours", "patho-bench"],
)
def test_patients_that_the_table_itself_names_stay_whole(tmp_path: Path, text: str) -> None:
    path = _write(tmp_path / "splits.csv", text)

    with pytest.raises(InputError, match=r"(?s)by its own column .*'p0'.*s1"):
        read_split_tables(path)
