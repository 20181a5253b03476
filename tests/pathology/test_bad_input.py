"""What a user may hand over by mistake, through the command line: status, exit code and words.

Every case of a bad slide lies beside a good one, which must be tiled all the same.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image

from pipelines.pathology.__main__ import VERBS
from pipelines.shared.cli import main

INSIDE = (slice(8, 248), slice(8, 248))  # more than a speck: 0.0144 mm2


class Desk:
    """A folder to lay bad input on: `slides/` with one good slide, and what a case adds."""

    def __init__(self, folder: Path, write_tiff: Any, paint: Any) -> None:
        self.folder, self.slides = folder, folder / "slides"
        self.slides.mkdir()
        self._write_tiff, self._paint = write_tiff, paint
        self.tiff("good.tiff")

    def tiff(self, name: str, *, tissue: Any = INSIDE, side: int = 256, **options: Any) -> Path:
        path = self.slides / name
        path.parent.mkdir(exist_ok=True)
        return self._write_tiff(path, self._paint(side, side, tissue), **options)

    def aperio(self, name: str, description: str) -> None:
        """A TIFF that OpenSlide takes for one of Aperio's."""
        tifffile.imwrite(
            self.slides / name,
            self._paint(256, 256, INSIDE),
            tile=(64, 64),
            photometric="rgb",
            description=f"Aperio Image Library v1\r\n256x256|{description}",
            metadata=None,
        )

    def bytes(self, name: str, content: bytes) -> None:
        (self.slides / name).write_bytes(content)

    def image(self, name: str, *, mode: str = "RGB") -> Path:
        pixels = Image.fromarray(self._paint(256, 256, INSIDE))
        path = self.slides / name
        (pixels.convert("L").convert(mode) if mode == "I;16" else pixels.convert(mode)).save(path)
        return path

    def table(self, *rows: str, header: str = "slide_id,path,mpp") -> str:
        lines = [header, f"good,{self.slides / 'good.tiff'},", *rows]
        (self.folder / "slides.csv").write_text("\n".join(lines) + "\n")
        return f"slides={self.folder / 'slides.csv'}"

    def text(self, name: str, *lines: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return path


@pytest.fixture
def desk(tmp_path: Path, write_tiff: Any, paint: Any) -> Desk:
    return Desk(tmp_path, write_tiff, paint)


def tile(desk: Desk, *arguments: str) -> int:
    given = list(arguments)
    if not any(argument.startswith("slides=") for argument in given):
        given.append(f"slides={desk.slides}")
    settings = ["tile_px=64", "progress=false", "num_workers=1", "preview=false"]
    return main("pathology", VERBS, ["tile", f"out={desk.folder / 'out'}", *settings, *given])


def cut(path: Path, keep: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)


def outline(desk: Desk, text: str) -> list[str]:
    desk.tiff("bad.tiff")
    desk.text("drawn/bad.geojson", text)
    return [f"outlines={desk.folder / 'drawn'}"]


BAD_SLIDES: dict[str, tuple[Callable[[Desk], Any], str, str]] = {
    "no resolution": (lambda d: d.tiff("bad.tiff", mpp=None), "missing_mpp", "does not say"),
    "Aperio without MPP": (lambda d: d.aperio("bad.svs", "AppMag = 20"), "missing_mpp", "not say"),
    "far too fine": (lambda d: d.tiff("bad.tiff", mpp=0.00499), "mpp_suspect", "0.00499"),
    "far too coarse": (lambda d: d.tiff("bad.tiff", mpp=40), "mpp_suspect", "outside 0.05 to 30"),
    "72 dpi": (lambda d: d.tiff("bad.tiff", mpp=25400 / 72), "mpp_suspect", "72 dpi"),
    "96 dpi": (lambda d: d.tiff("bad.tiff", mpp=25400 / 96), "mpp_suspect", "96 dpi"),
    "300 dpi": (lambda d: d.tiff("bad.tiff", mpp=25400 / 300), "mpp_suspect", "300 dpi"),
    "pixels not square": (
        lambda d: d.tiff("bad.tiff", mpp=0.5, mpp_y=0.55), "mpp_suspect", "not square"),
    "against the objective": (
        lambda d: d.aperio("bad.svs", "AppMag = 40|MPP = 2.0"), "mpp_suspect", "objective of 40x"),
    "given resolution absurd": (
        lambda d: [d.table(f"bad,{d.slides / 'good.tiff'},500")], "mpp_suspect", "500 um"),
    "coarser than the plan": (lambda d: d.tiff("bad.tiff", mpp=2.0), "too_coarse", "wants 0.5"),
    "0 bytes": (lambda d: d.bytes("bad.svs", b""), "unreadable", "0 bytes"),
    "text": (lambda d: d.bytes("bad.svs", b"hello\n" * 9), "unreadable", "a text file"),
    "other bytes": (lambda d: d.bytes("bad.ndpi", bytes(range(256))), "unreadable", "begins with"),
    "TIFF header alone": (lambda d: d.bytes("bad.tiff", b"II*\0"), "unreadable", "4 bytes"),
    "DICOM cut off": (lambda d: d.bytes("bad.dcm", bytes(128) + b"DICM"), "unreadable", "132 "),
    "MIRAX without its folder": (
        lambda d: d.bytes("bad.mrxs", b"\xff\xd8\xff\xe0" + bytes(99)), "unreadable", "beside it"),
    "half a slide": (lambda d: cut(d.tiff("bad.tiff"), 0.5), "unreadable", "bytes"),
    "damage in the middle": (lambda d: damage(d.tiff("bad.tiff")), "unreadable", "fails"),
    "link to nowhere": (
        lambda d: (d.slides / "bad.svs").symlink_to("gone.svs"), "no_file", "no such file"),
    "listed and not there": (lambda d: [d.table("bad,gone.svs,")], "no_file", "gone.svs"),
    "a folder without slides": (
        lambda d: (d.slides / "bad").mkdir() or [d.table("bad,slides/bad,0.5")], "unreadable",
        "folder"),
    "glass": (lambda d: d.tiff("bad.tiff", tissue=None), "empty", "all glass"),
    "too little tissue": (
        lambda d: d.tiff("bad.tiff", tissue=(slice(0, 256), slice(112, 144))), "empty",
        "no tile has 50% tissue"),
    "ink all over": (
        lambda d: d._write_tiff(d.slides / "bad.tiff", np.full((256, 256, 3), (40, 120, 70), "u1")),
        "empty", "left out for pen"),
    "smaller than a tile": (lambda d: d.tiff("bad.tiff", side=48), "too_small", "48 x 48 px"),
    "PNG without resolution": (
        lambda d: [d.table(f"bad,{d.image('b.png')},")], "missing_mpp", "does not say"),
    "grey PNG": (
        lambda d: [d.table(f"bad,{d.image('b.png', mode='L')},0.5")], "unreadable", "format"),
    "16 bit PNG": (
        lambda d: [d.table(f"bad,{d.image('b.png', mode='I;16')},0.5")], "unreadable", "format"),
    "half a PNG": (
        lambda d: cut(d.image("b.png"), 0.5) or [d.table(f"bad,{d.slides / 'b.png'},0.5")],
        "unreadable", "decoded"),
    "text for an outline": (lambda d: outline(d, "hello"), "bad_outline", "bad.geojson"),
    "an open outline": (
        lambda d: outline(d, '[{"geometry": {"type": "Polygon", "coordinates": '
                             '[[[0, 0], [9, 0], [9, 9], [0, 9]]]}}]'),
        "bad_outline", "feature 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SLIDES)
def test_a_bad_slide_is_listed_and_the_good_one_is_done(case: str, desk: Desk) -> None:
    lay, status, words = BAD_SLIDES[case]
    given = lay(desk)
    assert tile(desk, *(given if isinstance(given, list) else [])) == 3
    failures = pd.read_csv(desk.folder / "out" / "failures.csv")
    assert failures[["slide_id", "status"]].to_numpy().tolist() == [["bad", status]]
    assert words in failures["reason"][0]
    assert len(failures["remedy"][0]) > 10
    done = pd.read_csv(desk.folder / "out" / "slides.csv").set_index("slide_id")["tiles"]
    assert done["good"] > 0


def labels(desk: Desk, *rows: str, header: str = "slide_id,patient_id,label") -> str:
    return f"labels={desk.text('labels.csv', header, *rows)}"


BAD_COMMANDS: dict[str, tuple[str, Callable[[Desk], list[str]], list[str]]] = {
    "no such folder": ("tile", lambda d: [f"slides={d.folder / 'gone'}"], ["gone", "not exist"]),
    "no slide in it": (
        "tile", lambda d: [f"slides={d.text('o/a.txt', '').parent}"], ["no slides", ".svs", "PNG"]),
    "no slides=": ("tile", lambda d: [], ["slides= is missing"]),
    "two slides of one name": (
        "tile", lambda d: d.tiff("sub/good.tiff") and [f"slides={d.slides}"],
        ["'good'", "sub/good.tiff", "slides=TABLE"]),
    "an id twice": (
        "tile", lambda d: [d.table("a,x/a.svs,", "a,y/a.svs,")], ["'a' stands in rows 3, 4"]),
    "a path that is empty": ("tile", lambda d: [d.table("a,,")], ["row 3: path is empty"]),
    "a resolution in words": (
        "tile", lambda d: [d.table("a,a.svs,40x")], ["row 3: mpp must be a positive", "'40x'"]),
    "other columns": (
        "tile", lambda d: [f"slides={d.text('t.csv', 'name,kind', 'a,b')}"],
        ["no column 'path'", "'name', 'kind'", "columns.path=NAME"]),
    "a column that is not there": (
        "tile", lambda d: [d.table(), "columns.slide_id=Case, no"], ["'Case, no'", "'slide_id'"]),
    "rows that are not there": (
        "tile", lambda d: [d.table(), "where.slide_id=goof"], ["no row has 'goof'", "'good'"]),
    "a ragged table": ("tile", lambda d: [d.table("a,b")], ["row 3: 2 fields", "header has 3"]),
    "a workbook that is none": (
        "tile", lambda d: [f"slides={d.text('t.xlsx', 'x')}"], ["t.xlsx", "not a workbook"]),
    "part of a pixel": (
        "tile", lambda d: [f"slides={d.slides}", "tile_um=100", "mpp=0.3"], ["333.333", "0.3003"]),
    "a flag that is none": (
        "tile", lambda d: [f"slides={d.slides}", "leave_out=[folds]"], ["folds", "pen, dark"]),
    "outlines that are no folder": (
        "tile", lambda d: [f"slides={d.slides}", f"outlines={d.slides / 'good.tiff'}"],
        ["is no folder"]),
    "a model that is none": (
        "tile", lambda d: [f"slides={d.slides}", "tissue_model=nowhere:make"],
        ["cannot be imported", "nowhere"]),
    "a resolution for all in words": (
        "tile", lambda d: [f"slides={d.slides}", "slide_mpp=fine"], ["slide_mpp", "'fine'"]),
    "a file for out": (
        "tile", lambda d: [f"slides={d.slides}", f"out={d.slides / 'good.tiff'}"], ["is a file"]),
    "nothing but bad slides": (
        "tile", lambda d: cut(d.slides / "good.tiff", 0.0) or [f"slides={d.slides}"],
        ["no slide could be tiled", "failures.csv"]),
    "no labels": ("train", lambda d: [f"slides={d.slides}"], ["labels=TABLE"]),
    "labels of other slides": (
        "train", lambda d: [f"slides={d.slides}", labels(d, "a,p,x", "b,q,y")],
        ["no slide has a label", "'good'", "'a'"]),
    "a label that is empty": (
        "train", lambda d: [f"slides={d.slides}", labels(d, "good,p,", "b,q,y")],
        ["row 2: label is empty"]),
    "an id that is empty": (
        "train", lambda d: [f"slides={d.slides}", labels(d, ",p,x", "b,q,y")],
        ["row 2: slide_id is empty"]),
    "one class": (
        "train", lambda d: [f"slides={d.slides}", labels(d, "good,p,x", "b,q,x")],
        ["two classes", "'x'"]),
    "two labels for one slide": (
        "train", lambda d: [f"slides={d.slides}", labels(d, "good,p,x", "good,p,y")],
        ["'good' stands in rows 2, 3"]),
    "one slide with and without its ending": (
        "train", lambda d: [f"slides={d.slides}", labels(d, "good,p,x", "good.tiff,p,y")],
        ["'good' stands in rows 2, 3"]),
    "a label column that is not there": (
        "train", lambda d: [f"slides={d.slides}", labels(d, "good,p,x"), "columns.label=HRD"],
        ["no column 'HRD'", "'label'"]),
    "a resolution in the labels in words": (
        "train",
        lambda d: [f"slides={d.slides}",
                   labels(d, "good,x,half", "b,y,", header="slide_id,label,mpp")],
        ["row 2: mpp must be a positive number", "'half'"]),
    "no checkpoint": (
        "predict", lambda d: [f"slides={d.slides}", f"ckpt={d.folder / 'gone.ckpt'}"],
        ["gone.ckpt"]),
    "text for a checkpoint": (
        "predict", lambda d: [f"slides={d.slides}", f"ckpt={d.text('a.ckpt', 'hello')}"],
        ["a.ckpt"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_ends_with_one_message(
    case: str, desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, lay, words = BAD_COMMANDS[case]
    given = lay(desk)
    out = [] if any(g.startswith("out=") for g in given) else [f"out={desk.folder / 'out'}"]
    quiet = {"tile": ["progress=false"], "train": ["trainer.progress=false"], "predict": []}[verb]
    assert main("pathology", VERBS, [verb, *out, *quiet, *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    for word in words:
        assert word in error


def test_a_folder_with_many_broken_slides_is_done_but_for_them(desk: Desk) -> None:
    for number in range(6):
        desk.tiff(f"ok_{number}.tiff")
    desk.bytes("x.svs", b"text")
    desk.bytes("y.ndpi", b"")
    desk.tiff("z.tiff", mpp=None)
    assert tile(desk) == 3
    failures = pd.read_csv(desk.folder / "out" / "failures.csv")
    assert failures["slide_id"].tolist() == ["x", "y", "z"]
    assert len(pd.read_csv(desk.folder / "out" / "slides.csv")) == 7


REAL = {
    "CMU-1-Small-Region.jp2.tiff": ("unreadable", "compression: 34712"),
    "CMU-1-Small-Region.jpeg.tiff": ("mpp_suspect", "0.00499"),
    "TCGA-CR-7395-01A-01-TS1.svs": ("missing_mpp", "does not say"),
    "boxes.tiff": ("mpp_suspect", "72 dpi"),
    "broken.svs": ("unreadable", "a text file"),
    "camelyon_multiframe.dcm": ("too_coarse", "28.97"),
    "small.svs": ("too_small", "16 x 16 px"),
    "small_vectra.qptiff": ("unreadable", "a TIFF, but not"),
    "sm_image.dcm": ("too_small", "50 x 50 px"),
    "unopenable.tiff": ("unreadable", "compression: 52479"),
    "unreadable.svs": ("unreadable", "16 x 16 px at (0, 0)"),
    "wsi2dcm_jpeg2000.dcm": ("too_coarse", "16.78"),
    "wsi2dcm_raw.dcm": ("too_coarse", "16.78"),
}


@pytest.mark.real_data
def test_real_odd_files_each_have_their_status(real_data: Path, desk: Desk) -> None:
    for name in REAL:
        shutil.copy(real_data / "slides" / name, desk.slides)
    assert tile(desk) == 3
    failures = pd.read_csv(desk.folder / "out" / "failures.csv").set_index("path")
    assert len(failures) == len(REAL)
    for name, (status, words) in REAL.items():
        row = failures.loc[str(desk.slides / name)]
        assert row["status"] == status, name
        assert words in row["reason"], name
