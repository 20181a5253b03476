"""Files as other tools write them, in and out of the store, through the command line."""

import json
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.pathology import store as store_module
from pipelines.pathology.__main__ import VERBS
from pipelines.pathology.encoding import StatsEncoder
from pipelines.pathology.exporting import write_geojson, write_trident
from pipelines.pathology.features import extract_features
from pipelines.pathology.foreign import ForeignError, Given, Item, read_foreign
from pipelines.pathology.importing import place_tiles
from pipelines.pathology.lattice import fit_lattice
from pipelines.pathology.ordering import hilbert_order
from pipelines.pathology.scale import make_bag
from pipelines.pathology.slides import SlideFile
from pipelines.pathology.store import (
    SCHEMA,
    check_content,
    encoder_entry,
    list_slides,
    read_slide,
    slide_folder,
    write_group,
)
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.cli import main
from pipelines.shared.errors import InputError

DIM = 6
MPP = 0.25


def run(*arguments: object) -> int:
    return main("pathology", VERBS, [str(argument) for argument in arguments])


def cells(num: int = 40, seed: int = 0) -> np.ndarray:
    """Distinct (col, row) in no order, neighbours among them."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(144)[:num]
    return np.stack([chosen % 12 + 3, chosen // 12 + 5], axis=-1).astype(np.int64)


def vectors(num: int = 40, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(1).standard_normal((num, DIM)).astype(dtype)


def write_like_trident(
    path: Path, coords: np.ndarray, features: np.ndarray, **attributes: object
) -> Path:
    noted = {
        "patch_size": 256, "patch_size_level0": 512, "level0_magnification": 40,
        "target_magnification": 20, "overlap": 0, "name": path.stem, "savetodir": None,
        "level0_width": 20_000, "level0_height": 15_000,
    } | attributes  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in (("features", features), ("coords", coords)):
            tail = array.shape[1:]
            made = file.create_dataset(
                name, shape=array.shape, maxshape=(None, *tail), chunks=(1, *tail),
                dtype=array.dtype,
            )  # fmt: skip
            made[:] = array
        file["features"].attrs["encoder"] = "uni_v1"
        for key, value in noted.items():
            if value != "absent":
                value = json.dumps(value) if isinstance(value, dict) else value
                file["coords"].attrs[key] = "None" if value is None else value
    return path


def write_like_clam(root: Path, slide_id: str, coords: np.ndarray, features: np.ndarray) -> None:
    for folder in ("h5_files", "pt_files", "patches"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    with h5py.File(root / "patches" / f"{slide_id}.h5", "w") as file:
        made = file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=(1, 2))
        made.attrs["patch_size"] = 256
        made.attrs["patch_level"] = 1
        made.attrs["downsample"] = (4.0001, 4.0)
        made.attrs["downsampled_level_dim"] = (9_000, 8_000)
        made.attrs["level_dim"] = (9_000, 8_000)
        made.attrs["name"] = slide_id
        made.attrs["save_path"] = "somewhere"
    with h5py.File(root / "h5_files" / f"{slide_id}.h5", "w") as file:
        file.create_dataset("features", data=features, maxshape=(None, DIM), chunks=(32, DIM))
        file.create_dataset("coords", data=coords, maxshape=(None, 2), chunks=(32, 2))
    torch.save(torch.from_numpy(features), root / "pt_files" / f"{slide_id}.pt")


def write_like_stamp(path: Path, grid: np.ndarray, features: np.ndarray, **noted: object) -> Path:
    attributes = {
        "stamp_version": "2.4.0", "extractor": "virchow2", "unit": "um", "tile_size_um": 256.0,
        "tile_size_px": 224, "code_hash": "abc", "feat_type": "tile",
    } | noted  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["coords"] = (grid * float(attributes["tile_size_um"] or 256)).astype(np.float32)
        file["feats"] = features.astype(np.float16)
        for key, value in attributes.items():
            if value is not None:
                file.attrs[key] = value
    return path


def write_plain(path: Path, coords: np.ndarray, features: np.ndarray, name: str = "features"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[name] = features
        file["coords"] = coords
    return path


def write_like_slide2vec(
    root: Path, slide_id: str, coords: np.ndarray, features: np.ndarray, ending: str = "pt"
) -> None:
    (root / "tile_embeddings").mkdir(parents=True, exist_ok=True)
    (root / "tiles").mkdir(exist_ok=True)
    path = root / "tile_embeddings" / f"{slide_id}.{ending}"
    index = np.arange(len(coords), dtype=np.int32)
    if ending == "pt":
        torch.save(torch.from_numpy(features), path)
    else:
        np.savez_compressed(path, features=features, tile_index=index)
    meta = {"artifact_type": "tile_embeddings", "encoder_name": "prost40m"}
    path.with_suffix(".meta.json").write_text(json.dumps(meta))
    np.savez(
        root / "tiles" / f"{slide_id}.coordinates.npz",
        x=coords[:, 0], y=coords[:, 1], tile_index=index,
        tissue_fractions=np.linspace(0, 1, len(coords), dtype=np.float32),
    )  # fmt: skip
    noted = {
        "provenance": {"sample_id": slide_id},
        "slide": {"dimensions": [50_000, 40_000], "base_spacing_um": 0.2525},
        "tiling": {
            "requested_tile_size_px": 224, "requested_spacing_um": 0.5, "tile_size_lv0": 444,
            "step_px_lv0": 222, "overlap": 0.5, "n_tiles": len(coords),
        },
        "artifact": {"coordinate_space": "level_0", "tile_order": "row_major"},
    }  # fmt: skip
    (root / "tiles" / f"{slide_id}.coordinates.meta.json").write_text(json.dumps(noted))


def assert_stored(slide, grid, xy0, features, *, offset=True):
    """The stored rows are those of the file, found by `source_row`, and cells keep their places."""
    rows = slide.source_rows()
    assert sorted(rows) == list(range(len(grid)))
    assert slide.grid.dtype == np.int32
    assert slide.xy0.dtype == np.int64
    assert np.array_equal(slide.grid, grid[rows])
    assert np.array_equal(slide.xy0, xy0[rows])
    assert slide.features().dtype == features.dtype
    assert slide.features().tobytes() == features[rows].tobytes()
    check_content(slide.folder)


def status_of(out: Path) -> dict[str, str]:
    table = pd.read_csv(out / "failures.csv")
    assert table.notna().all(axis=None)
    return dict(zip(table["slide_id"], table["status"], strict=True))


def test_trident_is_read_by_its_attributes(tmp_path, capsys):
    grid, features = cells(), vectors()
    source = tmp_path / "20x" / "features_uni_v1"
    write_like_trident(source / "a.h5", grid * 512, features)
    (tmp_path / "mpp.csv").write_text(f"wsi,mpp\na.svs,{MPP}\n")
    out = tmp_path / "out"
    assert run("import", f"source={source}", f"mpps={tmp_path / 'mpp.csv'}", f"out={out}") == 0
    slide = read_slide(slide_folder(out / "features", "a"))
    assert_stored(slide, grid, grid * 512, features)
    noted = slide.attributes
    assert (slide.mpp, noted["mpp_source"], slide.pitch0, slide.tile0) == (MPP, "table", 512, 512)
    assert (slide.dimensions, slide.encoder) == ((20_000, 15_000), "uni_v1")
    assert noted["source"]["attributes"]["coords"]["savetodir"] is None
    assert "1 slides" in capsys.readouterr().out
    index = pd.read_csv(out / "features" / "index.csv")
    assert index[["slide_id", "num_tiles", "num_features"]].values.tolist() == [["a", 40, DIM]]


@pytest.mark.parametrize("regular", [False, True])
def test_tridents_overlap_is_undone(tmp_path, regular):
    # its patcher steps by the whole patch once, then by patch less overlap
    grid = cells() - [3, 5]
    side, overlap = 512, 128
    coords = grid * (side - overlap) if regular else grid * side - overlap * np.maximum(grid - 1, 0)
    source = write_like_trident(tmp_path / "a.h5", coords, vectors(), overlap=64)
    assert run("import", f"source={source}", "mpp=0.25", f"out={tmp_path / 'out'}") == 0
    slide = read_slide(slide_folder(tmp_path / "out" / "features", "a"))
    assert_stored(slide, grid, coords, vectors())
    assert (slide.pitch0, slide.tile0) == (384, 512)


@pytest.mark.parametrize("only", [None, "pt_files", "h5_files"])
def test_clam_takes_tile_size_from_patches(tmp_path, only):
    grid, features = cells(), vectors()
    write_like_clam(tmp_path / "clam", "s.1", grid * 1024 + [17, 33], features)
    for folder in {"pt_files", "h5_files"} - ({only} if only else {"pt_files", "h5_files"}):
        (tmp_path / "clam" / folder).rename(tmp_path / folder)
    out = tmp_path / "out"
    code = run(
        "import",
        f"source={tmp_path / 'clam'}",
        f"out={out}",
        "mpp=0.25",
        "encoder_name=resnet50/trunc",
    )
    assert code == 0
    slide = read_slide(slide_folder(out / "features", "s.1"))
    assert_stored(slide, grid, grid * 1024 + [17, 33], features)
    assert slide.tile0 == pytest.approx(1024.0256)
    assert slide.pitch0 == 1024
    assert slide.encoder == "resnet50_trunc"
    assert slide.attributes["source"]["encoder"] == "resnet50/trunc"


def test_features_of_trident_on_tiles_of_clam_keep_clams_words(tmp_path):
    path, grid = tmp_path / "a.h5", cells()
    arguments = ["import", f"source={path}", f"out={tmp_path / 'out'}", "mpp=0.25"]
    for level, more in ((0, []), (1, ["tile=1024"])):
        side = 256 * 4**level
        write_plain(path, grid * side, vectors())
        with h5py.File(path, "a") as file:
            file["coords"].attrs["patch_size"], file["coords"].attrs["patch_level"] = 256, level
        if more:
            assert run(*arguments) == 2
            assert status_of(tmp_path / "out") == {"a": "missing_attribute"}
        assert run(*arguments, *more) == 0
        slide = read_slide(slide_folder(tmp_path / "out" / "features", "a"))
        assert_stored(slide, grid, grid * side, vectors())
        assert slide.tile0 == side


def test_clams_grids_of_several_pieces_need_snap(tmp_path):
    grid = cells(60)
    coords = grid * 1024
    coords[grid[:, 0] > 8] += 300  # another piece of tissue begins elsewhere
    write_like_clam(tmp_path / "clam", "a", coords, vectors(60))
    arguments = ["import", f"source={tmp_path / 'clam'}", f"out={tmp_path / 'out'}", "mpp=0.25"]
    assert run(*arguments) == 2
    assert status_of(tmp_path / "out") == {"a": "off_lattice"}
    assert run(*arguments, "snap=true") == 0
    slide = read_slide(slide_folder(tmp_path / "out" / "features", "a"))
    assert_stored(slide, grid, coords, vectors(60))
    assert slide.attributes["snapped"] is True


@pytest.mark.parametrize(
    ("noted", "unit", "tile_um"),
    [
        ({}, 1.0, 256.0),
        ({"tile_size_um": None, "tile_size": 256.0, "stamp_version": "2.0.0"}, 1.0, 256.0),
        (dict.fromkeys(["stamp_version", "extractor", "unit", "tile_size_um", "tile_size_px",
                        "code_hash", "feat_type"]), 256 / 224, 256.0),
    ],
)  # fmt: skip
def test_stamp_counts_in_micrometres(tmp_path, noted, unit, tile_um):
    grid, features = cells(), vectors(dtype="float16")
    source = write_like_stamp(tmp_path / "a.h5", grid, features, **noted)
    if unit != 1.0:  # version 1 counted pixels of 256/224 um
        write_plain(source, (grid * 224).astype(np.int64), features, "feats")
    mpp = 0.2527
    assert run("import", f"source={source}", f"out={tmp_path / 'out'}") == 2
    assert status_of(tmp_path / "out") == {"a": "missing_mpp"}
    assert run("import", f"source={source}", f"mpp={mpp}", f"out={tmp_path / 'out'}") == 0
    slide = read_slide(slide_folder(tmp_path / "out" / "features", "a"))
    assert_stored(slide, grid, np.rint(grid * tile_um / mpp).astype(np.int64), features)
    assert slide.pitch0 * slide.mpp == pytest.approx(tile_um)


def test_gigapath_counts_in_half_micrometres_when_it_is_named(tmp_path):
    grid, features = cells(), vectors()
    write_plain(tmp_path / "in" / "a.svs.h5", grid * 256, features)
    arguments = ["import", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "mpp=0.25"]
    assert run(*arguments) == 2
    assert status_of(tmp_path / "out") == {"a": "unknown_unit"}
    assert run(*arguments, "format=gigapath") == 0
    slide = read_slide(slide_folder(tmp_path / "out" / "features", "a"))
    assert_stored(slide, grid, grid * 512, features)
    # level-0 coordinates of the same tiles are no lattice of 256: the next tile is missing
    write_plain(tmp_path / "in" / "a.svs.h5", grid * 512, features)
    assert run(*arguments, "format=gigapath") == 2
    assert status_of(tmp_path / "out") == {"a": "stride_mismatch"}


@pytest.mark.parametrize("ending", ["pt", "npz"])
def test_slide2vec_brings_its_own_mpp_and_tissue(tmp_path, ending):
    grid, features = cells(), vectors(dtype="float16")
    write_like_slide2vec(tmp_path / "in", "a", grid * 222, features, ending)
    assert run("import", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out'}") == 0
    slide = read_slide(slide_folder(tmp_path / "out" / "features", "a"))
    assert_stored(slide, grid, grid * 222, features)
    assert (slide.mpp, slide.tile0, slide.pitch0) == (0.2525, 444, 222)
    expected = np.linspace(0, 1, len(grid), dtype=np.float32)[slide.source_rows()]
    assert np.array_equal(slide.tissue, expected)
    assert slide.encoder == "prost40m"


def test_slides_say_their_mpp_and_size(tissue_slide, tmp_path):
    grid = np.array([[0, 0], [1, 0], [2, 1], [4, 3]])
    source = write_plain(tmp_path / "in" / "tissue.h5", grid * 128, vectors(4))
    arguments = ["import", f"source={source}", f"out={tmp_path / 'out'}", "unit=level0_px"]
    assert run(*arguments, f"slides={tissue_slide.parent}", "tile=128") == 0
    slide = read_slide(slide_folder(tmp_path / "out" / "features", "tissue"))
    assert (slide.mpp, slide.dimensions) == (0.5, (640, 512))
    write_plain(source, grid * 256, vectors(4))
    assert run(*arguments, f"slides={tissue_slide.parent}", "tile=256") == 2
    assert status_of(tmp_path / "out") == {"tissue": "outside_slide"}


def _trident(**attributes):
    return lambda path: write_like_trident(path, cells() * 512, vectors(), **attributes)


def _arrays(coords=None, features=None, **attributes):
    coords = cells() * 512 if coords is None else coords
    features = vectors() if features is None else features
    return lambda path: write_like_trident(path, coords, features, **attributes)


def _with_nan():
    features = vectors()
    features[7, 2] = np.nan
    return features


def _h5(**arrays):
    def write(path):
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array

    return write


def _stamp(**attributes):
    return lambda path: write_like_stamp(path, cells(), vectors(), **attributes)


BAD = [
    # writer, settings, status, words of the message
    (lambda path: path.write_bytes(b"no hdf5"), [], "unreadable", "a.h5"),
    (lambda path: path.write_bytes(b""), [], "unreadable", "copy it again"),
    (_h5(coords=cells()), [], "no_features", "holds coords"),
    (_h5(features=vectors()), [], "no_coordinates", "arrangement"),
    (_h5(patch_embeddings=vectors()), [], "no_features", "patch_embeddings"),
    (_h5(features=vectors()[0], coords=cells()), [], "slide_features", "features_*"),
    (_stamp(feat_type="patient"), [], "slide_features", "whole patient"),
    (_stamp(stamp_version="3.0.0"), [], "unknown_version", "STAMP 3.0.0"),
    (_stamp(unit="px"), [], "unknown_unit", "'px'"),
    (_h5(features=vectors(), coords=cells() * 512), [], "unknown_unit", "unit=level0_px"),
    (_trident(), ["unit=level0_px", "tile=512"], "contradictory", "format=plain"),
    (_trident(), ["tile=500"], "contradictory", "says 512"),
    (_trident(overlap="absent"), [], "missing_attribute", "overlap"),
    (_trident(overlap=32, target_magnification=None), [], "missing_attribute", "target_magn"),
    (_trident(level0_width=4_000), [], "outside_slide", "4000"),
    (_arrays(features=vectors(39)), [], "count_mismatch", "39 features, 40 coordinates"),
    (_arrays(features=_with_nan()), [], "not_finite", "row 7"),
    (_arrays(features=vectors().astype(np.int32)), [], "not_float", "int32"),
    (_arrays(cells()[:0], vectors(0)), [], "empty", "no tiles"),
    (_arrays(cells() * 512 - 5_000), [], "off_lattice", "negative"),
    (_arrays(cells() * 512 + np.arange(80).reshape(40, 2) // 70), [], "off_lattice", "row"),
    (_arrays(cells() * 500), [], "off_lattice", "snap=true"),
    (_arrays(cells() * 1024), [], "stride_mismatch", "stride=1024"),
    (_arrays(np.r_[cells(39), cells(39)[3:4]] * 512), [], "duplicate_tiles", "row 39"),
    (_trident(), ["mpp=null"], "missing_mpp", "mpps=TABLE"),
    (_trident(), ["mpp=900"], "mpp_suspect", "900"),
    (_trident(), ["format=stamp"], "unknown_unit", "micrometres"),
    (_trident(), ["format=plain"], "unknown_unit", "format=plain"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "given", "status", "words"), BAD)
def test_what_is_not_clear_is_refused_with_its_remedy(
    tmp_path, capsys, write, given, status, words
):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "a.h5")
    write_like_trident(tmp_path / "in" / "good.h5", cells() * 512, vectors())
    bad_only = f"source={tmp_path / 'in' / 'a.h5'}"
    assert run("import", bad_only, f"out={tmp_path / 'one'}", "mpp=0.25", *given) == 2
    assert status_of(tmp_path / "one") == {"a": status}
    row = pd.read_csv(tmp_path / "one" / "failures.csv").iloc[0]
    assert words in f"{row['reason']} {row['remedy']}"
    if not given:
        both = f"source={tmp_path / 'in'}"
        assert run("import", both, f"out={tmp_path / 'two'}", "mpp=0.25") == 3
        assert status_of(tmp_path / "two") == {"a": status}
        assert words in capsys.readouterr().out


class _Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_nothing_is_unpickled(tmp_path, capfd):
    write_like_clam(tmp_path / "clam", "a", cells() * 1024, vectors())
    torch.save(_Evil(), tmp_path / "clam" / "pt_files" / "a.pt")
    write_like_slide2vec(tmp_path / "s2v", "a", cells() * 222, vectors(), "npz")
    np.savez(tmp_path / "s2v" / "tile_embeddings" / "a.npz", features=np.array([_Evil()]))
    for name in ("clam", "s2v"):
        assert run("import", f"source={tmp_path / name}", f"out={tmp_path / name}_o", "mpp=1") == 2
        assert status_of(tmp_path / f"{name}_o") == {"a": "unreadable"}
    assert "unpickled" not in capfd.readouterr().out


def test_clam_files_of_different_runs_are_not_mixed(tmp_path):
    write_like_clam(tmp_path / "clam", "a", cells() * 1024, vectors())
    torch.save(torch.from_numpy(vectors() + 1), tmp_path / "clam" / "pt_files" / "a.pt")
    arguments = ["import", f"source={tmp_path / 'clam'}", f"out={tmp_path / 'out'}", "mpp=0.25"]
    assert run(*arguments) == 2
    assert status_of(tmp_path / "out") == {"a": "contradictory"}


def test_two_files_of_one_slide_are_both_refused(tmp_path):
    for folder in ("features_uni", "features_conch"):
        write_like_trident(tmp_path / "in" / folder / "a.h5", cells() * 512, vectors())
    write_like_trident(tmp_path / "in" / "features_uni" / "b.h5", cells() * 512, vectors())
    assert run("import", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "mpp=0.25") == 3
    table = pd.read_csv(tmp_path / "out" / "failures.csv")
    assert table["status"].tolist() == ["duplicate_id"] * 2
    assert "features_uni" in table["reason"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["source={tmp}/absent"], "does not exist"),
        (["source={tmp}"], "no .h5"),
        (["source={tmp}", "format=hdf"], "unknown format"),
        (["source={tmp}", "unit=px"], "level0_px"),
        (["source={tmp}", "tile=-1"], "positive"),
        (["source={tmp}", "tile_px=1.5"], "whole number"),
        ([], "source= is missing"),
        (["source={tmp}", "mpps={tmp}/mpp.csv"], "row 3"),
    ],
)
def test_wrong_settings_end_at_once(tmp_path, capsys, arguments, words):
    (tmp_path / "mpp.csv").write_text("slide_id,mpp\na,0.25\nb,none\n")
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    assert run("import", *given, f"out={tmp_path / 'out'}") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dry_run_says_what_would_happen_and_writes_nothing(tmp_path, capsys):
    write_like_trident(tmp_path / "in" / "a.h5", cells() * 512, vectors())
    write_plain(tmp_path / "in" / "b.h5", cells() * 512, vectors())
    arguments = ["import", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out'}", "mpp=0.25"]
    assert run(*arguments, "dry_run=true") == 3
    shown = capsys.readouterr().out
    assert "would import a: trident, 40 tiles of 512 px (128 um)" in shown
    assert "unknown_unit" in shown
    assert not (tmp_path / "out").exists()
    assert run(*arguments) == 3
    assert run("export", f"features={tmp_path / 'out' / 'features'}", "dry_run=true") == 0
    assert "a.h5" in capsys.readouterr().out


def test_import_goes_on_and_takes_what_has_changed(tmp_path, capsys):
    for name in "ab":
        write_like_trident(tmp_path / "in" / f"{name}.h5", cells() * 512, vectors())
    arguments = ["import", f"source={tmp_path / 'in'}", f"out={tmp_path / 'out'}"]
    store = tmp_path / "out" / "features"
    assert run(*arguments, "mpp=0.25") == 0
    before = (store / "a.zarr" / "zarr.json").stat().st_mtime_ns
    write_like_trident(tmp_path / "in" / "b.h5", cells() * 512, vectors() + 1)
    capsys.readouterr()
    assert run(*arguments, "mpp=0.25") == 0
    assert "(1 were there)" in capsys.readouterr().out
    assert (store / "a.zarr" / "zarr.json").stat().st_mtime_ns == before
    assert read_slide(store / "b.zarr").features().max() > vectors().max()
    assert run(*arguments, "mpp=0.5") == 0
    assert read_slide(store / "a.zarr").mpp == 0.5


def test_features_of_our_own_are_not_overwritten(tmp_path):
    slide_id = make_bag(tmp_path / "store", 40, num_features=3, seed=0)
    write_like_trident(tmp_path / "in" / f"{slide_id}.h5", cells() * 512, vectors())
    out = tmp_path / "out"
    code = run(
        "import", f"source={tmp_path / 'in'}", f"features={tmp_path / 'store'}", f"out={out}",
        "mpp=0.25",
    )  # fmt: skip
    assert code == 2
    assert status_of(out) == {slide_id: "exists"}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_trident_import_export_import_is_bit_exact(tmp_path, dtype):
    grid, features = cells(), vectors(dtype=dtype)
    first = write_like_trident(tmp_path / "in" / "a.h5", grid * 512, features)
    one, two = tmp_path / "one", tmp_path / "two"
    assert run("import", f"source={first.parent}", f"out={one}", "mpp=0.2527") == 0
    assert run("export", f"features={one / 'features'}", f"out={tmp_path / 'again'}") == 0
    with h5py.File(first) as was, h5py.File(tmp_path / "again" / "a.h5") as now:
        for name in ("features", "coords"):
            assert now[name].dtype == was[name].dtype
            assert now[name][()].tobytes() == was[name][()].tobytes()
        for key, value in was["coords"].attrs.items():
            assert now["coords"].attrs[key] == value
        assert now["features"].attrs["encoder"] == "uni_v1"
    assert run("import", f"source={tmp_path / 'again'}", f"out={two}") == 0
    stores = [read_slide(slide_folder(out / "features", "a")) for out in (one, two)]
    assert stores[0].attributes["digest"] == stores[1].attributes["digest"]
    assert stores[0].encoder_fingerprint == stores[1].encoder_fingerprint
    for key in ("mpp", "mpp_source", "plan_hash", "pitch0", "dimensions"):
        assert stores[0].attributes[key] == stores[1].attributes[key]


def test_slides_of_our_own_survive_trident(tmp_path):
    slide_id = make_bag(tmp_path / "store", 500, num_features=5, seed=3)
    assert run("export", f"features={tmp_path / 'store'}", f"out={tmp_path / 'h5'}") == 0
    with h5py.File(tmp_path / "h5" / f"{slide_id}.h5") as file:
        assert file["coords"].attrs["patch_size_level0"] == 256
        assert file["coords"].attrs["target_magnification"] == 20
        assert file["coords"].attrs["savetodir"] == "None"
    assert run("import", f"source={tmp_path / 'h5'}", f"out={tmp_path / 'out'}") == 0
    was = read_slide(slide_folder(tmp_path / "store", slide_id))
    now = read_slide(slide_folder(tmp_path / "out" / "features", slide_id))
    for name in ("grid", "xy0", "tissue"):
        assert getattr(was, name).tobytes() == getattr(now, name).tobytes()
    assert was.features().tobytes() == now.features().tobytes()


def test_tensors_are_plain_and_in_the_order_of_their_source(tmp_path):
    grid, features = cells(), vectors()
    write_like_clam(tmp_path / "clam", "a", grid * 1024, features)
    out = tmp_path / "out"
    assert run("import", f"source={tmp_path / 'clam'}", f"out={out}", "mpp=0.25") == 0
    assert run("export", f"features={out / 'features'}", "format=pt", f"out={tmp_path / 'pt'}") == 0
    tensor = torch.load(tmp_path / "pt" / "a.pt", weights_only=True)
    coords = torch.load(tmp_path / "pt" / "coords" / "a.pt", weights_only=True)
    assert tensor.numpy().tobytes() == features.tobytes()
    assert np.array_equal(coords.numpy(), grid * 1024)


def test_imported_slides_are_not_embedded_over(tmp_path, tissue_slide):
    write_like_clam(tmp_path / "clam", "tissue", cells() * 1024, vectors())
    out = tmp_path / "out"
    assert run("import", f"source={tmp_path / 'clam'}", f"out={out}", "mpp=0.5") == 0
    with pytest.raises(InputError, match="imported from files of another tool"):
        extract_features(
            [SlideFile("tissue", tissue_slide)],
            store=out / "features",
            plan=TilePlan(64),
            encoder=StatsEncoder(),
            workers=1,
            progress=False,
        )


def test_of_several_encoders_one_is_exported(tmp_path, tissue_slide, capsys):
    for grey in (False, True):
        extract_features(
            [SlideFile("a", tissue_slide)],
            store=tmp_path / "store",
            plan=TilePlan(64),
            encoder=StatsEncoder(grey=grey),
            workers=1,
            progress=False,
        )
    given = ["export", f"features={tmp_path / 'store'}", "format=pt", f"out={tmp_path / 'pt'}"]
    assert run(*given) == 2
    assert "features of stats, stats_grey: choose one by encoder_name=" in capsys.readouterr().err
    assert run(*given, "encoder_name=uni") == 2
    assert run(*given, "encoder_name=stats_grey") == 0
    found = torch.load(tmp_path / "pt" / "a.pt", weights_only=True)
    slide = read_slide(slide_folder(tmp_path / "store", "a"), "stats_grey")
    assert found.numpy().tobytes() == slide.features().tobytes()
    geojson = [*given[:2], "format=geojson", f"out={tmp_path / 'qupath'}"]
    assert run(*geojson) == 0


def test_export_goes_on_and_lists_the_damaged(tmp_path, capsys):
    store, out = tmp_path / "store", tmp_path / "out"
    first, second = (make_bag(store, size, num_features=3, seed=0) for size in (30, 40))
    assert run("export", f"features={store}", f"out={out}") == 0
    before = (out / f"{first}.h5").stat().st_mtime_ns
    (out / f"{second}.h5").unlink()
    chunk = slide_folder(store, second) / "features" / "normal" / "c" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    assert run("export", f"features={store}", f"out={out}") == 3
    assert (out / f"{first}.h5").stat().st_mtime_ns == before
    assert status_of(out) == {second: "damaged"}
    assert not (out / f"{second}.h5").exists()
    assert run("export", f"features={tmp_path / 'absent'}", f"out={out}") == 2
    assert "does not exist" in capsys.readouterr().err


def test_geojson_is_what_qupath_reads(tmp_path):
    write_like_slide2vec(tmp_path / "in", "a", cells() * 222, vectors())
    write_like_trident(tmp_path / "in2" / "b.h5", cells() * 512, vectors())
    store = tmp_path / "store"
    for source in ("in", "in2"):
        given = [f"source={tmp_path / source}", f"features={store}", "mpp=0.25"]
        assert run("import", *given, f"out={tmp_path / 'out'}") == 0
    assert run("export", f"features={store}", "format=geojson", f"out={tmp_path / 'geo'}") == 0
    for slide_id, side in (("a", 444), ("b", 512)):
        found = json.loads((tmp_path / "geo" / f"{slide_id}.geojson").read_text())
        assert found["type"] == "FeatureCollection"
        slide = read_slide(slide_folder(store, slide_id))
        assert len(found["features"]) == len(slide)
        for feature, corner in zip(found["features"], slide.xy0.tolist(), strict=True):
            assert feature["type"] == "Feature"
            assert feature["geometry"]["type"] == "Polygon"
            (ring,) = feature["geometry"]["coordinates"]
            assert ring[0] == ring[-1] == corner
            assert len(ring) == 5
            assert ring[2] == [corner[0] + side, corner[1] + side]
            properties = feature["properties"]
            assert properties["objectType"] == "detection"
            assert len(properties["classification"]["color"]) == 3
            assert all(isinstance(v, int | float) for v in properties["measurements"].values())
            assert ("tissue" in properties["measurements"]) == (slide_id == "a")
        names = {feature["properties"]["classification"]["name"] for feature in found["features"]}
        assert len(names) == (10 if slide_id == "a" else 1)


def test_a_hundred_thousand_tiles_are_written_for_qupath_in_seconds(tmp_path):
    slide_id = make_bag(tmp_path, 100_000, num_features=1, seed=0)
    slide = read_slide(slide_folder(tmp_path, slide_id))
    started = time.process_time()
    write_geojson(tmp_path / "out.geojson", slide)
    assert time.process_time() - started < 5
    with (tmp_path / "out.geojson").open() as file:
        assert sum(1 for _ in file) == 100_002


@settings(max_examples=15, deadline=None)
@given(
    num=st.integers(1, 144),
    pitch=st.floats(20, 5_000),
    origin=st.tuples(st.integers(0, 9_000), st.integers(0, 9_000)),
    overlap=st.floats(0.5, 1),
    mpp=st.floats(0.02, 50),
    dtype=st.sampled_from(["float16", "float32"]),
    seed=st.integers(0, 1 << 16),
)
def test_any_stored_slide_comes_back_from_trident(num, pitch, origin, overlap, mpp, dtype, seed):
    grid = cells(num, seed)
    grid = grid[hilbert_order(grid)]
    features = np.random.default_rng(seed).standard_normal((num, 3)).astype(dtype)
    attributes = {
        "schema": SCHEMA, "slide_id": "a", "dimensions": [99_999, 88_888], "mpp": mpp,
        "mpp_source": "x", "pitch0": pitch * overlap, "tile0": pitch, "tile_px": None,
        "plan": {"any": [1, None]}, "plan_hash": "p", "encoders": {"e": encoder_entry("f", {})},
    }  # fmt: skip
    arrays = {
        "grid": grid.astype(np.int32),
        "xy0": np.rint(grid * pitch * overlap).astype(np.int64) + origin,
        "tissue": np.random.default_rng(seed).random(num, dtype=np.float32),
        "features/e": features,
    }
    with tempfile.TemporaryDirectory() as folder:
        write_group(Path(folder) / "a.zarr", attributes, arrays)
        path = Path(folder) / "a.h5"
        write_trident(path, read_slide(Path(folder) / "a.zarr"))
        slide = read_foreign(Item("a", "auto", {"features": path}), Given())
    found, geometry = place_tiles(slide, slide.mpp)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].tobytes() == array.tobytes()
    assert (geometry["pitch0"], geometry["tile0"]) == (pitch * overlap, pitch)
    assert (slide.mpp, slide.plan, slide.encoder) == (mpp, {"any": [1, None]}, "e")


def test_without_h5py_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    write_like_trident(tmp_path / "in" / "a.h5", cells() * 512, vectors())
    make_bag(tmp_path / "store", 30, num_features=3, seed=0)
    monkeypatch.setitem(sys.modules, "h5py", None)
    for arguments in (
        ["import", f"source={tmp_path / 'in'}", "mpp=0.25"],
        ["export", f"features={tmp_path / 'store'}"],
    ):
        assert run(*arguments, f"out={tmp_path / arguments[0]}") == 2
        assert "pip install -e '.[interchange]'" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_output_is_named(tmp_path, capsys):
    write_like_trident(tmp_path / "in" / "a.h5", cells() * 512, vectors())
    (tmp_path / "out").write_text("")
    assert run("import", f"source={tmp_path / 'in'}", "mpp=1", f"out={tmp_path / 'out'}") == 2
    assert "is a file" in capsys.readouterr().err


def test_an_interrupted_write_leaves_nothing_to_clean(tmp_path, monkeypatch):
    write_like_trident(tmp_path / "in" / "a.h5", cells() * 512, vectors())
    arguments = ["import", f"source={tmp_path / 'in'}", "mpp=1", f"out={tmp_path / 'out'}"]

    def full(source, target):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_move_into_place", full)
        assert run(*arguments) == 2
    store = tmp_path / "out" / "features"
    assert [path.name.split(".tmp-")[0] for path in store.iterdir()] == ["a.zarr"]
    assert list_slides(store) == []
    assert run(*arguments) == 0
    assert sorted(path.name for path in store.iterdir()) == ["a.zarr", "index.csv"]


@settings(max_examples=60, deadline=None)
@given(
    stride=st.one_of(st.integers(16, 4096), st.floats(16, 4096)),
    first=st.tuples(st.integers(0, 300), st.integers(0, 300)),
    seed=st.integers(0, 1 << 16),
    micrometres=st.booleans(),
)
def test_lattice_gives_back_the_cells(stride, first, seed, micrometres):
    grid = cells(50, seed) + np.array(first)
    exact = grid * float(stride)
    coords = exact.astype(np.float32) if micrometres else np.rint(exact).astype(np.int64)
    found, _ = fit_lattice(coords, stride)
    assert np.array_equal(found, grid)
    order = np.random.default_rng(seed).permutation(len(grid))
    assert np.array_equal(fit_lattice(coords[order], stride)[0], grid[order])


@settings(max_examples=40, deadline=None)
@given(stride=st.integers(16, 4096), off=st.integers(1, 1 << 12), row=st.integers(0, 49))
def test_one_tile_off_the_lattice_is_found(stride, off, row):
    coords = cells(50) * stride
    coords[row, off % 2] += off % (stride - 1) + 1
    with pytest.raises(ForeignError, match=r"off_lattice|duplicate"):
        fit_lattice(coords, stride)


@pytest.mark.real_data
def test_real_file_without_attributes_is_read_when_all_is_given(real_data, tmp_path, capsys):
    (source,) = (real_data / "slides" / "mil").glob("TCGA-AD-6964*.h5")
    arguments = ["import", f"source={source}", f"out={tmp_path}"]
    assert run(*arguments) == 2
    assert list(status_of(tmp_path).values()) == ["unknown_unit"]
    assert "unit=level0_px" in capsys.readouterr().out
    assert run(*arguments, "unit=level0_px", "tile=512", "mpp=0.25") == 0
    (folder,) = (tmp_path / "features").glob("*.zarr")
    slide = read_slide(folder)
    with h5py.File(source) as file:
        coords, features = file["coords"][()], file["feats"][()]
    assert_stored(slide, coords // 512, coords, features)
