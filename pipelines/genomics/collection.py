"""What a verb is about: records, or intervals of them, and what is known of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64
from numpy import ndarray

from pipelines.genomics.alphabet import decode
from pipelines.genomics.data import LabelSets, match_labels, read_label_table
from pipelines.genomics.ingest import ingest, provide_store
from pipelines.genomics.intervals import COLUMNS as INTERVAL_ROLES
from pipelines.genomics.intervals import IntervalFile, read_intervals
from pipelines.genomics.placing import Placed, fetch, place
from pipelines.genomics.sequence_tables import ROLES, normal_split
from pipelines.genomics.store import SequenceStore
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure, read_table, require_unique

PLACE = ("contig", "start", "end", "strand")
_LINE = 80


@dataclass(frozen=True, slots=True, eq=False)
class Collection:
    """Items, a row of `table` each: whole records, or intervals (cut out, or without sequence).

    The columns of `table` are id, group, and where they are known label, split (train, val, test),
    and contig, start, end (0-based, half-open), strand. `records` are the items' records in
    `store`; without sequence `store` is None.
    """

    name: str
    table: pd.DataFrame
    store: SequenceStore | None
    records: Int64[ndarray, "S"]
    failures: tuple[Failure, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.table)

    @property
    def lengths(self) -> Int64[ndarray, "S"]:
        """Bases of each item."""
        if self.store is not None:
            return self.store.lengths[self.records]
        return (self.table["end"] - self.table["start"]).to_numpy(dtype=np.int64)

    @property
    def sequences(self) -> SequenceStore:
        """The store; raises InputError where there are intervals alone."""
        if self.store is None:
            raise InputError(
                f"{self.name}: intervals have no bases; add sequences=GENOME or store="
            )
        return self.store

    def take(self, rows: Int64[ndarray, "K"]) -> "Collection":
        """Keep some of the items."""
        table = self.table.iloc[rows].reset_index(drop=True)
        return replace(self, table=table, records=self.records[rows])


def collect(config: Mapping[str, Any], out: Path, *, require_labels: bool) -> Collection:
    """Gather items as a verb's settings say; what has no partner is listed in `failures`.

    Items are the intervals of `intervals` where it is given, cut out of the sequences if there are
    any; else the records of `sequences` or `store`. Labels are those of the table `labels`, else
    those that stand beside the items; without any, items have none, or with `require_labels` an
    InputError says so. `splits` is a table of id, split and maybe group, which go before others.
    """
    found = _from_intervals(config, out) if config["intervals"] else _from_records(config, out)
    if config["labels"]:
        found = _label(found, config)
    if config["splits"]:
        found = _split(found, Path(config["splits"]))
    if require_labels and "label" not in found.table:
        raise InputError(
            f"{found.name} holds no labels: give labels=TABLE (columns id and label)"
            + (", or columns.label=NAME of the intervals" if config["intervals"] else "")
        )
    return found


def read_interval_folder(folder: Path, only: str | None = None) -> dict[str, Collection]:
    """Read the interval tables of benchmarks (Genomic Benchmarks), without sequence, by data set.

    A data set is a folder with train/CLASS.csv and test/CLASS.csv (gzip or not), or files of one
    folder named DATASET__train__CLASS.csv; `only` is the one wanted. Raises InputError for a folder
    that holds neither, or not that one.
    """
    parts: dict[str, list[tuple[Path, str, str]]] = {}
    for path in sorted(folder.rglob("*.csv*")):
        words = path.name.split(".", 1)[0].split("__")
        if len(words) == 1:
            words = [path.parent.parent.name, path.parent.name, *words]
        split = normal_split(words[1]) if len(words) == 3 else None
        if split is not None:
            parts.setdefault(words[0], []).append((path, split, words[2]))
    if not parts:
        raise InputError(
            f"{folder} holds no tables of intervals by split; they are called train/CLASS.csv and "
            "test/CLASS.csv, or DATASET__train__CLASS.csv"
        )
    if only and only not in parts:
        raise InputError(f"only={only}: {folder} holds {', '.join(parts)}")
    wanted = [only] if only else list(parts)
    return {name: _without_sequence(name, parts[name]) for name in wanted}


def _without_sequence(name: str, files: Sequence[tuple[Path, str, str]]) -> Collection:
    tables = []
    for path, split, label in files:
        table = _interval_table(read_intervals(path))
        table["id"] = f"{split}/{label}/" + table["id"]
        tables.append(table.assign(split=split, label=label))
    table = pd.concat(tables, ignore_index=True)
    table["group"] = table["id"]
    return Collection(name, table, None, np.full(len(table), -1))


def _from_records(config: Mapping[str, Any], out: Path) -> Collection:
    beside = not config["labels"]
    names = {role: name for role, name in config["columns"].items() if role in ROLES}
    store = provide_store({**config, "columns": names}, out, with_labels=beside)
    records = np.arange(len(store))
    table = pd.DataFrame({"id": list(store.ids)}, dtype=object)
    table["group"] = [group or name for group, name in zip(store.groups, store.ids, strict=True)]
    failures: list[Failure] = []
    if any(store.labels):
        table["label"] = list(store.labels)
    if any(store.splits):
        table["split"] = [split or "" for split in store.splits]
    name = str(config["sequences"] or store.path)
    if beside and "label" in table:
        known = table["label"].notna().to_numpy()
        failures = [_no_label(row, name) for row in table["id"][~known]]
        table, records = table[known].reset_index(drop=True), records[known]
    elif not beside:
        table = table.drop(columns="label", errors="ignore")
    return Collection(name, table, store, records, tuple(failures))


def _from_intervals(config: Mapping[str, Any], out: Path) -> Collection:
    columns = {
        role: name
        for role, name in config["columns"].items()
        if role in INTERVAL_ROLES and name != role
    }
    path = Path(config["intervals"])
    file = read_intervals(path, columns=columns, feature=config["feature"])
    if not (config["sequences"] or config["store"]):
        table = _finish(_interval_table(file))
        return Collection(str(path), table, None, np.full(len(table), -1), file.skipped)
    genome = provide_store(
        {**config, "columns": {role: config["columns"][role] for role in ("id", "sequence")}},
        out / "genome",
    )
    placement = place(file, genome, past_end=config["past_end"], width=config["width"])
    chosen = replace(file, intervals=tuple(item.interval for item in placement.placed))
    table = _interval_table(chosen)
    table["id"] = _distinct(table)
    places = [(item.parts, genome.ids[item.record]) for item in placement.placed]
    table["contig"] = [contig for _, contig in places]
    table["start"] = [min(part.start for part in parts) for parts, _ in places]
    table["end"] = [max(part.end for part in parts) for parts, _ in places]
    store = _cut_out(genome, placement.placed, table["id"], out)
    return Collection(
        str(path),
        _finish(table),
        store,
        np.arange(len(table)),
        placement.failures,
        tuple(placement.notes()),
    )


def _cut_out(
    genome: SequenceStore, placed: Sequence[Placed], names: "pd.Series[str]", out: Path
) -> SequenceStore:
    """Make the intervals records of a store of their own, by way of a FASTA file that stays."""
    path = out / "intervals.fa"
    out.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        for item, name in zip(placed, names, strict=True):
            text = decode(fetch(genome, item))
            file.write(f">{name}\n")
            file.writelines(f"{text[at : at + _LINE]}\n" for at in range(0, len(text), _LINE))
    aside.replace(path)
    return ingest(path, out / "intervals")


def _interval_table(file: IntervalFile) -> pd.DataFrame:
    rows = [
        (item.name, item.contig, item.start, item.end, item.strand, item.label, item.split)
        for item in file
    ]
    return pd.DataFrame(rows, columns=["id", *PLACE, "label", "split"])


def _finish(table: pd.DataFrame) -> pd.DataFrame:
    """Leave out columns that nothing is known in; name splits as they are called here."""
    table = table.dropna(axis="columns", how="all")
    if "label" in table:
        table = table[table["label"].notna()].reset_index(drop=True)
    if "split" in table:
        table["split"] = [normal_split(str(split)) or str(split) for split in table["split"]]
    return table.assign(group=table["id"])


def _distinct(table: pd.DataFrame) -> list[str]:
    """Names of intervals; those without one, or with another's, by their place."""
    by_place = [f"{row.contig}:{row.start}-{row.end}({row.strand})" for row in table.itertuples()]
    named = table["id"].fillna("").astype(str)
    repeated = named.duplicated(keep=False) | (named == "")
    names = pd.Series(np.where(repeated, by_place, named))
    count = names.groupby(names).cumcount()
    return [f"{name}_{n + 1}" if n else name for name, n in zip(names, count, strict=True)]


