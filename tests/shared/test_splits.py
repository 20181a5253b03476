from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from pipelines.shared.errors import InputError
from pipelines.shared.splits import Rows, Scheme, assign_splits, draw_folds, require_no_leak


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
        (["train", "train", "val", "test"], "abac", "group 'a': train: a; val: c"),
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


def _table(count: int = 60, sites: int = 6) -> Rows:
    """Two rows per group; groups of a stratum and of a site are mixed."""
    groups = [f"p{row // 2:02d}" for row in range(count)]
    return Rows(
        ids=[f"s{row}" for row in range(count)],
        strata=["ab"[int(group[1:]) % 2] for group in groups],
        groups=groups,
        sites=[f"site{int(group[1:]) % sites}" for group in groups],
    )


def _tested(rows: Rows, folds: list[list[str]], what: str) -> list[set[str]]:
    values = getattr(rows, what)
    return [
        {value for value, split in zip(values, splits, strict=True) if split == "test"}
        for splits in folds
    ]


def test_kfold_tests_every_group_once_and_keeps_it_whole() -> None:
    rows = _table()

    folds = draw_folds(rows, scheme="kfold", folds=5)

    tested = _tested(rows, folds, "groups")
    assert sum(map(len, tested)) == 30
    assert set.union(*tested) == set(rows.groups)
    for splits in folds:
        require_no_leak(rows.ids, rows.groups, splits)
        assert Counter(splits)["test"] == 12
        shares = Counter(zip(rows.strata, splits, strict=True))
        assert shares["a", "test"] == shares["b", "test"] == 6
        assert shares["a", "val"] == shares["b", "val"] == 4


@pytest.mark.parametrize("scheme", ["kfold", "monte_carlo", "site"])
def test_folds_do_not_depend_on_the_order_of_rows(scheme: Scheme) -> None:
    rows = _table()
    backwards = Rows(rows.ids[::-1], rows.strata[::-1], rows.groups[::-1], (rows.sites or [])[::-1])

    first = draw_folds(rows, scheme=scheme, folds=3, seed=4)

    assert first == [
        splits[::-1] for splits in draw_folds(backwards, scheme=scheme, folds=3, seed=4)
    ]
    assert first != draw_folds(rows, scheme=scheme, folds=3, seed=5)


def test_monte_carlo_draws_each_fold_anew() -> None:
    rows = _table()

    folds = draw_folds(rows, scheme="monte_carlo", folds=8, test_fraction=0.2)

    tested = _tested(rows, folds, "groups")
    assert [len(groups) for groups in tested] == [6] * 8
    assert len({frozenset(groups) for groups in tested}) > 4
    assert sum(map(len, tested)) > len(set.union(*tested))


def test_a_site_is_tested_in_one_fold_and_trained_on_in_no_other_place() -> None:
    rows = _table()

    folds = draw_folds(rows, scheme="site", folds=3)

    tested = _tested(rows, folds, "sites")
    assert sum(map(len, tested)) == 6
    for splits, sites in zip(folds, tested, strict=True):
        inside = {s for s, split in zip(rows.sites or [], splits, strict=True) if split != "test"}
        assert not sites & inside


def test_external_rows_are_in_no_fold() -> None:
    rows = replace(_table(), external=[row >= 50 for row in range(60)])

    for splits in draw_folds(rows, scheme="kfold", folds=4):
        assert splits[50:] == ["external"] * 10
        assert "external" not in splits[:50]
    fixed = draw_folds(rows, scheme="external")
    assert len(fixed) == 1
    assert fixed[0][50:] == ["test"] * 10
    assert set(fixed[0][:50]) == {"train", "val"}


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"sites": None}, {"scheme": "site"}, "site=NAME"),
        ({}, {"scheme": "site", "folds": 7}, "there are 6 sites"),
        ({"sites": [f"x{row}" for row in range(60)]}, {"scheme": "site"}, "p00 (x0, x1)"),
        ({"strata": ["a"] * 56 + ["b"] * 4}, {"scheme": "kfold"}, "'b' has 2 groups"),
        ({}, {"scheme": "kfold", "folds": 1}, "at least 2"),
        ({}, {"scheme": "external"}, "needs external rows"),
        ({"external": [row == 1 for row in range(60)]}, {"scheme": "kfold"}, "group 'p00'"),
        ({"external": [True] * 60}, {"scheme": "kfold"}, "none is left"),
    ],
)
def test_folds_that_cannot_be_are_refused(
    changes: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        draw_folds(replace(_table(), **changes), **options)

    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "groups", "contents", "words"),
    [
        (["a", "b", "a"], ["p", "q", "p"], {}, "1 ids stand more than once: a"),
        (["a", "b", "c"], ["p", "q", "p"], {}, "group 'p': train: a; test: c"),
        (["a", "b", "c"], ["p", "q", "r"], {"a": "x", "c": "x"}, "train: a; test: c"),
    ],
)
def test_a_leak_is_an_error_that_lists_ids(
    ids: list[str], groups: list[str], contents: dict[str, str], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        require_no_leak(ids, groups, ["train", "val", "test"], contents=contents)

    assert words in str(caught.value)
