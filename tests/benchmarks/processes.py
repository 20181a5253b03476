"""Run commands: verbs of genomics, or one that is watched.

For Linux: peaks are `VmHWM` of /proc, looked at twenty times a second.
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PAUSE = 0.05


@dataclass(frozen=True, slots=True)
class Usage:
    """What a command took; `cpu_seconds` and `peaks` (MiB, the largest first) count its children.

    CPU seconds per item tell how fast it is on a machine that others load, too.
    """

    code: int
    seconds: float
    cpu_seconds: float
    peaks: list[float]
    output: str


def run_verb(*arguments: str) -> int:
    """Run a verb of genomics; what it prints is shown where it fails."""
    command = [sys.executable, "-m", "pipelines.genomics", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        print(run.stdout[-2000:] + run.stderr[-2000:], file=sys.stderr)
    return run.returncode


def run_watched(command: Sequence[str], *, threads: int = 1) -> Usage:
    """Run a command of this interpreter (what follows `python`) to its end."""
    start = time.perf_counter()
    before = _children_seconds()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    peaks: dict[int, float] = {}
    with subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    ) as process:
        while process.poll() is None:
            for pid in _family(process.pid):
                peaks[pid] = max(peaks.get(pid, 0.0), _peak_mib(pid))
            time.sleep(_PAUSE)
        assert process.stdout is not None
        output = process.stdout.read()
    return Usage(
        code=process.returncode,
        seconds=time.perf_counter() - start,
        cpu_seconds=_children_seconds() - before,
        peaks=sorted(peaks.values(), reverse=True),
        output=output,
    )


def _children_seconds() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid, *(member for child in children for member in _family(int(child)))]


def _peak_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0.0
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return int(found[0]) / 1024 if found else 0.0