def _label(collection: Collection, config: Mapping[str, Any]) -> Collection:
    """Give items the labels (groups, splits) of a table; those that it does not name fall out."""
    path = Path(config["labels"])
    names = {role: config["columns"][role] for role in ("id", "label", "group", "split")}
    where = config["where"]
    task = config.get("task", {})
    several = task.get("columns") and LabelSets(
        tuple(task["columns"]), task["separator"], task["none"]
    )
    numbers = task.get("name") == "regression"
    table = read_label_table(
        path, columns=names, where=where, sets=several or None, numbers=numbers
    )
    notes = []
    if mapped := [f"{role} is {name!r}" for role, name in names.items() if name != role]:
        notes.append(f"{path.name}: {', '.join(mapped)}")
    if where:
        chosen = ", ".join(f"{column} is {value!r}" for column, value in where.items())
        notes.append(f"{path.name}: {len(table):,} rows where {chosen}")
    match = match_labels(collection.table["id"].tolist(), table, name=collection.name)
    notes += match.notes(filtered=bool(where))
    kept = collection.take(match.records)
    known = table.iloc[match.rows].reset_index(drop=True)
    unlabelled = () if where else match.unlabelled
    failures = (
        *collection.failures,
        *(_no_label(name, collection.name) for name in unlabelled),
        *(_no_record(name, str(path)) for name in match.unknown),
    )
    labelled = kept.table.drop(columns=known.columns, errors="ignore").join(known)
    return replace(kept, table=labelled, failures=failures, notes=(*collection.notes, *notes))


