"""`crossval`: every fold trained and tested with every seed, the models compared."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.genomics.collection import Collection, collect
from pipelines.genomics.evaluating import (
    check_scoring,
    read_attributes,
    read_leaks,
    read_models,
    report,
)
from pipelines.genomics.splitting import (
    assign,
    check_policy,
    describe,
    grouped,
    keep_apart,
    strata,
)
from pipelines.genomics.tasks import is_stratified
from pipelines.genomics.train import check_training, train, with_built_in_records
from pipelines.shared.errors import InputError
from pipelines.shared.folds import folds_to_come, gather_predictions, train_folds
from pipelines.shared.record import VOLATILE, RunState, is_main_process, make_folder, open_run
from pipelines.shared.splits import Rows, draw_folds
from pipelines.shared.tables import write_table

SCHEMES = ("kfold", "monte_carlo", "given")
_WAYS = ("record", "group", "cluster", "chromosome")
_COLUMNS = ["id", "split", "group", "label"]


def crossval(config: dict[str, Any]) -> int:
    """Train what is not finished yet, gather it and write the report.

    0, or 3 where records or labels stayed without a partner. With `fold`, that one is trained, and
    the report is written when it was the last one missing.
    """
    _check(config)
    config, out = with_built_in_records(config), Path(config["out"])
    if config["sequences"]:
        config = {**config, "store": config["store"] or str(out / "store")}
    make_folder(out)
    collection = collect(config, out, require_labels=config["task"]["name"] != "tracks")
    for note in collection.notes:
        print(f"note: {note}")
    tables = _draw(collection, config)
    jobs = list(product(range(len(tables)), config["seeds"]))
    for number, table in enumerate(tables):
        print(f"\nfold {number}\n{describe(table, labels=is_stratified(config))}")
    if config["fold"] is not None and config["fold"] not in range(len(jobs)):
        raise InputError(f"fold={config['fold']}: there are 0 to {len(jobs) - 1}")
    if config["dry_run"]:
        print("dry run: nothing is trained")
        return 0
    if open_run(out, config, volatile=(*VOLATILE, "fold")) is RunState.FINISHED:
        print((out / "summary.txt").read_text(encoding="utf-8"))
        print(f"{out} holds this finished cross-validation; give another out= to train again")
        return 0
    places = [_write_split(out, number, table) for number, table in enumerate(tables)]
    own = [{"splits": str(places[fold]), "seed": seed} for fold, seed in jobs]
    code = train_folds(config, out, own, train=train, verb="genomics_train")
    missing = folds_to_come(out, len(jobs))
    if missing:
        print(f"\nto come: fold={', '.join(missing)}; the last of them writes the report")
    elif is_main_process():
        _assess(config, out, len(tables))
    return code


def _check(config: dict[str, Any]) -> None:
    check_training(config)
    check_scoring(config)
    check_policy(config["overlap"])
    if config["scheme"] not in SCHEMES:
        raise InputError(f"scheme is {', '.join(SCHEMES)}; got {config['scheme']!r}")
    if config["by"] not in _WAYS:
        raise InputError(f"by is {', '.join(_WAYS)}; got {config['by']!r}")
    seeds = config["seeds"]
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int for seed in seeds):
        raise InputError(f"seeds are different whole numbers, [0,1,2]; got {seeds}")


def _draw(collection: Collection, config: dict[str, Any]) -> list[pd.DataFrame]:
    """Tables of id, split, group and label: one for each fold."""
    if config["scheme"] == "given":
        if "split" not in collection.table:
            raise InputError(
                f"{collection.name} has no splits beside its records; use scheme=kfold, or give "
                "splits=TABLE"
            )
        keep_apart(collection, config["overlap"])  # refuses what overlaps, if it shall
        allowed = {**config, "overlap": "allow"}
        return [_table(collection, assign(collection, allowed, stratify=is_stratified(config)))]
    chosen = grouped(collection, {**config, "test": None, "val": None})
    kept = keep_apart(chosen, config["overlap"]).collection
    labels = strata(kept.table) if is_stratified(config) else [""] * len(kept)
    rows = Rows(kept.table["id"].tolist(), labels, kept.table["group"].tolist())
    folds = draw_folds(
        rows,
        scheme=config["scheme"],
        folds=config["folds"],
        val_fraction=config["val_fraction"],
        test_fraction=config["test_fraction"],
        seed=config["seed"],
    )
    drawn = [_table(kept, splits) for splits in folds]
    left = chosen.table[~chosen.table["id"].isin(kept.table["id"])]  # train takes them out again
    left = left.assign(split="train")[_known(left)]
    return [pd.concat([table, left], ignore_index=True) for table in drawn]


def _table(collection: Collection, splits: Sequence[str]) -> pd.DataFrame:
    table = collection.table.assign(split=list(splits))
    return table[_known(table)]


def _known(table: pd.DataFrame) -> list[str]:
    return [name for name in _COLUMNS if name in table or name == "split"]


def _write_split(out: Path, number: int, table: pd.DataFrame) -> Path:
    path = out / f"splits_{number}.tsv"
    write_table(path, table)
    return path


def _assess(config: dict[str, Any], out: Path, num_folds: int) -> None:
    models = read_models(out)
    gather_predictions(out)
    drawn = "the splits given" if config["scheme"] == "given" else f"{num_folds} folds"
    seeds = f"seeds {', '.join(map(str, config['seeds']))}"
    report(
        out,
        models,
        config,
        title=f"Cross-validation: {drawn}, {seeds}",
        run=out,
        leaking=read_leaks(out, None, len(next(iter(models.values())))),
        attributes=read_attributes(out, config, models),
        extra={"seeds": config["seeds"]},
    )
