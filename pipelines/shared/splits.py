"""Train, validation and test rows: stratified by label, whole groups (patients) in one split."""

import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from pipelines.shared.errors import InputError

SPLITS = ("train", "val", "test")
EXTERNAL = "external"
"""Rows of no fold: never trained on, chosen by or scored in one; an ensemble is scored on them."""

Scheme = Literal["kfold", "monte_carlo", "site", "external"]
SCHEMES: tuple[Scheme, ...] = ("kfold", "monte_carlo", "site", "external")
_NUM_LISTED = 20


@dataclass(frozen=True, slots=True)
class Rows:
    """What is known of the rows that are to be split.

    `strata` is what splits shall hold alike (labels, or whether the event was seen), `groups` what
    must stay whole (patients), `sites` where the rows come from. Rows with `external` are left out
    of every fold.
    """

    ids: Sequence[str]
    strata: Sequence[str]
    groups: Sequence[str]
    sites: Sequence[str] | None = None
    external: Sequence[bool] | None = None


def draw_folds(
    rows: Rows,
    *,
    scheme: Scheme,
    folds: int = 5,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> list[list[str]]:
    """Return for each fold the split of each row: train, val, test or external.

    kfold: every group is tested once; strata are balanced by scikit-learn's StratifiedGroupKFold.
    monte_carlo: `test_fraction` of the groups of each stratum, drawn anew for each fold.
    site: as kfold, with whole sites in place of groups, so that no model is tested at a site that
    it has seen; folds are as alike as the greedy balancing of the strata makes them. Preserving
    sites is due to Howard et al., Nature Communications 2021, who balance by quadratic programming.
    external: one fold, tested on the external rows.
    Validation is `val_fraction` of the groups that are not tested, drawn by stratum. Equal seeds
    and rows, in any order, give equal splits. Raises InputError for rows that cannot be split so.
    """
    _check_fractions(val_fraction, test_fraction)
    if folds < 2 and scheme in ("kfold", "site"):
        raise InputError(f"folds={folds}: {scheme} needs at least 2; give folds=5")
    if folds < 1:
        raise InputError(f"folds={folds}: give at least 1")
    _require_one_external_side(rows)
    held_out = rows.external or [False] * len(rows.ids)
    order = sorted(
        (row for row, out in enumerate(held_out) if not out),
        key=lambda row: (rows.groups[row], rows.ids[row]),
    )
    tested = _draw_tests(rows, order, scheme, folds, test_fraction, seed)
    found = []
    for number, test in enumerate(tested):
        splits = [EXTERNAL if out and scheme != "external" else "test" for out in held_out]
        rest = [row for row in order if row not in test]
        parts = _draw(
            [rows.strata[row] for row in rest],
            [rows.groups[row] for row in rest],
            {"val": val_fraction},
            seed=(seed, number),
        )
        for row, split in zip(rest, parts, strict=True):
            splits[row] = split
        known = [row for row, out in enumerate(held_out) if not out or scheme == "external"]
        _require_classes([rows.strata[row] for row in known], [splits[row] for row in known])
        found.append(splits)
    return found


def require_no_leak(
    ids: Sequence[str],
    groups: Sequence[str],
    splits: Sequence[str],
    *,
    contents: Mapping[str, str] | None = None,
) -> None:
    """Raise InputError, with the ids, for whatever stands on two sides of a split.

    That is an id that stands twice, a group in two splits, and, where digests of their `contents`
    are known by id, rows of equal content in two splits.
    """
    repeated = [name for name, count in Counter(ids).items() if count > 1]
    if repeated:
        raise InputError(
            f"{len(repeated)} ids stand more than once: {_listed(repeated)}; keep one row per id"
        )
    _require_whole(ids, groups, splits, "group", "keep all rows of a group in one split")
    known = [row for row, name in enumerate(ids) if contents and name in contents]
    _require_whole(
        [ids[row] for row in known],
        [(contents or {})[ids[row]] for row in known],
        [splits[row] for row in known],
        "content",
        "these are copies of each other: drop one, or give them the same group",
    )


def assign_splits(
    *,
    ids: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[str],
    given: Sequence[str] | None = None,
    val_fraction: float = 0.2,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> list[str]:
    """Return `train`, `val` or `test` for each row; the same seed and rows give the same splits.

    A `given` split column is honoured; where it names no `val` row, `val_fraction` of its training
    groups are taken. Raises InputError for other words in it, a group in two splits, and classes
    or splits that are missing where they are needed.
    """
    _check_fractions(val_fraction, test_fraction)
    if given is None:
        fractions = {"test": test_fraction, "val": val_fraction}
        splits = _draw(labels, groups, fractions, seed=seed)
    else:
        splits = _honour(ids, labels, groups, given, val_fraction=val_fraction, seed=seed)
    _require_classes(labels, splits)
    return splits


def _check_fractions(val_fraction: float, test_fraction: float) -> None:
    if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
        raise InputError(
            "val_fraction and test_fraction must be above 0 and together below 1; "
            f"got {val_fraction} and {test_fraction}"
        )


def _draw_tests(
    rows: Rows, order: list[int], scheme: Scheme, folds: int, test_fraction: float, seed: int
) -> list[set[int]]:
    """Test rows of each fold, of the rows in `order`."""
    strata = [rows.strata[row] for row in order]
    groups = [rows.groups[row] for row in order]
    if scheme == "external":
        if not rows.external or not any(rows.external):
            raise InputError("scheme=external needs external rows: give external.COLUMN=VALUE")
        return [set()]
    if scheme == "monte_carlo":
        drawn = [
            _draw(strata, groups, {"test": test_fraction}, seed=(seed, fold, 1))
            for fold in range(folds)
        ]
        return [{order[at] for at, s in enumerate(splits) if s == "test"} for splits in drawn]
    if scheme == "site":
        groups = _sites_of(rows, order)
    else:
        _require_groups_for_folds(strata, groups, folds)
    if len(set(groups)) < folds:
        kind = "sites" if scheme == "site" else "groups"
        raise InputError(
            f"folds={folds}, and there are {len(set(groups))} {kind}; give fewer folds"
        )
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # strata smaller than folds: sites may be so
        parts = [test for _, test in splitter.split(np.zeros(len(order)), strata, groups)]
    return [{order[at] for at in test} for test in parts]


def _sites_of(rows: Rows, order: list[int]) -> list[str]:
    if rows.sites is None:
        raise InputError("scheme=site needs the column that says where a row comes from: site=NAME")
    found: dict[str, set[str]] = defaultdict(set)
    for row in order:
        found[rows.groups[row]].add(rows.sites[row])
    torn = [
        f"{group} ({', '.join(sorted(sites))})" for group, sites in found.items() if len(sites) > 1
    ]
    if torn:
        raise InputError(f"{len(torn)} groups come from more than one site: {_listed(torn)}")
    return [rows.sites[row] for row in order]


def _require_groups_for_folds(strata: Sequence[str], groups: Sequence[str], folds: int) -> None:
    held: dict[str, set[str]] = defaultdict(set)
    for stratum, group in zip(strata, groups, strict=True):
        held[stratum].add(group)
    few = {stratum: len(members) for stratum, members in held.items() if len(members) < folds}
    if few:
        stratum, count = min(few.items(), key=lambda item: item[1])
        raise InputError(
            f"folds={folds}, and {f'{stratum!r} has' if stratum else 'there are'} {count} groups: "
            f"not every fold could be tested on {'it' if stratum else 'some'}; give "
            f"folds={max(2, count)} or scheme=monte_carlo"
        )


def _require_one_external_side(rows: Rows) -> None:
    if rows.external is None:
        return
    sides = [EXTERNAL if out else "the folds" for out in rows.external]
    _require_whole(
        rows.ids, rows.groups, sides, "group", "an external test needs groups of its own"
    )
    if all(rows.external):
        raise InputError("all rows are external; none is left to train on")


def _honour(
    ids: Sequence[str],
    labels: Sequence[str],
    groups: Sequence[str],
    given: Sequence[str],
    *,
    val_fraction: float,
    seed: int,
) -> list[str]:
    for name, split in zip(ids, given, strict=True):
        if split not in SPLITS:
            raise InputError(
                f"split of {name!r} is {split!r}; use train, val or test for every row, or drop "
                "the column to have the rows split at random"
            )
    require_no_leak(ids, groups, given)
    for needed in ("train", "test"):
        if needed not in given:
            raise InputError(f"no row has split {needed!r}; give some, or drop the split column")
    if "val" in given:
        return list(given)
    rows = [row for row, split in enumerate(given) if split == "train"]
    drawn = _draw(
        [labels[row] for row in rows],
        [groups[row] for row in rows],
        {"val": val_fraction},
        seed=seed,
    )
    splits = list(given)
    for row, split in zip(rows, drawn, strict=True):
        splits[row] = split
    return splits


def _draw(
    labels: Sequence[str],
    groups: Sequence[str],
    fractions: Mapping[str, float],
    *,
    seed: int | tuple[int, ...],
) -> list[str]:
    """Shuffle the groups of each stratum and deal them out; what remains is `train`.

    A group's stratum is its most frequent label. A stratum that can spare one group for each split
    gives at least one.
    """
    labels_of: dict[str, Counter[str]] = defaultdict(Counter)
    for label, group in zip(labels, groups, strict=True):
        labels_of[group][label] += 1
    strata: dict[str, list[str]] = defaultdict(list)
    for group in sorted(labels_of):
        strata[max(sorted(labels_of[group]), key=labels_of[group].__getitem__)].append(group)
    generator = np.random.default_rng(seed)
    split_of: dict[str, str] = {}
    for label in sorted(strata):
        members = [strata[label][index] for index in generator.permutation(len(strata[label]))]
        for split, fraction in fractions.items():
            wanted = max(1, round(fraction * len(strata[label])))
            spare = max(0, len(members) - 1)  # one stays in train
            for group in members[: min(wanted, spare)]:
                split_of[group] = split
            members = members[min(wanted, spare) :]
    return [split_of.get(group, "train") for group in groups]


def _require_whole(
    ids: Sequence[str], groups: Sequence[str], splits: Sequence[str], kind: str, remedy: str
) -> None:
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, group, split in zip(ids, groups, splits, strict=True):
        members[group][split].append(name)
    torn = {group: parts for group, parts in members.items() if len(parts) > 1}
    if not torn:
        return
    lines = [
        f"  {kind} {group!r}: "
        + "; ".join(f"{split}: {_listed(names)}" for split, names in parts.items())
        for group, parts in list(torn.items())[:_NUM_LISTED]
    ]
    more = f"\n  and {len(torn) - _NUM_LISTED} more" if len(torn) > _NUM_LISTED else ""
    raise InputError(
        f"{len(torn)} {kind}s stand in more than one split:\n"
        + "\n".join(lines)
        + more
        + f"\n{remedy}"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_LISTED])
    return f"{shown} and {len(names) - _NUM_LISTED} more" if len(names) > _NUM_LISTED else shown


def _require_classes(labels: Sequence[str], splits: Sequence[str]) -> None:
    counts = Counter(zip(labels, splits, strict=True))
    for split in SPLITS:
        missing = [label for label in sorted(set(labels)) if not counts[label, split]]
        if split == "train" and missing:
            raise InputError(
                f"no training row has the label {missing[0]!r}; every class needs rows in train"
            )
        if len(missing) == len(set(labels)):
            raise InputError(
                f"no row is left for {split}: {len(labels)} rows are too few to split; add rows, "
                "or give a split column (train, val, test)"
            )