def _split(collection: Collection, path: Path) -> Collection:
    """Take splits (and groups) from a table of the verb split; every item needs its row."""
    table = read_table(path)
    for column in ("id", "split"):
        if column not in table:
            raise InputError(
                f"{path} has no column {column!r}; it has {', '.join(map(repr, table.columns))}; "
                "splits= takes the splits.tsv that the verb split writes"
            )
    require_unique(path, table, "id")
    table = table.set_index("id")
    missing = [name for name in collection.table["id"] if name not in table.index]
    if missing:
        raise InputError(
            f"{path} has no split for {len(missing):,} of {len(collection):,} items: "
            f"{', '.join(map(repr, missing[:5]))}{', ...' if len(missing) > 5 else ''}; split "
            "these sequences again, or leave them out"
        )
    rows = table.loc[collection.table["id"]].reset_index(drop=True)
    given = {"split": [normal_split(word) or word for word in rows["split"]]}
    if "group" in rows:
        given["group"] = rows["group"].tolist()
    return replace(collection, table=collection.table.assign(**given))


def _no_label(name: str, path: str) -> Failure:
    return Failure(name, path, "no_label", "no label", "add a row with its id to the labels")


def _no_record(name: str, path: str) -> Failure:
    remedy = "remove the row, or give the record that it names"
    return Failure(name, path, "no_record", "no record", remedy)
