import gzip
from pathlib import Path

import pandas as pd
import pytest
from openpyxl import Workbook

from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure, read_labels, read_table, write_failures, write_table


def _write(folder: Path, text: str, name: str = "labels.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_strings_stripped_with_the_files_rows(tmp_path: Path) -> None:
    path = _write(tmp_path, "﻿slide_id,patient_id,label,note\n 007 ,p1,a,x\n\n008,p2, b,\n")

    table = read_labels(path, id_column="slide_id", group_column="patient_id")

    assert table.columns.tolist() == ["slide_id", "label", "patient_id"]
    assert table["slide_id"].tolist() == ["007", "008"]
    assert table["label"].tolist() == ["a", "b"]
    assert table.index.tolist() == [2, 4]


def test_a_tsv_is_read_by_tabs_and_keeps_its_split(tmp_path: Path) -> None:
    path = _write(tmp_path, "id\tlabel\tsplit\na,b\t1\ttrain\nc\t0\ttest\n", "labels.tsv")

    table = read_labels(path, id_column="id")

    assert table["id"].tolist() == ["a,b", "c"]
    assert table["split"].tolist() == ["train", "test"]


@pytest.mark.parametrize("name", ["labels.tsv.gz", "labels.TSV.GZ", "labels.tsv"])
def test_gzip_is_told_by_content(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress("id\tlabel\na,b\tä\nc\t0\n".encode()))

    table = read_labels(path, id_column="id")

    assert table["id"].tolist() == ["a,b", "c"]
    assert table["label"].tolist() == ["ä", "0"]
    assert table.index.tolist() == [2, 3]


def test_damaged_gzip_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv.gz"
    whole = gzip.compress(b"id,label\n" + b"".join(b"%d,%d\n" % (i, i % 7) for i in range(999)))
    damaged = whole[:40] + bytes(byte ^ 255 for byte in whole[40:60]) + whole[60:]

    for content in (whole[: len(whole) // 2], damaged, whole[:1] + b"\x8b" + b"junk"):
        path.write_bytes(content)
        with pytest.raises(InputError, match="cut short or damaged; copy or compress it again"):
            read_table(path)


TASKS = "task,id,class,fold\nT,a,x,1\nU,a,y,1\nT,b,y,2\nT,c,y,1\nU,b,y,2\n"


def test_only_rows_asked_for_count(tmp_path: Path) -> None:
    path = _write(tmp_path, TASKS)

    table = read_labels(path, id_column="id", label_column="class", where={"task": "T"})
    both = read_labels(path, id_column="id", label_column="class", where={"fold": 1, "task": "T"})

    assert table["id"].tolist() == ["a", "b", "c"]
    assert table.index.tolist() == [2, 4, 5]
    assert table["class"].tolist() == ["x", "y", "y"]
    assert both["id"].tolist() == ["a", "c"]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"tusk": "T"}, ["no column 'tusk' for where.tusk=T", "it has 'task', 'id'"]),
        ({"task": "TT"}, ["no row has 'TT' in column 'task'", "'T' (3 rows), 'U' (2 rows)"]),
        (
            {"task": "U", "class": "x"},
            ["no row of the 2 rows left by where.task=U has 'x'", "it holds 'y' (2 rows)"],
        ),
    ],
)
def test_filters_that_leave_nothing_are_named(
    tmp_path: Path, where: dict[str, object], words: list[str]
) -> None:
    path = _write(tmp_path, TASKS)

    with pytest.raises(InputError) as caught:
        read_labels(path, id_column="id", label_column="class", where=where)

    for word in [str(path), *words]:
        assert word in str(caught.value)


def test_many_values_are_shown_in_part(tmp_path: Path) -> None:
    path = _write(tmp_path, "id,label,task\n" + "".join(f"{i},{i},t{i}\n" for i in range(20)))

    with pytest.raises(InputError, match=r"did you mean 't1.*and 8 more"):
        read_labels(path, id_column="id", where={"task": "t1x"})


def test_columns_that_are_asked_for_must_be_there(tmp_path: Path) -> None:
    path = _write(tmp_path, "id,label\na,1\nb,0\n")

    with pytest.raises(InputError, match=r"no column 'species'.*; add it"):
        read_labels(path, id_column="id", required=["species"], remedy="add it")


def test_groups_default_to_ids(tmp_path: Path) -> None:
    path = _write(tmp_path, "id,label\na,1\nb,0\n")

    table = read_labels(path, id_column="id", group_column="patient_id")

    assert table["patient_id"].tolist() == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing"),
        ("id,label\n", "only a header"),
        ("name,label\na,1\nb,0\n", "no column 'id'; it has 'name', 'label'"),
        ("id;label\na;1\nb;0\n", "no column 'id' and no column 'label'; it has 'id;label'"),
        ("id,label\na,1\n,0\n", "row 3: id is empty"),
        ("id,label\na,1\nb,\n", "row 3: label is empty"),
        ("id,label\na,1\nb,0\na,0\n", "'a' stands in rows 2, 4"),
        ("id,label\na,1\nb,1\n", "all 2 rows have the label '1'"),
        ("id,label\na,1,2\nb,0\n", "row 2: 3 fields where the header has 2"),
        ("id,id,label\na,a,1\n", "'id' more than once"),
    ],
)
def test_a_bad_table_is_named_with_its_row(tmp_path: Path, text: str, words: str) -> None:
    path = _write(tmp_path, text)

    with pytest.raises(InputError) as caught:
        read_labels(path, id_column="id")

    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_a_folder_and_a_binary_file_are_refused(tmp_path: Path) -> None:
    binary = tmp_path / "labels.xlsx"
    text = tmp_path / "labels.csv"
    for path in (binary, text):
        path.write_bytes(b"PK\x03\x04\xff\xfe\x00\x80")

    for path, words in [
        (tmp_path / "absent.csv", "does not exist"),
        (tmp_path, "is a folder"),
        (binary, "is not a workbook"),
        (text, "is not a text table"),
    ]:
        with pytest.raises(InputError, match=words):
            read_table(path)


def test_a_workbook_is_read_as_text_would_be(tmp_path: Path) -> None:
    path = tmp_path / "labels.xlsx"
    book = Workbook()
    rows = [["id", "label", "mpp", None], ["007", 1.0, 0.25, None], [None] * 4, ["b", "x ", None]]
    for row in rows:
        book.active.append(row)
    book.save(path)

    table = read_table(path)

    assert table.columns.tolist() == ["id", "label", "mpp"]
    assert table.to_numpy().tolist() == [["007", "1", "0.25"], ["b", "x", ""]]
    assert table.index.tolist() == [2, 4]


def test_a_written_table_reads_back(tmp_path: Path) -> None:
    table = pd.DataFrame({"id": ["a,b", 'c"d', "ü"], "label": ["1", "2", "3"]})

    for name in ("deep/table.csv", "table.tsv"):
        write_table(tmp_path / name, table)
        assert read_table(tmp_path / name).to_dict("list") == table.to_dict("list")
    assert not list(tmp_path.rglob("*.tmp-*"))


def test_failures_are_rewritten_whole(tmp_path: Path) -> None:
    path = tmp_path / "failures.csv"
    write_failures(path, [Failure("s", "p", "unreadable", "cut", "copy")], id_column="slide_id")
    first = path.read_text()

    write_failures(path, [], id_column="slide_id")

    assert first == "slide_id,path,status,reason,remedy\ns,p,unreadable,cut,copy\n"
    assert path.read_text() == "slide_id,path,status,reason,remedy\n"
