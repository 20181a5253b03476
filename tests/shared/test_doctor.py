"""The doctor: what it says of this machine, of requirements, and of sound and damaged stores."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from pipelines.pathology.scale import make_bag
from pipelines.shared import doctor
from pipelines.shared.asides import aside_of


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of two slides."""
    for size in (30, 40):
        make_bag(tmp_path / "store", size, num_features=3, seed=0)
    return tmp_path / "store"


def levels(findings: object) -> dict[str, str]:
    return {finding.part: finding.level for finding in findings}  # type: ignore[attr-defined]


def test_help_says_what_the_exit_codes_mean(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["--help"]) == 0
    assert "Exit codes: 0" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["store", "store=", "stores=x", "store=/nowhere/at/all"])
def test_wrong_arguments_end_with_2(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([argument]) == 2
    assert "error: " in capsys.readouterr().err


def test_this_machine_and_a_sound_store_are_well(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.main([f"store={store}"]) == 0
    report = capsys.readouterr().out
    for words in ("engine blockwise: computes", "slides by openslide", "slides by jpeg_tiles",
                  "GB free", "2 of 2 sound (gigasparse-slide/"):  # fmt: skip
        assert words in report


def test_requirements_say_what_to_install() -> None:
    lines = [
        ("numpy>=1", ""),
        ("no-such-package>=2", ""),
        ("zarr>=999", ""),
        ("nowhere-only; sys_platform == 'nowhere'", ""),
        ("h5py", "files"),
        ("no-such-extra", "other"),
    ]
    found = [(f.level, f.text) for f in doctor.check_requirements(lines)]
    assert (
        "missing",
        "no-such-package is not installed: pip install 'no-such-package>=2'",
    ) in found
    assert any(level == "missing" and "zarr" in text and ">=999" in text for level, text in found)
    assert ("note", "no-such-extra is not installed: pip install -e '.[other]'") in found
    assert ("ok", "installed") in found
    assert not any("nowhere" in text for _, text in found)


def test_what_is_missing_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: [("no-such-package", "")])
    assert doctor.main([]) == 2
    assert "pip install 'no-such-package'" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["changed", "short", "missing", "metadata", "leftover", "array"])
def test_damage_is_named_and_ends_with_3(
    damage: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slide = store / "tissue_30.zarr"
    chunk = slide / "features" / "normal" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    if damage == "changed":
        content[5] ^= 1
        chunk.write_bytes(content)
    elif damage == "short":
        chunk.write_bytes(content[:-3])
    elif damage == "missing":
        chunk.unlink()
    elif damage == "metadata":
        (slide / "zarr.json").write_text("{")
    elif damage == "array":
        shutil.rmtree(slide / "grid")
    else:
        aside_of(slide).mkdir()
    assert doctor.main([f"store={store}"]) == 3
    damaged = [x for x in capsys.readouterr().out.splitlines() if x.startswith("damaged")]
    assert len(damaged) == 1
    assert str(slide) in damaged[0]


def test_a_folder_without_stores_is_not_well(tmp_path: Path) -> None:
    assert levels(doctor.check_store(tmp_path, {}))["store"] == "damaged"


def test_stores_that_no_pipeline_knows_are_read_whole(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "x.zarr", attributes={"schema": "other/1"})
    group.create_array("deep/values", data=np.arange(1000), chunks=(100,))
    assert levels(doctor.check_store(tmp_path / "x.zarr", {}))["store"] == "ok"
    chunk = tmp_path / "x.zarr" / "deep" / "values" / "c" / "3"
    chunk.write_bytes(chunk.read_bytes()[:9])
    (found,) = [f for f in doctor.check_store(tmp_path / "x.zarr", {}) if f.part == "store"]
    assert found.level == "damaged"
    assert str(tmp_path / "x.zarr" / "deep" / "values") in found.text
