"""Kill an ingest again and again: `python -m tests.benchmarks.kill_ingest [KILLS] [MEGABASES]`.

Kills (SIGKILL) the command at random moments after it has begun to write, some of them while an
older store is being replaced, and starts the same command again. The next run must end well, with
the content digest of a run that nobody killed, and with nothing left beside the store. Exits with 1
where it does not.
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.genomics.ingest import ingest


@dataclass(slots=True)
class Outcome:
    """What became of the kills."""

    killed: int = 0
    """Runs that were writing when they were killed."""
    too_late: int = 0
    """Runs that ended before."""


def write_records(path: Path, megabases: float, *, seed: int = 0) -> Path:
    """Write random records of a thousand to a million letters, some of them N or in lower case."""
    generator = np.random.default_rng(seed)
    left, number = int(megabases * 1e6), 0
    with path.open("wb") as file:
        while left > 0:
            length = min(left, int(10 ** generator.uniform(3, 6)))
            letters = generator.choice(np.frombuffer(b"ACGT", np.uint8), length)
            letters[: length // 10] |= 0x20
            letters[length // 2 : length // 2 + 50] = ord("N")
            file.write(b">r%d\n%s\n" % (number, letters.tobytes()))
            left, number = left - length, number + 1
    return path


def kill_again_and_again(folder: Path, kills: int, megabases: float, *, seed: int = 0) -> Outcome:
    """Kill that many runs that were writing; raises AssertionError where a next run differs."""
    records = write_records(folder / "records.fa", megabases)
    older = write_records(folder / "older.fa", 0.01, seed=1)
    expected = ingest(records, folder / "expected", progress=False).fingerprint
    store, outcome = folder / "stores" / "store", Outcome()
    moments = random.Random(seed)
    seconds = 1.0
    while outcome.killed < kills:
        shutil.rmtree(store.parent, ignore_errors=True)
        if outcome.killed % 2:
            ingest(older, store, progress=False)
        seconds = _kill_one(records, store, moments.uniform(0, seconds), outcome) or seconds
        assert ingest(records, store, progress=False).fingerprint == expected
        assert [entry.name for entry in store.parent.iterdir()] == ["store"]
    return outcome


def _kill_one(records: Path, store: Path, delay: float, outcome: Outcome) -> float | None:
    """Kill a run so long after its first write; returns the seconds of writing if it had ended."""
    run = subprocess.Popen(_command(records, store), stdout=subprocess.DEVNULL)
    while run.poll() is None and not list(store.parent.glob("store.partial-*")):
        time.sleep(0.002)
    begun = time.monotonic()
    try:
        run.wait(delay)
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
        outcome.killed += 1
        return None
    outcome.too_late += 1
    return time.monotonic() - begun


def _command(records: Path, store: Path) -> list[str]:
    verb = [sys.executable, "-m", "pipelines.genomics", "ingest"]
    return [*verb, f"sequences={records}", f"store={store}", "progress=false"]


if __name__ == "__main__":
    arguments = [float(argument) for argument in sys.argv[1:]] + [20, 40][len(sys.argv) - 1 :]
    with tempfile.TemporaryDirectory() as scratch:
        outcome = kill_again_and_again(Path(scratch), int(arguments[0]), arguments[1])
    print(f"{outcome.killed} runs killed while writing ({outcome.too_late} had ended before):")
    print("each next run ended with the same digest, and nothing else lay beside the store")
