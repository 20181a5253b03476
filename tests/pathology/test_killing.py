"""Killed runs go on: a few kills always, many by `tests.benchmarks.killing`, `kill_training`."""

import sys
from pathlib import Path

import pytest

from tests.benchmarks.kill_training import kill_until as kill_training
from tests.benchmarks.killing import kill_until
from tests.benchmarks.large_slide import write_slide


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_a_run_that_is_killed_and_started_again_ends_with_the_same_store(tmp_path: Path) -> None:
    for number in range(3):
        write_slide(tmp_path / "slides" / f"slide_{number}.tiff", side=768 + 128 * number)
    tally = kill_until(
        tmp_path / "slides", tmp_path, kills=2, inside=1, seed=0, workers=1, kinds=["all"]
    )
    assert tally.total >= 2
    assert tally.inside_write >= 1


def test_a_training_that_is_killed_and_started_again_ends_with_equal_bits(tmp_path: Path) -> None:
    tally = kill_training(tmp_path, kills=3, epochs=8, seed=0, at_steps=True)
    assert tally.total >= 3
    assert sum(count for kind, count in tally.kills.items() if kind != "at the end") >= 2
