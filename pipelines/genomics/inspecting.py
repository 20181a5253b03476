"""`inspect`: what a collection holds, what stands in it twice, what leaks between its splits."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy import ndarray

from pipelines.genomics.alphabet import LETTERS, NUM_TOKENS
from pipelines.genomics.collection import Collection, collect, read_interval_folder
from pipelines.genomics.ingest import require_input
from pipelines.genomics.leaks import Leaks, find_leaks
from pipelines.genomics.progress import BaseCount
from pipelines.genomics.splitting import find_item_copies, keep_apart
from pipelines.shared.errors import InputError
from pipelines.shared.plots import COLOURS
from pipelines.shared.record import RunState, finish_run, make_folder, open_run
from pipelines.shared.splits import SPLITS
from pipelines.shared.tables import align, write_failures, write_table

_QUANTILES = {"shortest": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "longest": 1.0}
_MOST_LABELS = 8
_MOST_LISTED = 100
"""Labels that are counted by themselves; a curve is drawn of fewer."""
_BINS = 60
_G, _C = LETTERS.index("G") + 1, LETTERS.index("C") + 1


@dataclass(frozen=True, slots=True, eq=False)
class Findings:
    """What was found in one collection."""

    collection: Collection
    letters: pd.DataFrame | None
    """Letters of each item: bases, gc (share of A C G T), ambiguous; None without sequence."""
    copies: pd.DataFrame
    conflicts: dict[str, int]
    """Sequences that stand under more than one label: anywhere, and within each split."""
    leaks: Leaks

    def plain(self) -> dict[str, object]:
        """Return what report.json says."""
        store = self.collection.store
        return {
            "name": self.collection.name,
            "items": len(self.collection),
            "bases": int(self.collection.lengths.sum()),
            "counts": _counts(self.collection).to_dict("records"),
            "lengths": _quantiles(self.collection.lengths),
            "gc": None if self.letters is None else _quantiles(self.letters["gc"].dropna()),
            "letters": None if store is None else str(store.counts),
            "copies": len(self.copies),
            "label_conflicts": self.conflicts,
            "leaks": self.leaks.counts.to_dict("records"),
            "leak_notes": self.leaks.notes,
        }

    def text(self) -> str:
        """Return what report.txt says."""
        plain = self.plain()
        lengths = ", ".join(f"{name} {value:,.0f}" for name, value in plain["lengths"].items())  # type: ignore[attr-defined]
        lines = [
            f"{self.collection.name}: {len(self.collection):,} items, {plain['bases']:,} bases",
            f"bases of an item: {lengths}",
        ]
        if self.letters is not None:
            gc = self.letters["gc"].quantile([0.05, 0.5, 0.95])
            lines.append("GC: 5 % {:.1%}, median {:.1%}, 95 % {:.1%}".format(*gc))
            ambiguous = int((self.letters["ambiguous"] > 0).sum())
            more = f"{ambiguous:,} items hold more than A C G T"
            lines.append(f"letters: {plain['letters']}; {more}")
        lines += ["", _count_table(self.collection), ""]
        lines.append(f"copies of another item: {plain['copies']:,} (duplicates.csv)")
        if self.conflicts:
            parts = (f"{name} {count:,}" for name, count in self.conflicts.items())
            lines.append(f"sequences under more than one label: {', '.join(parts)}")
        return "\n".join([*lines, "", self.leaks.text()])


def inspect(config: dict[str, Any]) -> int:
    """Write the report; 0, or 3 if some items have no partner and were left out."""
    collections = _folder_of_intervals(config)
    if collections is None and not config["intervals"]:
        require_input(config)
    out = Path(config["out"])
    if not config["dry_run"]:
        make_folder(out)
        if open_run(out, config) is RunState.FINISHED:
            print((out / "report.txt").read_text(encoding="utf-8"))
            print(f"{out} holds this report already; give another out= to inspect again")
            return 0
    if collections is None:
        collection = collect(config, out, require_labels=False)
        collections = {"": collection}
    for collection in collections.values():
        for note in collection.notes:
            print(f"note: {note}")
    if config["dry_run"]:
        for collection in collections.values():
            print(f"{collection.name}: {len(collection):,} items\n{_count_table(collection)}")
        print("dry run: no report is written")
        return 0
    found = {name: examine(collection) for name, collection in collections.items()}
    texts = []
    for name, findings in found.items():
        write_findings(out / name, findings)
        texts.append(findings.text())
    text = "\n\n\n".join(texts)
    (out / "report.txt").write_text(text + "\n", encoding="utf-8")
    finish_run(out, {"items": sum(len(collection) for collection in collections.values())})
    print(f"{text}\n\nreport       {out / 'report.txt'}")
    return 3 if any(collection.failures for collection in collections.values()) else 0


def examine(collection: Collection, *, progress: bool = True) -> Findings:
    """Look at one collection: letters, copies, leaks."""
    letters = None if collection.store is None else count_letters(collection, progress=progress)
    copies = find_item_copies(collection)
    table = keep_apart(collection, "allow").table
    leaks = find_leaks(_with_few_labels(collection), progress=progress)
    return Findings(collection, letters, table, _conflicts(collection, copies), leaks)


def _conflicts(collection: Collection, copies: list[list[int]]) -> dict[str, int]:
    """Count sequences whose copies have different labels, in all and within each split."""
    table = collection.table
    if "label" not in table:
        return {}
    labels = table["label"].to_numpy()
    splits = table["split"].to_numpy() if "split" in table else np.full(len(table), "")
    found = {"in all": sum(len(set(labels[members])) > 1 for members in copies)}
    for name in (name for name in SPLITS if (splits == name).any()):
        within = ([at for at in members if splits[at] == name] for members in copies)
        found[f"within {name}"] = sum(len(set(labels[members])) > 1 for members in within)
    return found


def count_letters(collection: Collection, *, progress: bool = False) -> pd.DataFrame:
    """Count each item's letters: bases, gc (G and C among A C G T), ambiguous."""
    store = collection.sequences
    counts = np.zeros((len(collection), NUM_TOKENS), dtype=np.int64)
    label = "letters" if progress else None
    with BaseCount(label, int(collection.lengths.sum())) as bar:
        for row, record in enumerate(collection.records.tolist()):
            tokens = store.read(record)
            counts[row] = np.bincount(tokens, minlength=NUM_TOKENS)
            bar.add(tokens.size)
    known = counts[:, 1:5].sum(axis=1)
    gc = (counts[:, _G] + counts[:, _C]) / np.where(known > 0, known, np.nan)
    bases = counts.sum(axis=1)
    return pd.DataFrame({"bases": bases, "gc": gc, "ambiguous": bases - known})


