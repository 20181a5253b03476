import pandas as pd
import pytest

from pipelines.pathology.manifest import list_slides, read_slide_labels
from pipelines.pathology.slides import SlideFile
from pipelines.shared.errors import InputError


def write(path, text):
    path.write_text(text)
    return path


def ids_and_names(slides, root):
    return [(s.slide_id, str(s.path.relative_to(root)), s.mpp) for s in slides]


TABLES = {
    "ours": ("slide_id,path,mpp\nB,x/b.svs,\nA,y/b.svs,0.25\n", {}, None),
    "names": ("Case,File,Res\nA,y/b.svs,0.25\nB,x/b.svs,\n",
              {"slide_id": "Case", "path": "File", "mpp": "Res"}, None),
    "slide2vec": ("sample_id,image_path,mask_path,spacing_at_level_0\nA,y/b.svs,,0.25\n"
                  "B,x/b.svs,,\n", {}, "slide2vec"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_a_table_gives_ids_paths_and_resolutions(tmp_path, capsys, case):
    text, columns, tool = TABLES[case]
    table = write(tmp_path / "slides.csv", text)
    slides = list_slides(table, columns=columns)
    assert ids_and_names(slides, tmp_path) == [("A", "y/b.svs", 0.25), ("B", "x/b.svs", None)]
    shown = capsys.readouterr().out
    assert (f"a table as of {tool}: path from 'image_path'" in shown) == (tool is not None)


def test_trident_names_files_and_ids_follow(tmp_path, capsys):
    table = write(tmp_path / "wsis.csv", "wsi,mpp\nb.svs,0.5\nsub/a.1.ndpi,0.25\n")
    expected = [("a.1", "sub/a.1.ndpi", 0.25), ("b", "b.svs", 0.5)]
    assert ids_and_names(list_slides(table), tmp_path) == expected
    assert "TRIDENT: path from 'wsi'" in capsys.readouterr().out
    moved = list_slides(table, root=tmp_path / "else")
    assert moved[1].path == tmp_path / "else" / "b.svs"


def test_tables_of_ids_or_features_find_their_slides_below_root(tmp_path, capsys):
    for name in ("deep/a.svs", "b.ndpi"):
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    clam = write(tmp_path / "clam.csv", "case_id,slide_id,label\np,a,x\nq,b,y\nq,c,y\n")
    stamp = write(tmp_path / "stamp.csv", "PATIENT,FILENAME\np,a.h5\nq,b.h5\nq,c.h5\n")
    for table in (clam, stamp):
        slides = list_slides(table, root=tmp_path / "slides")
        assert [s.slide_id for s in slides] == ["a", "b", "c"]
        assert slides[0].path == tmp_path / "slides" / "deep" / "a.svs"
        assert not slides[2].path.exists()  # it fails later, as one slide among others
        with pytest.raises(InputError, match=r"row 2: .*is no slide's file.*root=FOLDER"):
            list_slides(table)


def test_a_folder_or_one_file_needs_no_table(tmp_path):
    (tmp_path / "a.svs").touch()
    assert list_slides(tmp_path) == [SlideFile("a", tmp_path / "a.svs")]
    assert list_slides(tmp_path / "a.svs") == [SlideFile("a", tmp_path / "a.svs")]
    with pytest.raises(InputError, match=r"where.x= chooses rows of a table"):
        list_slides(tmp_path, where={"x": "1"})


def test_a_folder_in_a_table_is_its_dicom_series(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "0.dcm").write_bytes(b"x")
    table = write(tmp_path / "t.csv", "slide_id,path\nA,one\n")
    assert ids_and_names(list_slides(table), tmp_path) == [("A", "one/0.dcm", None)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide_id,path\nA,a.svs\nA,b.svs\n", "'A' stands in rows 2, 3"),
        ("path\nx/a.svs\ny/a.svs\n", "'a' stands in rows 2, 3"),
        ("slide_id,path\nA,\n", "row 2: path is empty"),
        ("slide_id,path,mpp\nA,a.svs,20x\n", "row 2: mpp must be a positive number; got '20x'"),
        ("slide_id,path,mpp\nA,a.svs,-1\n", "row 2: mpp must be"),
        ("name,kind\nA,b\n", "no column 'path' and no column 'slide_id'; it has 'name', 'kind'"),
    ],
)
def test_bad_tables_are_named_with_their_row(tmp_path, text, words):
    table = write(tmp_path / "slides.csv", text)
    with pytest.raises(InputError) as caught:
        list_slides(table)
    assert words in str(caught.value)
    assert str(table) in str(caught.value)


def test_columns_that_are_not_there_are_named(tmp_path):
    table = write(tmp_path / "slides.csv", "slide_id,path\nA,a.svs\n")
    with pytest.raises(InputError, match=r"no column 'Case' for columns.slide_id=Case"):
        list_slides(table, columns={"slide_id": "Case"})


def test_clam_labels_are_mapped_and_endings_dropped(tmp_path, capsys):
    path = write(tmp_path / "l.csv", "case_id,slide_id,label\np,a.svs,x\nq,b,y\n")
    table = read_slide_labels(path)
    assert table[["slide_id", "patient_id", "label"]].to_numpy().tolist() == [
        ["a", "p", "x"],
        ["b", "q", "y"],
    ]
    assert "CLAM: patient_id from 'case_id'" in capsys.readouterr().out


def test_patients_labels_reach_their_slides(tmp_path):
    slides = write(tmp_path / "slide.csv", "PATIENT,FILENAME\np,a.h5\np,b.h5\nq,c.h5\nr,d.h5\n")
    clini = tmp_path / "clini.xlsx"
    pd.DataFrame({"PATIENT": ["p", "q"], "isMSIH": ["MSIH", "no"]}).to_excel(clini, index=False)
    table = read_slide_labels(clini, slides=slides, columns={"label": "isMSIH"})
    assert table[["slide_id", "patient_id", "label"]].to_numpy().tolist() == [
        ["a", "p", "MSIH"],
        ["b", "p", "MSIH"],
        ["c", "q", "no"],
    ]
