from collections import Counter

import pytest

from pipelines.shared.errors import InputError
from pipelines.shared.splits import assign_splits


def _rows(count: int, per_group: int = 2) -> dict[str, list[str]]:
    return {
        "ids": [f"s{i}" for i in range(count)],
        "labels": ["ab"[(i // per_group) % 2] for i in range(count)],
        "groups": [f"p{i // per_group}" for i in range(count)],
    }


def test_splits_are_stratified_and_keep_groups_whole() -> None:
    rows = _rows(200)

    splits = assign_splits(**rows, val_fraction=0.2, test_fraction=0.3)

    assert Counter(splits) == {"train": 100, "val": 40, "test": 60}
    assert Counter(zip(rows["labels"], splits, strict=True))["a", "test"] == 30
    assert len(set(zip(rows["groups"], splits, strict=True))) == 100


def test_a_seed_repeats_the_splits_and_row_order_does_not_matter() -> None:
    rows = _rows(80)
    backwards = {key: values[::-1] for key, values in rows.items()}

    assert assign_splits(**rows, seed=1) == assign_splits(**rows, seed=1)
    assert assign_splits(**rows, seed=1) == assign_splits(**backwards, seed=1)[::-1]
    assert assign_splits(**rows, seed=1) != assign_splits(**rows, seed=2)


def test_groups_of_mixed_labels_stay_whole() -> None:
    splits = assign_splits(
        ids=[str(i) for i in range(40)],
        labels=["a", "b"] * 20,
        groups=[f"pair{i // 2}" for i in range(40)],
    )

    assert splits[::2] == splits[1::2]
    assert set(splits) == {"train", "val", "test"}


@pytest.mark.parametrize("count", [3, 4, 7])
def test_few_groups_give_each_split_one(count: int) -> None:
    rows = _rows(2 * count, per_group=1)

    splits = assign_splits(**rows, val_fraction=0.1, test_fraction=0.1)

    assert len(set(zip(rows["labels"], splits, strict=True))) == 6


def test_a_given_split_is_honoured() -> None:
    given = ["train", "train", "val", "test", "train", "test"]
    rows = {"ids": list("abcdef"), "labels": list("xyxyxx"), "groups": list("abcdef")}

    assert assign_splits(**rows, given=given) == given


def test_a_given_split_without_val_takes_it_from_train() -> None:
    rows = _rows(40, per_group=1)
    given = ["train"] * 30 + ["test"] * 10

    splits = assign_splits(**rows, given=given, val_fraction=0.2)

    assert splits[30:] == ["test"] * 10
    assert Counter(splits[:30]) == {"train": 24, "val": 6}


@pytest.mark.parametrize(
    ("given", "groups", "words"),
    [
        (["train", "dev", "val", "test"], "abcd", "split of 'b' is 'dev'; use train, val or test"),
        (["train", "", "val", "test"], "abcd", "split of 'b' is ''"),
        (["train", "train", "val", "test"], "abac", "'a' stands in 2 splits (train: a; val: c)"),
        (["train", "train", "val", "val"], "abcd", "no row has split 'test'"),
        (["train", "val", "val", "test"], "abcd", "no training row has the label 'y'"),
    ],
)
def test_a_wrong_split_column_is_refused(given: list[str], groups: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        assign_splits(ids=list("abcd"), labels=list("xyxy"), groups=list(groups), given=given)

    assert words in str(caught.value)


def test_too_few_rows_and_odd_fractions_are_refused() -> None:
    with pytest.raises(InputError, match="too few to split"):
        assign_splits(ids=["a", "b"], labels=["x", "y"], groups=["a", "b"])
    with pytest.raises(InputError, match="below 1"):
        assign_splits(**_rows(20), val_fraction=0.6, test_fraction=0.5)
