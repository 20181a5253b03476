import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparse_core.patterns import Causal, GlobalTokens, Hierarchical, Pattern, Routed, SlidingWindow
from sparse_core.recall import __main__ as recall
from sparse_core.recall.task import Task, make_batch
from sparse_core.recall.training import Recaller, Settings, keys_per_query, train
from tests.benchmarks.routing import compare

TINY = Settings(
    Task(128, (16, 64), per_distance=2, num_values=4),
    dim=32, heads=1, batch=2, steps=2, lr=5e-3, seeds=2, eval_batches=1,
)  # fmt: skip


def test_questions_ask_for_pairs_at_the_distances_named() -> None:
    task = Task(400, (8, 32, 128), per_distance=5, num_values=4)
    batch = make_batch(task, 50, torch.Generator().manual_seed(0))
    distance = batch.question_at - batch.pair_at
    furthest = torch.tensor(task.distances).repeat_interleave(5)
    assert (distance <= furthest).all()
    assert (distance > furthest * 7 // 8 - 1).all()
    assert int(batch.pair_at.min()) >= 0
    assert int(batch.question_at.max()) < 400
    assert all(len(set(keys.tolist())) == 15 for keys in batch.key)
    for row in range(50):
        taken = torch.cat([batch.pair_at[row], batch.question_at[row]]).tolist()
        for question, fair in enumerate(batch.fair[row].tolist()):
            places = [taken[question], taken[question + 15]]
            assert fair == all(taken.count(place) == 1 for place in places)
    assert 0.5 < float(batch.fair.float().mean()) < 1


@pytest.mark.parametrize(("radius", "reached"), [(3, []), (8, [True, True, False, False])])
def test_values_beyond_reach_change_no_answer(radius: int, reached: list[bool]) -> None:
    """Two layers carry a value twice as far as one; sequences see nothing of each other."""
    torch.manual_seed(0)
    model = Recaller(TINY, SlidingWindow(radius)).eval()
    batch = make_batch(TINY.task, 2, torch.Generator().manual_seed(1))
    layouts = model.layouts(2)
    before = model(batch, layouts)
    batch.value[1] = (batch.value[1] + 1) % 4
    changed = (model(batch, layouts) != before).any(-1)
    assert not changed[0].any()
    assert changed[1].tolist() == (reached or [False] * 4)


def test_cost_counts_keys_of_a_query() -> None:
    for text, least, most in (
        ("Dense()", 128, 128),
        ("SlidingWindow(3)", 7, 3 * 32),
        ("Hierarchical(8)", 24, 256),
        ("Routed(16, top=2)", 2 * 16 + 16, 5 * 16),
    ):
        model = Recaller(TINY, Pattern.parse(text))
        assert least <= keys_per_query(model.layouts(2)[0]) <= most


def test_global_tokens_stand_before_the_sequence() -> None:
    model = Recaller(TINY, SlidingWindow(3) | GlobalTokens(5))
    assert model.registers.shape == (5, 32)
    assert model.layouts(2)[0].query_coords.shape[0] == 2 * (5 + 128)


def test_a_run_is_repeatable() -> None:
    pattern = Hierarchical(8) & Causal()
    results = [train(pattern, TINY, 3, report=lambda _: None) for _ in range(2)]
    assert replace(results[0], seconds_per_step=0) == replace(results[1], seconds_per_step=0)


@pytest.mark.parametrize("seed", range(3))
def test_routing_beats_random_choice(seed: int) -> None:
    task = Task(256, (8, 64, 128), per_distance=4, num_values=4)
    settings = Settings(
        task, dim=48, heads=1, batch=8, steps=30, lr=8e-3, seeds=1, eval_batches=2
    )  # fmt: skip
    routed, random = compare(Routed(16, top=2), settings, seed)
    assert routed.accuracy["8"] > 0.9
    assert random.accuracy["8"] > 0.9
    for distance in ("64", "128"):
        assert routed.accuracy[distance] > random.accuracy[distance] + 0.1


def test_runs_go_on_where_they_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patterns = {"window": "SlidingWindow(3)", "few": "Dense() | GlobalTokens(2)"}
    trained = []

    def stopping(pattern: Pattern, settings: Settings, seed: int, **rest: object) -> object:
        trained.append((str(pattern), seed))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return train(pattern, settings, seed, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(recall, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        recall.run_all(patterns, TINY, tmp_path, "cpu", only=patterns)
    recall.run_all(patterns, TINY, tmp_path, "cpu", only=patterns)
    assert trained[3] == trained[4]
    assert len(trained) == 5
    more = {**patterns, "causal": "Causal()"}
    found = recall.run_all(more, TINY, tmp_path, "cpu", only=())
    assert len(trained) == 5
    assert [[r.seed for r in results] for results in found.values()] == [[0, 1], [0, 1]]
    table = (tmp_path / "recall.md").read_text().splitlines()
    assert "of 128 tokens, 2 steps. Guessing gives 0.250" in table[0]
    cells = [line.replace(r"\|", "").count("|") for line in table[2:]]
    assert cells == [6] * 4
    assert (tmp_path / "recall.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="of other settings; give another --out"):
        recall.run_all(patterns, replace(TINY, lr=1e-3), tmp_path, "cpu", only=patterns)
    assert "seed 1: step 2, loss" in capsys.readouterr().out


def test_the_command_names_what_it_does_not_know(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        recall.main(["--out", str(tmp_path), "--only", "nothing"])
    assert stopped.value.code == 2
    assert "window + global" in capsys.readouterr().err


def test_the_command_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recall, "SMALL", TINY)
    arguments = ["--small", "--out", str(tmp_path), "--only", "window", "--seeds", "1"]
    assert recall.main([*arguments, "--steps", "1"]) == 0
    assert "| window: `SlidingWindow(radius=8)` |" in capsys.readouterr().out
    assert json.loads((tmp_path / "results" / "window-0.json").read_text())["seed"] == 0
    assert recall.main(arguments) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [recall.LARGE, recall.SMALL], ids=["large", "small"])
def test_sizes_fit_together(sizes: Settings) -> None:
    assert sizes.task.num_keys <= 3 * sizes.dim // 8
    assert sizes.task.num_values < sizes.dim // 4
    assert max(sizes.task.distances) < sizes.task.length
    patterns = recall.LARGE_PATTERNS if sizes is recall.LARGE else recall.SMALL_PATTERNS
    assert set(recall.ON_REQUEST) <= set(patterns)
    for text in patterns.values():
        Pattern.parse(text)
