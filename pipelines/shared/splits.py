"""Train, validation and test rows: stratified by label, whole groups (patients) in one split."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from pipelines.shared.errors import InputError

SPLITS = ("train", "val", "test")


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
    if not (0 < val_fraction < 1 and 0 < test_fraction < 1 and val_fraction + test_fraction < 1):
        raise InputError(
            "val_fraction and test_fraction must be above 0 and together below 1; "
            f"got {val_fraction} and {test_fraction}"
        )
    if given is None:
        fractions = {"test": test_fraction, "val": val_fraction}
        splits = _draw(labels, groups, fractions, seed=seed)
    else:
        splits = _honour(ids, labels, groups, given, val_fraction=val_fraction, seed=seed)
    _require_classes(labels, splits)
    return splits


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
    _require_whole_groups(ids, groups, given)
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
    labels: Sequence[str], groups: Sequence[str], fractions: Mapping[str, float], *, seed: int
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


def _require_whole_groups(ids: Sequence[str], groups: Sequence[str], splits: Sequence[str]) -> None:
    members: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, group, split in zip(ids, groups, splits, strict=True):
        members[group][split].append(name)
    torn = {group: parts for group, parts in members.items() if len(parts) > 1}
    if torn:
        group, parts = next(iter(torn.items()))
        where = "; ".join(f"{split}: {', '.join(names)}" for split, names in parts.items())
        more = f" ({len(torn) - 1} more groups are torn too)" if len(torn) > 1 else ""
        raise InputError(
            f"group {group!r} stands in {len(parts)} splits ({where}){more}; "
            "keep all rows of a group in one split"
        )


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