def write_findings(folder: Path, findings: Findings) -> None:
    """Write report.json, report.txt, items.tsv, duplicates.csv, leaks.csv, and the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    table = findings.collection.table.assign(bases=findings.collection.lengths)
    if findings.letters is not None:
        table = table.assign(
            gc=findings.letters["gc"].round(4), ambiguous=findings.letters["ambiguous"]
        )
    write_table(folder / "items.tsv", table)
    write_table(folder / "duplicates.csv", findings.copies)
    write_table(folder / "leaks.csv", findings.leaks.items)
    write_failures(folder / "failures.csv", findings.collection.failures, id_column="id")
    groups = _groups(findings.collection)
    _save(_draw_lengths(findings.collection.lengths, groups), folder / "lengths.png")
    if findings.letters is not None:
        _save(_draw_gc(findings, groups), folder / "gc.png")
    text = json.dumps(findings.plain(), indent=2, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    (folder / "report.txt").write_text(findings.text() + "\n", encoding="utf-8")


def _folder_of_intervals(config: Mapping[str, Any]) -> dict[str, Collection] | None:
    """Read interval tables by split, where `intervals` is a folder of them."""
    if not (config["intervals"] and Path(config["intervals"]).is_dir()):
        return None
    if config["sequences"] or config["store"] or config["labels"]:
        raise InputError(
            "intervals=FOLDER is looked at without sequences and labels; to cut intervals out of "
            "sequences give one file"
        )
    return read_interval_folder(Path(config["intervals"]), config["only"])


def _with_few_labels(collection: Collection) -> Collection:
    """Leave out labels that are too many to be told apart, such as numbers."""
    table = collection.table
    if "label" not in table or table["label"].nunique() <= _MOST_LISTED:
        return collection
    return replace(collection, table=table.drop(columns="label"))


def _counts(collection: Collection) -> pd.DataFrame:
    """Items and bases by split and label, of what is known."""
    table = _with_few_labels(collection).table.assign(bases=collection.lengths)
    by = [name for name in ("split", "label") if name in table]
    if not by:
        return pd.DataFrame([{"items": len(table), "bases": int(table["bases"].sum())}])
    order = {name: place for place, name in enumerate(SPLITS)}
    grouped = table.groupby(by, sort=True)["bases"]
    counts = grouped.agg(items="size", bases="sum").reset_index()
    if "split" in counts:
        place = counts["split"].map(lambda name: order.get(name, len(order)))
        counts = counts.loc[place.sort_values(kind="stable").index]
    return counts.reset_index(drop=True)


def _count_table(collection: Collection) -> str:
    counts = _counts(collection)
    rows = [[str(name) for name in counts.columns]]
    for row in counts.itertuples(index=False):
        rows.append([f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row])
    return align(rows)


def _quantiles(values: Any) -> dict[str, float]:
    numbers = np.asarray(values, dtype=np.float64)
    if not numbers.size:
        return {}
    return {name: round(float(np.quantile(numbers, at)), 4) for name, at in _QUANTILES.items()}


_Groups = Mapping[tuple[str, str], Int64[ndarray, "K"]]
_LINES = {"train": "-", "val": (0, (4, 1.5)), "test": (0, (1, 1))}


def _groups(collection: Collection) -> _Groups:
    """Which items a curve is drawn of: by split and label, where there are few labels."""
    table = collection.table
    splits = table["split"] if "split" in table else pd.Series([""] * len(table))
    few = "label" in table and table["label"].nunique() <= _MOST_LABELS
    labels = table["label"] if few else pd.Series([""] * len(table))
    parts = pd.DataFrame({"split": splits, "label": labels}).groupby(["split", "label"]).indices
    order = {name: place for place, name in enumerate(SPLITS)}
    names = sorted(parts, key=lambda key: (key[1], order.get(key[0], len(order))))
    return {(str(split), str(label)): parts[split, label] for split, label in names}


def _draw_lengths(lengths: Int64[ndarray, "S"], groups: _Groups) -> Figure:
    low, high = (int(lengths.min()), int(lengths.max())) if lengths.size else (1, 1)
    wide = high > 20 * max(low, 1)
    if wide:
        edges = np.geomspace(max(low, 1), high + 1, _BINS)
    else:
        step = -(-(high - low + 1) // (_BINS - 1))  # whole bases, or bins hold more by turns
        edges = np.arange(low, high + step + 1, step) - 0.5
    figure = _histogram(lengths, edges, groups, "bases")
    axes = figure.axes[0]
    if wide:
        axes.set_xscale("log")
    else:
        margin = max(2, (high - low) // 20)
        axes.set_xlim(edges[0] - margin, edges[-1] + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def _draw_gc(findings: Findings, groups: _Groups) -> Figure:
    """Draw shares of GC, in steps that items of the median length can take."""
    assert findings.letters is not None, "drawn of sequences"
    length = max(float(np.median(findings.letters["bases"])), 1.0)
    step = max(1, round(0.02 * length)) / length
    edges = 100 * (np.arange(0, 1 + 2 * step, step) - 0.5 / length)
    return _histogram(100 * findings.letters["gc"].to_numpy(), edges, groups, "GC, %")


def _histogram(values: ndarray, edges: ndarray, groups: _Groups, label: str) -> Figure:
    """Draw the share of each group's items by value: a colour a label, a kind of line a split."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    colours = dict(zip(dict.fromkeys(name for _, name in groups), COLOURS * 8, strict=False))
    for place, ((split, name), rows) in enumerate(groups.items()):
        of = values[rows].astype(float)
        counts = np.histogram(of[~np.isnan(of)], bins=edges)[0]
        axes.stairs(
            100 * counts / max(rows.size, 1),
            edges,
            label=f"{name} {split} ({rows.size:,})".strip(),
            color=colours[name],
            linestyle=_LINES.get(split, "-"),
            linewidth=1.2 + 2 * (len(groups) - 1 - place) / len(groups),  # none hides another
        )
    axes.set_xlabel(label)
    axes.set_ylabel("items, %")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    if len(groups) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, metadata={"Software": None})
