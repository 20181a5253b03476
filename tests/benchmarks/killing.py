"""Kill a run again and again: `python -m tests.benchmarks.killing [FOLDER]`.

Embeds a folder of slides with two worker processes and kills (SIGKILL) the run, its main process
alone, or one worker, at random moments and inside of writes of the store; then starts the same
command again, until it ends well. Begins anew with an empty store until there were enough kills.
Every finished store must equal that of a run that nobody killed, by content and by name, with
nothing left beside it. Exits with 1 where it does not.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.pathology.store import check_content, list_slides, read_slide, slide_folder
from tests.benchmarks.large_slide import write_slide

KINDS = ("all", "all", "main", "worker")
"""What is killed: every process of the run, its main one, or one of its workers."""


@dataclass(slots=True)
class Tally:
    """What was done: kills by kind, those inside a write, runs that ended well."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    inside_write: int = 0
    finished: int = 0

    @property
    def total(self) -> int:
        """All kills."""
        return sum(self.kills.values())


def main() -> int:
    """Print what was done; 0 if every store is as it must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="for slides and stores")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--inside", type=int, default=10, help="of them inside a write, at least")
    parser.add_argument("--slides", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        slides = Path(scratch) / "slides"
        for number in range(given.slides):
            write_slide(slides / f"slide_{number:02d}.tiff", side=1024 + 128 * (number % 4))
        tally = kill_until(
            slides, Path(scratch), kills=given.kills, inside=given.inside, seed=given.seed
        )
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.kills.items()))
    print(
        f"{tally.total} kills ({counts}), {tally.inside_write} of them inside a write of the "
        f"store; {tally.finished} runs over {given.slides} slides ended, all stores equal"
    )
    return 0


def kill_until(
    slides: Path,
    scratch: Path,
    *,
    kills: int,
    inside: int,
    seed: int,
    workers: int = 2,
    kinds: Sequence[str] = KINDS,
) -> Tally:
    """Kill and start again until there were so many; AssertionError where a store differs."""
    begun = time.perf_counter()
    _start(_command(slides, scratch / "reference", workers), lambda run: None)
    longest = time.perf_counter() - begun
    expected = digests(scratch / "reference" / "features")
    tally, rng = Tally(), random.Random(seed)

    def kill(run: subprocess.Popen[str]) -> None:
        # a run of which one worker was killed goes on, and is killed again
        while run.poll() is None and (tally.total < kills or tally.inside_write < inside):
            moment = None if rng.random() < 0.5 else rng.uniform(0, longest / 2)
            _kill(run, out / "features", rng.choice(kinds), moment, tally, rng)

    while tally.total < kills or tally.inside_write < inside:
        out = scratch / f"killed_{tally.finished}"
        while not _start(_command(slides, out, workers), kill):
            pass
        assert digests(out / "features") == expected, f"{out} differs"
        tally.finished += 1
        print(f"{tally.total} kills, {tally.inside_write} inside a write", file=sys.stderr)
    return tally


def digests(store: Path) -> dict[str, str]:
    """Digest of each slide's content, which is checked; nothing else may lie in the store."""
    names = list_slides(store)
    for name in names:
        check_content(slide_folder(store, name))
    present = {path.name for path in store.iterdir()}
    assert present == {f"{name}.zarr" for name in names} | {"index.csv"}, sorted(present)
    return {name: read_slide(slide_folder(store, name)).attributes["digest"] for name in names}


def _start(command: list[str], watch: Callable[["subprocess.Popen[str]"], None]) -> bool:
    """Run the command under a watch; True if it ended well, False if it was killed."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
    ) as run:  # fmt: skip
        watch(run)
        assert run.stdout is not None
        text = run.stdout.read()  # until the last process that holds it has ended: no orphans
    # 3: the worker that tried a slide alone was killed, too; the slide is listed
    assert run.returncode in (0, 3, -signal.SIGKILL), text
    return run.returncode == 0


def _kill(
    run: "subprocess.Popen[str]",
    store: Path,
    kind: str,
    moment: float | None,
    tally: Tally,
    rng: random.Random,
) -> None:
    """Kill after `moment` seconds, or as soon as something is written to the store."""
    end = time.monotonic() + (3600.0 if moment is None else moment)
    while time.monotonic() < end and run.poll() is None:
        if moment is None and _is_writing(store):
            break
        time.sleep(0.001)
    workers = _workers(run.pid)
    if run.poll() is not None:
        return
    if kind == "worker" and not workers:
        kind = "all"
    if kind == "all":
        os.killpg(run.pid, signal.SIGKILL)
    else:
        os.kill(run.pid if kind == "main" else rng.choice(workers), signal.SIGKILL)
    if kind != "worker":
        run.wait()
    tally.kills[kind] += 1
    tally.inside_write += kind == "all" and _is_writing(store)


def _is_writing(store: Path) -> bool:
    """Tell whether something is being written aside; with all processes dead, whether it was."""
    try:
        return any(".zarr.tmp-" in name for name in os.listdir(store))
    except FileNotFoundError:
        return False


def _workers(pid: int) -> list[int]:
    """Worker processes of a run; not the one in which Python keeps track of semaphores."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(c) for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    except OSError:
        return []


def _command(slides: Path, out: Path, workers: int) -> list[str]:
    return [
        sys.executable, "-m", "pipelines.pathology", "embed", f"slides={slides}", f"out={out}",
        f"num_workers={workers}", "tile_px=128", "mpp=0.25", "progress=false",
    ]  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
