"""What killed processes leave is removed; what living ones write is not."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.shared.asides import aside_of, clean, remove_leftovers


@pytest.fixture
def ended() -> int:
    """Number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_an_aside_stands_beside_its_target_and_names_its_process(tmp_path: Path) -> None:
    aside = aside_of(tmp_path / "a.csv")
    assert aside.parent == tmp_path
    assert aside.name == f"a.csv.tmp-{platform.node()}-{os.getpid()}"


def test_leftovers_of_ended_processes_go_and_all_else_stays(tmp_path: Path, ended: int) -> None:
    gone = [f"a.csv.tmp-{platform.node()}-{ended}", f"b.zarr.tmp-{platform.node()}-{ended}-old"]
    kept = [
        f"c.csv.tmp-{platform.node()}-{os.getppid()}",  # alive
        f"d.csv.tmp-elsewhere-{ended}",  # of another machine, and fresh
        "e.csv",
        "f.tmp",
    ]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir()
        (tmp_path / name / "content").write_text("x")
    remove_leftovers(tmp_path.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_another_machines_leftovers_go_when_nothing_changed_for_an_hour(tmp_path: Path) -> None:
    old = tmp_path / "a.zarr.tmp-elsewhere-1"
    busy = tmp_path / "b.zarr.tmp-elsewhere-2"
    for folder in (old, busy):
        folder.mkdir()
        (folder / "chunk").write_text("x")
        os.utime(folder, (0, 0))
    os.utime(old / "chunk", (0, 0))
    remove_leftovers([old, busy])
    assert [path.name for path in tmp_path.iterdir()] == [busy.name]


def test_cleaning_goes_into_folders_but_not_into_groups(tmp_path: Path, ended: int) -> None:
    name = f"x.tmp-{platform.node()}-{ended}"
    for folder in ("deeper/more", "group.zarr"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("x")
    clean(tmp_path)
    left = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert left == [f"group.zarr/{name}"]
