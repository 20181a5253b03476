"""Cases to predictions: what is computed together, and what happens where that fails."""

from pathlib import Path

import pytest
import torch

from pipelines.pathology import sequences
from pipelines.pathology.model import SlideClassifier
from pipelines.pathology.scale import make_bag
from pipelines.pathology.sequences import Predicted, predict_cases
from pipelines.pathology.store import slide_folder
from pipelines.shared.tables import Failure

SIZES = (30, 40, 25, 120, 10, 20)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for tiles in SIZES:
        make_bag(tmp_path, tiles, num_features=8, seed=0)
    return tmp_path


class Watched:
    """Take `predict`'s place: note how many tiles come together, with memory for `room` of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int = 10**6) -> None:
        self.groups: list[list[int]] = []
        self.room, self.real = room, sequences.predict
        monkeypatch.setattr(sequences, "predict", self)

    def __call__(self, network, examples, **options):  # type: ignore[no-untyped-def]
        self.groups.append(examples.lengths)
        if sum(examples.lengths) > self.room:
            raise torch.OutOfMemoryError("no room\nat all")
        return self.real(network, examples, **options)


def run(store: Path, *, ids=SIZES, **options) -> list[Predicted | Failure]:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    network = SlideClassifier(
        num_features=8, num_classes=2, dim=16, depth=1, num_heads=2,
        pattern="SlidingWindow(radius=2) | GlobalTokens(first=1)",
    )  # fmt: skip
    cases = [(f"case {n}", (f"tissue_{n}",)) for n in ids]
    settings = {"by_patient": False, "ahead": True, "explain": False, "max_tokens": 100}
    return list(predict_cases(network, cases, store, **(settings | options)))


def test_small_cases_are_computed_together_and_say_the_same(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    together = run(store)
    assert watched.groups == [[30, 40, 25], [120], [10, 20]]
    for options in ({"explain": True}, {"ahead": False}):
        watched.groups.clear()
        alone = run(store, **options)
        assert watched.groups == [[n] for n in SIZES]
        for one, other in zip(together, alone, strict=True):
            assert isinstance(one, Predicted)
            assert isinstance(other, Predicted)
            assert (one.name, one.lengths) == (other.name, other.lengths)
            torch.testing.assert_close(one.prediction.logits, other.prediction.logits)
            torch.testing.assert_close(one.prediction.attention, other.prediction.attention)


def test_what_does_not_fit_together_is_computed_alone(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch, room=50)
    found = run(store)
    assert watched.groups == [[30, 40, 25], [30], [40], [25], [120], [10, 20]]
    assert [isinstance(item, Failure) for item in found] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]
    failure = found[3]
    assert isinstance(failure, Failure)
    assert (failure.id, failure.status) == ("case 120", "memory")
    assert "120 tiles do not fit the memory (no room)" in failure.reason


def test_results_keep_their_order_around_a_damaged_one(store: Path) -> None:
    for chunk in (slide_folder(store, "tissue_40") / "features").rglob("c/*/*"):
        chunk.write_bytes(b"short")
    found = run(store)
    names = [item.id if isinstance(item, Failure) else item.name for item in found]
    assert names == [f"case {n}" for n in SIZES]
    assert [isinstance(item, Failure) for item in found].index(True) == 1
