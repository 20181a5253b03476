import pytest
import torch

from pipelines.shared.batch import Example, ExampleList, TokenBudgetBatches, pack


def _example(length: int, target: int | None = 0, name: str = "a") -> Example:
    coords = torch.arange(length)[:, None]
    return Example(torch.full((length, 2), float(length)), coords, target, name, "p", 0)


def test_pack_lays_sequences_end_to_end() -> None:
    batch = pack([_example(2, 1, "a"), _example(3, 0, "b")])

    assert batch.inputs[:, 0].tolist() == [2, 2, 3, 3, 3]
    assert batch.coords[:, 0].tolist() == [0, 1, 0, 1, 2]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.targets is not None
    assert batch.targets.tolist() == [1, 0]
    assert batch.ids == ("a", "b")


def test_pack_without_targets_has_none() -> None:
    assert pack([_example(2, None)]).targets is None


@pytest.mark.parametrize(
    ("examples", "words"),
    [
        ([], "at least one"),
        ([_example(0)], "0 tokens"),
        ([_example(2), _example(2, None)], "1 of 2 targets"),
    ],
)
def test_pack_refuses_what_is_no_batch(examples: list[Example], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pack(examples)


def test_moving_a_batch_keeps_lengths_on_the_host() -> None:
    moved = pack([_example(2)]).to("meta")

    assert moved.inputs.device.type == moved.coords.device.type == "meta"
    assert moved.lengths.device.type == "cpu"


def test_example_list_slices_and_knows_lengths() -> None:
    examples = ExampleList([_example(2), _example(3), _example(4)])

    assert examples.lengths == [2, 3, 4]
    assert examples[1:].lengths == [3, 4]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("epoch", [0, 5])
def test_every_example_comes_once_within_the_budget(shuffle: bool, epoch: int) -> None:
    lengths = [1 + (7 * index) % 13 for index in range(101)] + [50]
    batches = TokenBudgetBatches(lengths, 20, shuffle=shuffle, seed=3)
    batches.set_epoch(epoch)

    drawn = list(batches)

    assert sorted(index for batch in drawn for index in batch) == list(range(len(lengths)))
    assert [101] in drawn
    assert all(sum(lengths[i] for i in batch) <= 20 for batch in drawn if batch != [101])
    assert len(drawn) == len(batches)


def test_epochs_differ_and_repeat() -> None:
    batches = TokenBudgetBatches([1] * 30, 4, shuffle=True, seed=1)
    first = list(batches)
    batches.set_epoch(1)
    second = list(batches)
    batches.set_epoch(0)

    assert first != second
    assert list(batches) == first


def test_unshuffled_batches_keep_the_order() -> None:
    assert list(TokenBudgetBatches([2, 2, 3, 9, 1], 5)) == [[0, 1], [2], [3], [4]]


def test_ranks_share_all_batches_and_take_as_many_steps() -> None:
    lengths = [3] * 25
    ranks = [TokenBudgetBatches(lengths, 7, shuffle=True, rank=r, num_ranks=4) for r in range(4)]

    assert len({len(rank) for rank in ranks}) == 1
    assert {i for rank in ranks for batch in rank for i in batch} == set(range(25))


def test_more_ranks_than_batches_repeat_them() -> None:
    ranks = [list(TokenBudgetBatches([1, 1], 1, rank=r, num_ranks=5)) for r in range(5)]

    assert all(len(rank) == 1 for rank in ranks)


def test_no_examples_are_no_batches() -> None:
    assert list(TokenBudgetBatches([], 5, num_ranks=1)) == []
