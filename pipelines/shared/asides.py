"""Write aside, then rename: what is visible is complete, and what a killed process left is known.

An aside's name ends in `.tmp-HOST-PID`, so that nobody removes what a living process writes.
"""

import os
import platform
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

_NAMED = re.compile(r"\.tmp-(?P<host>.+)-(?P<pid>\d+)(?:-old)?$")
_LONG_SECONDS = 3600.0


def aside_of(path: Path) -> Path:
    """Return where this process writes what is to become `path`: beside it, on the same disk."""
    return path.with_name(f"{path.name}.tmp-{platform.node()}-{os.getpid()}")


def is_aside(path: Path) -> bool:
    """Tell by its name whether something is being written, or was left unfinished, at `path`."""
    return ".tmp-" in path.name


def remove_leftovers(candidates: Iterable[Path]) -> None:
    """Remove files and folders that ended processes left aside; other paths are not touched.

    A process of this machine is asked for. Of another machine's it counts as ended when nothing of
    it has changed for an hour. Machines that share a folder must have names of their own.
    """
    for path in candidates:
        match = _NAMED.search(path.name)
        if match is None or not _has_ended(path, match["host"], int(match["pid"])):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def clean(root: Path) -> None:
    """Remove leftovers in a folder and those below it, but not inside of Zarr groups."""
    for folder, names, files in os.walk(root):
        remove_leftovers(Path(folder, name) for name in (*names, *files))
        names[:] = [name for name in names if ".zarr" not in name]


def _has_ended(path: Path, host: str, pid: int) -> bool:
    if host == platform.node() and os.name == "posix":
        return not _is_alive(pid)
    try:
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        newest = max(member.stat().st_mtime for member in inside)
    except OSError:  # another process has just removed it
        return False
    return time.time() - newest > _LONG_SECONDS


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # this process is not at it: it has come here to begin
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
