"""Kill a training again and again: `python -m tests.benchmarks.kill_training [FOLDER]`.

Trains a model and attention pooling (`train`, on the CPU) on drawn slides and kills the process
(SIGKILL) at random moments: while it starts, between and inside of steps, while a state is written,
between the two networks, while results are written. The same command is started until it ends.
Dropout, augmentation, drawing balanced classes and steps over several batches are on, so that every
source of chance must be taken up where it was. Weights, predictions and scores must equal, bit for
bit, those of a run that nobody killed, with nothing left beside them. Exits with 1 where they
do not.
"""

import argparse
import collections
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from pipelines.pathology.__main__ import VERBS
from pipelines.shared.asides import is_aside
from pipelines.shared.cli import main as run_verb
from tests.pathology.conftest import draw_stored

SLIDES = 48
"""Of 20 to 40 tiles; half of them have much tumour."""


@dataclass(slots=True)
class Tally:
    """What was done: kills by the moment they came at, and runs that ended well."""

    kills: collections.Counter[str] = field(default_factory=collections.Counter)
    finished: int = 0

    @property
    def total(self) -> int:
        """All kills."""
        return sum(self.kills.values())


def main() -> int:
    """Print what was done; 0 if every run ended as it must."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="for slides and runs")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        tally = kill_until(Path(scratch), kills=given.kills, epochs=given.epochs, seed=given.seed)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(tally.kills.items()))
    print(f"{tally.total} kills ({counts}); {tally.finished} runs ended, weights and scores equal")
    return 0


def kill_until(
    scratch: Path, *, kills: int, epochs: int, seed: int, at_steps: bool = False
) -> Tally:
    """Kill and start again until there were so many; AssertionError where a run differs.

    With `at_steps` no kill comes before the run has gone on by a saved state.
    """
    store, labels = draw_slides(scratch)
    reference = scratch / "reference"
    begun = time.perf_counter()
    with _started(_command(store, labels, reference, epochs), reference) as run:
        run.join()
    assert run.exitcode == 0, _log(reference)
    longest = time.perf_counter() - begun
    expected, tally, rng = content(reference), Tally(), random.Random(seed)
    while tally.total < kills:
        out = scratch / f"killed_{tally.finished}"
        code = None
        while code != 0:
            with _started(_command(store, labels, out, epochs), out) as run:
                if tally.total < kills:
                    _kill(run, out, tally, rng, longest=None if at_steps else longest)
            code = run.exitcode
            assert code in (0, -signal.SIGKILL), _log(out)
        assert content(out) == expected, f"{out} differs"
        tally.finished += 1
        print(f"{tally.total} kills, {tally.finished} runs ended", file=sys.stderr)
    return tally


def draw_slides(scratch: Path) -> tuple[Path, Path]:
    """Store features of slides whose class goes with their share of tumour; their labels."""
    burdens = np.random.default_rng(0).uniform(0, 0.5, SLIDES)
    names = draw_stored(scratch / "features", burdens.tolist())
    table = pd.DataFrame({"slide_id": names, "label": np.where(burdens > 0.25, "much", "little")})
    table.to_csv(scratch / "labels.csv", index=False)
    return scratch / "features", scratch / "labels.csv"


def content(out: Path) -> dict[str, object]:
    """What a finished run holds, less its times; nothing may be left aside in it."""
    left = [str(path) for path in out.rglob("*") if is_aside(path)]
    assert not left, left
    model = torch.load(out / "model.ckpt", weights_only=True)
    states = {"model": model["state_dict"]} | {
        path.parent.name: torch.load(path, weights_only=True)["state_dict"]
        for path in sorted(out.glob("models/*/last.ckpt"))
    }
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["summary"].pop("seconds")
    for report in metrics["training"].values():
        report.pop("seconds")
        report["scores"].pop("seconds")
    tables = {path.parent.name: path.read_bytes() for path in out.glob("**/predictions.csv")}
    bits = {
        f"{network} {key}": value.numpy().tobytes()
        for network, state in states.items()
        for key, value in state.items()
    }
    tables.pop(out.name)  # the model's, once more
    return {"metrics": metrics, "metadata": model["metadata"], **tables, **bits}


def _kill(
    run: BaseProcess,
    out: Path,
    tally: Tally,
    rng: random.Random,
    *,
    longest: float | None,
) -> None:
    """Kill after one of the next states: a little later, or while the one after it is written.

    Where `longest` seconds are given, also at a random moment of as much.
    """
    chance = rng.random()
    if longest is not None and chance < 0.3:
        _wait(run, rng.uniform(0, longest))
    else:
        for _ in range(rng.randint(1, 6)):
            _wait_for_state(run, out)
        if chance < 0.6:
            _wait(run, rng.uniform(0, 0.15))
        else:
            while run.is_alive() and not _is_saving(out):
                time.sleep(0.0005)
    if not run.is_alive():
        return
    run.kill()
    run.join()
    tally.kills[_moment(out)] += 1


def _wait_for_state(run: BaseProcess, out: Path) -> None:
    before = _states(out)
    while run.is_alive() and _states(out) == before:
        time.sleep(0.001)


def _wait(run: BaseProcess, seconds: float) -> None:
    end = time.monotonic() + seconds
    while run.is_alive() and time.monotonic() < end:
        time.sleep(0.001)


def _states(out: Path) -> dict[str, int]:
    found = {}
    for path in out.glob("models/*/last.ckpt"):
        try:
            found[path.parent.name] = path.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


def _is_saving(out: Path) -> bool:
    """Tell whether a state is being written; with the process dead, whether it was."""
    return any(is_aside(path) for path in out.glob("models/*/*"))


def _moment(out: Path) -> str:
    """Name what the killed run was at."""
    if _is_saving(out):
        return "inside a save"
    if (out / "model.ckpt").exists():
        return "at the end"
    return f"in network {len(_states(out)) or 1}" if _states(out) else "before the first state"


def _command(store: Path, labels: Path, out: Path, epochs: int) -> list[str]:
    return [
        "train", f"features={store}", f"labels={labels}", f"out={out}", f"epochs={epochs}",
        "batch_size=4", "baselines=[abmil]", "model.dropout=0.2", "task.sampling=balanced",
        "augment.dihedral=true", "augment.translate=2", "augment.drop_tiles=0.1",
        "trainer.accumulate=2", "callbacks.save_seconds=0", "heatmaps=0", "logger=none",
    ]  # fmt: skip


@contextmanager
def _started(arguments: list[str], out: Path) -> Iterator[BaseProcess]:
    """Run the verb in a process of its own, forked from one that has imported everything."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["pipelines.pathology.train"])
    run = context.Process(target=_run, args=(arguments, Path(f"{out}.log")))
    run.start()
    yield run
    run.join()


def _run(arguments: list[str], log: Path) -> None:
    torch.set_num_threads(1)
    with log.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        sys.exit(run_verb("pathology", VERBS, arguments))


def _log(out: Path) -> str:
    return Path(f"{out}.log").read_text(errors="replace")[-3000:]


if __name__ == "__main__":
    raise SystemExit(main())
