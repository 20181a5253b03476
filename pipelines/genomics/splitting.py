"""`split`: items into train, val and test, and nothing that overlaps in two of them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Int64
from numpy import ndarray

from pipelines.genomics.collection import PLACE, Collection, collect
from pipelines.genomics.duplicates import (
    POLICIES,
    Chosen,
    Policy,
    find_copies,
    require_apart,
    settle_copies,
)
from pipelines.genomics.ingest import require_input
from pipelines.genomics.leaks import PAIRS, overlaps
from pipelines.genomics.similarity import MAX_K, cluster_records
from pipelines.shared.errors import InputError
from pipelines.shared.record import RunState, finish_run, make_folder, open_run
from pipelines.shared.splits import SPLITS, assign_splits
from pipelines.shared.tables import align, write_failures, write_table

By = Literal["record", "group", "cluster", "chromosome", "given"]
WAYS = get_args(By)

_NUM_SHOWN = 8


def split(config: dict[str, Any]) -> int:
    """Write splits.tsv; 0, or 3 if some items have no partner and were left out."""
    _check(config)
    out = Path(config["out"])
    if not config["dry_run"]:
        make_folder(out)
        if open_run(out, config) is RunState.FINISHED:
            print(f"{out / 'splits.tsv'} is there already; give another out= to split again")
            return 0
    collection = collect(config, out, require_labels=False)
    for note in collection.notes:
        print(f"note: {note}")
    collection = grouped(collection, config)
    found = keep_apart(collection, config["overlap"])
    splits = assign(found.collection, config, stratify=config["stratify"])
    table = found.collection.table.assign(split=splits)
    for note in found.notes:
        print(f"note: {note}")
    text = describe(table, labels=config["stratify"])
    print(text)
    if config["dry_run"]:
        print("dry run: no splits are written")
        return 0
    columns = [name for name in ("id", "split", "group", "label") if name in table]
    write_table(out / "splits.tsv", table[columns])
    write_table(out / "duplicates.csv", found.table)
    write_failures(out / "failures.csv", collection.failures, id_column="id")
    counts = {name: int((table["split"] == name).sum()) for name in SPLITS}
    finish_run(out, {"items": len(table), **counts})
    print(f"splits       {out / 'splits.tsv'} (train and inspect take it as splits=)")
    return 3 if collection.failures else 0


class Settled:
    """Items whose overlaps were dealt with, and what became of them."""

    def __init__(self, collection: Collection, table: pd.DataFrame, notes: list[str]) -> None:
        self.collection, self.table, self.notes = collection, table, notes


def keep_apart(collection: Collection, policy: Policy) -> Settled:
    """Keep what overlaps out of different splits, as `policy` says: error, remove or allow.

    Items overlap if they are copies (on either strand) or, being intervals, share a base. See
    `settle_copies` for the policies; overlapping intervals are treated as copies are, but that
    none is removed where no splits are given: then they share a group.
    """
    chosen = _choose(collection)
    copies = find_item_copies(collection)
    settled = settle_copies(copies, chosen, policy)
    kept = collection.take(settled.kept)
    kept = replace(kept, table=kept.table.assign(group=settled.groups))
    notes = list(settled.notes)
    if policy != "allow" and set(PLACE) <= set(kept.table):
        kept, more = _keep_places_apart(kept, policy)
        notes += more
    return Settled(kept, settled.table, notes)


def find_item_copies(collection: Collection) -> list[list[int]]:
    """List the items of equal bases on either strand; without sequence, those of equal places."""
    if collection.store is not None:
        return find_copies(collection.store, collection.records)
    columns = ["contig", "start", "end"]
    places = collection.table[columns].reset_index(drop=True)
    repeated = places[places.duplicated(keep=False)]
    rows = repeated.index.to_numpy()
    found = repeated.reset_index(drop=True).groupby(columns, sort=False).indices
    return [rows[members].tolist() for members in found.values()]


def assign(
    collection: Collection, config: Mapping[str, Any], *, stratify: bool = True
) -> list[str]:
    """Return each item's split: the given one, or one that is drawn of its group.

    With overlap=allow, given splits may tear groups apart. With `stratify` all splits have labels
    in like shares, and all classes are trained on.
    """
    table = collection.table
    given = table["split"].tolist() if "split" in table else None
    if given is not None and "" in given:
        missing = [name for name, word in zip(table["id"], given, strict=True) if not word]
        raise InputError(
            f"{collection.name}: {len(missing):,} items have no split, others do: "
            f"{', '.join(missing[:_NUM_SHOWN])}; give each one, or none"
        )
    allowed = given is not None and config["overlap"] == "allow"
    return assign_splits(
        ids=table["id"].tolist(),
        labels=strata(table) if stratify else [""] * len(table),
        groups=(table["id"] if allowed else table["group"]).tolist(),
        given=given,
        val_fraction=config["val_fraction"],
        test_fraction=config["test_fraction"],
        seed=config["seed"],
    )


def strata(table: pd.DataFrame) -> list[str]:
    """Labels of items; nothing where there are none."""
    return table["label"].tolist() if "label" in table else [""] * len(table)


def describe(table: pd.DataFrame, *, labels: bool = True) -> str:
    """Count items and groups by split, and `labels` where there are some."""
    return _count(table, sorted(table["label"].unique()) if labels and "label" in table else [])


def _count(table: pd.DataFrame, labels: Sequence[str]) -> str:
    rows = [["split", "items", "groups", *labels]]
    for name in SPLITS:
        of = table[table["split"] == name]
        counts = Counter(of["label"]) if labels else {}
        rows.append(
            [
                name,
                f"{len(of):,}",
                f"{of['group'].nunique():,}",
                *(f"{counts.get(label, 0):,}" for label in labels),
            ]
        )
    return align(rows)


def check_policy(policy: object) -> None:
    """Raise InputError for an `overlap=` that there is not."""
    if policy not in POLICIES:
        raise InputError(f"overlap must be {', '.join(POLICIES)}; got {policy!r}")


def _check(config: Mapping[str, Any]) -> None:
    check_policy(config["overlap"])
    if config["by"] not in WAYS:
        raise InputError(f"by must be {', '.join(WAYS)}; got {config['by']!r}")
    if not config["intervals"]:
        require_input(config)
    for key in ("test", "val"):
        if config[key] and config["by"] != "chromosome":
            raise InputError(f"{key}= names chromosomes: it goes with by=chromosome")
    if config["val"] and not config["test"]:
        raise InputError("val= needs test= too: name the chromosomes that are tested")
    if not 1 <= config["k"] <= MAX_K:
        raise InputError(f"k lies in 1..{MAX_K}; got {config['k']}")
    if not 0 < config["share"] <= 1:
        raise InputError(f"share lies above 0 and up to 1; got {config['share']}")


def grouped(collection: Collection, config: Mapping[str, Any]) -> Collection:
    """Put into one group what `by` wants in one split; drop splits that are to be drawn anew."""
    table, by = collection.table, config["by"]
    if by == "given":
        if "split" not in table:
            raise InputError(f"{collection.name} has no splits; by=given checks those there are")
        return collection
    table = table.drop(columns="split", errors="ignore")
    if by == "record":
        table = table.assign(group=table["id"])
    elif by == "group" and (table["group"] == table["id"]).all():
        raise InputError(
            "by=group needs groups: a column group of labels=TABLE or of the sequences' table "
            "(columns.group=NAME)"
        )
    elif by == "cluster":
        clusters = cluster_records(
            collection.sequences,
            collection.records,
            k=config["k"],
            share=config["share"],
            progress=True,
        )
        print(f"{clusters.max() + 1:,} clusters; the largest has {np.bincount(clusters).max():,}")
        table = table.assign(group=[f"cluster{number}" for number in clusters])
    elif by == "chromosome":
        table = table.assign(group=_chromosomes(table))
        if config["test"]:
            table = table.assign(split=_by_name(table["group"], config))
    return replace(collection, table=table)


def _chromosomes(table: pd.DataFrame) -> "pd.Series[str]":
    """The contig of each interval; of whole records, their own id."""
    return table["contig"] if "contig" in table else table["id"]


def _by_name(contigs: "pd.Series[str]", config: Mapping[str, Any]) -> list[str]:
    """Give chromosomes the splits that their names say; what is named in neither is `train`."""
    known = list(dict.fromkeys(contigs))
    split_of: dict[str, str] = {}
    for name in ("test", "val"):
        for pattern in filter(None, (word.strip() for word in str(config[name] or "").split(","))):
            for contig in _matching(pattern, known, name):
                if split_of.setdefault(contig, name) != name:
                    raise InputError(f"{contig!r} is named by test= and by val=; it can be in one")
    return [split_of.get(contig, "train") for contig in contigs]


def _matching(pattern: str, known: Sequence[str], key: str) -> list[str]:
    try:
        found = [name for name in known if name == pattern or re.fullmatch(pattern, name)]
    except re.error as error:
        raise InputError(f"{key}={pattern}: neither a name nor a pattern ({error})") from None
    if not found:
        shown = ", ".join(known[:_NUM_SHOWN]) + (", ..." if len(known) > _NUM_SHOWN else "")
        raise InputError(f"{key}={pattern} matches no chromosome; there are {shown}")
    return found


def _choose(collection: Collection) -> Chosen:
    table = collection.table
    return Chosen(
        table["id"].tolist(),
        table["label"].tolist() if "label" in table else [""] * len(table),
        table["group"].tolist(),
        table["split"].tolist() if "split" in table else None,
    )


def _keep_places_apart(collection: Collection, policy: Policy) -> tuple[Collection, list[str]]:
    table = collection.table
    if "split" not in table:
        stretches = _stretches(table)
        groups = unite_with(table["group"].tolist(), stretches)
        return replace(collection, table=table.assign(group=groups)), []
    removed = np.zeros(len(table), dtype=bool)
    chosen = _choose(collection)
    pairs: list[tuple[int, int]] = []
    for later, earlier in PAIRS:
        one, two = (
            np.flatnonzero((table["split"] == name) & ~removed) for name in (later, earlier)
        )
        if policy == "remove":
            hit = overlaps(table.iloc[two], table.iloc[one], one)
            removed[two[hit >= 0]] = True
        else:
            hit = overlaps(table.iloc[one], table.iloc[two], two)
            pairs += zip(one[hit >= 0].tolist(), hit[hit >= 0].tolist(), strict=True)
    require_apart(pairs, chosen, "bases in common")
    if not removed.any():
        return collection, []
    note = f"{int(removed.sum()):,} intervals removed that overlap a given test or val interval"
    return collection.take(np.flatnonzero(~removed)), [note]


def _stretches(table: pd.DataFrame) -> Int64[ndarray, "S"]:
    """Number the stretches of contigs that intervals cover, and say which one each lies in."""
    contigs = pd.factorize(table["contig"])[0]
    starts, ends = (table[column].to_numpy(dtype=np.int64) for column in ("start", "end"))
    span = int(ends.max(initial=0)) + 1
    first, last = contigs * span + starts, contigs * span + ends
    order = np.argsort(first, kind="stable")
    reach = np.maximum.accumulate(last[order])
    opens = np.concatenate([[True], first[order][1:] >= reach[:-1]])
    numbers = np.empty(len(table), dtype=np.int64)
    numbers[order] = np.cumsum(opens) - 1
    return numbers


def unite_with(groups: Sequence[str], links: Int64[ndarray, "S"]) -> list[str]:
    """Unite groups whose items have a link in common; named by the first group of each."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    group, names = pd.factorize(np.array(groups, dtype=object))
    size = len(names) + int(links.max(initial=-1)) + 1
    edges = (np.ones(group.size, np.int8), (group, len(names) + links))
    part = connected_components(coo_array(edges, shape=(size, size)), directed=False)[1]
    first: dict[int, str] = {}
    for number, name in zip(part[: len(names)].tolist(), names, strict=True):
        first.setdefault(number, name)
    return [first[number] for number in part[group].tolist()]
