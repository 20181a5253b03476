"""`train`: from sequences and labels to a model, scored beside its baselines."""

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.genomics.alphabet import NUM_TOKENS
from pipelines.genomics.collection import Collection, collect
from pipelines.genomics.ingest import require_input
from pipelines.genomics.leaks import Leaks, find_leaks
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.pretrain import pretrained_sizes, read_pretrained
from pipelines.genomics.splitting import assign, check_policy, describe, keep_apart
from pipelines.genomics.study import BASELINES, Study
from pipelines.genomics.synthetic import MotifPlan, write_dataset
from pipelines.genomics.tasks import (
    DnaObjective,
    Targets,
    check_task,
    is_stratified,
    make_objective,
    read_targets,
)
from pipelines.genomics.tokenizers import Tokenizer, build_tokenizer
from pipelines.genomics.track_files import Signals
from pipelines.genomics.track_study import TrackStudy
from pipelines.genomics.track_task import Tracks
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitSettings
from pipelines.shared.record import is_main_process
from pipelines.shared.study import architecture_of, begin_run, check_baselines, check_network
from pipelines.shared.tables import write_table

_FEW = 8
"""Records that may each have a class of their own: a message about splits says more."""
_MANY_TOKENS = 4096
"""As many as words make: the network is built for a look, before there is a tokenizer."""


def train(config: dict[str, Any]) -> int:
    """Train and score; 0, or 3 if records or labels stayed without a partner."""
    settings = check_training(config)
    config = with_built_in_records(config)
    out = Path(config["out"])
    if not begin_run(out, config):
        return 0
    along = config["task"]["name"] == "tracks"
    collection = _prepare(collect(config, out, require_labels=not along), config, out)
    tokenizer = _make_tokenizer(collection, config)
    study, known, objective = (_track_lesson if along else _lesson)(collection, config)
    architecture = _architecture(
        config, num_classes=objective.num_outputs, num_tokens=tokenizer.num_tokens
    )
    leaks = _find_leaks(collection, config) if config["leaks"] else None
    return study(
        config, settings, collection, known, objective, tokenizer, architecture, leaks, out
    ).run()


def check_training(config: dict[str, Any]) -> FitSettings:
    """Refuse settings without sense before anything is read."""
    check_baselines(config["baselines"], BASELINES)
    settings = FitSettings.from_config(config)
    check_task(config)
    words = config["tokenizer"]["kind"] != "base"
    if words and config["task"]["name"] == "tracks":
        raise InputError("task=tracks says something of single bases: it needs tokenizer=base")
    if words and config["pretrained"]:
        raise InputError("pretrained= knows bases: it needs tokenizer=base")
    if config["freeze"] and not config["pretrained"]:
        raise InputError("freeze=true leaves pretrained weights as they are: give pretrained=FILE")
    if words and config["stem_stride"] != 1:
        raise InputError("stem_stride makes tokens of bases; with another tokenizer it is 1")
    num_tokens = _MANY_TOKENS if words else NUM_TOKENS
    check_network(
        partial(DnaClassifier, **_architecture(config, num_classes=2, num_tokens=num_tokens))
    )
    if not 0 <= config["window_overlap"] < config["context"]:
        raise InputError(
            "window_overlap must be at least 0 and below context; got "
            f"window_overlap={config['window_overlap']}, context={config['context']}; "
            "window_overlap=0 cuts windows end to end"
        )
    check_policy(config["overlap"])
    if config["data"]["name"] == "sequences":
        require_input(config)
    return settings


def _architecture(
    config: Mapping[str, Any], *, num_classes: int, num_tokens: int
) -> dict[str, Any]:
    architecture = architecture_of(dict(config), num_classes=num_classes)
    own = {key: config[key] for key in ("stem", "stem_stride", "kernel", "rc", "checkpointing")}
    along = config["task"]["name"] == "tracks"
    architecture |= {**own, "num_tokens": num_tokens, "per": "base" if along else "sequence"}
    if config["pretrained"]:
        model = read_pretrained(Path(config["pretrained"]))
        architecture |= pretrained_sizes(model, config["rc"])
    return architecture


def with_built_in_records(config: dict[str, Any]) -> dict[str, Any]:
    """Write the built-in records and name them as input, where none is given."""
    if config["data"]["name"] == "sequences":
        return config
    data = config["data"]
    names = {f.name for f in fields(MotifPlan)}
    try:
        plan = MotifPlan(**{key: value for key, value in data.items() if key in names})
    except ValueError as error:
        raise InputError(f"data=synthetic: {error}") from None
    sizes = {key: data[key] for key in ("num_train", "num_val", "num_test", "seed")}
    folder = Path(config["data_root"]) / "genomics" / "synthetic"
    fasta, labels = write_dataset(folder, plan, **sizes, background=data["background"])
    return {**config, "sequences": str(fasta), "labels": str(labels)}


def _prepare(collection: Collection, config: Mapping[str, Any], out: Path) -> Collection:
    """Deal with overlaps and put every item into a split; say what became of them."""
    for note in collection.notes:
        print(f"note: {note}")
    print(collection.sequences.counts)
    found = keep_apart(collection, config["overlap"])
    for note in found.notes:
        print(f"note: {note}: {out / 'duplicates.csv'}")
    table, classified = found.collection.table, is_stratified(config)
    if classified:
        classes = sorted(table["label"].unique())
        if len(classes) < 2:
            raise InputError(
                f"{len(table):,} records of {len(classes)} classes are left with a label and "
                f"without copies; at least two classes are needed: see {out / 'duplicates.csv'}, "
                "or use overlap=allow"
            )
        if 2 * len(classes) > len(table) > _FEW:
            raise InputError(
                f"{len(table):,} records have {len(classes):,} classes ({', '.join(classes[:3])}, "
                "...): where labels are numbers use task=regression"
            )
        print(f"{len(classes)} classes ({', '.join(classes)})")
    table["split"] = assign(found.collection, config, stratify=classified)
    if is_main_process():
        write_table(out / "duplicates.csv", found.table)
        columns = [name for name in ("id", "label", "split", "group") if name in table]
        write_table(out / "splits.tsv", table[columns])
    print(describe(table, labels=classified))
    return found.collection


def _lesson(
    collection: Collection, config: Mapping[str, Any]
) -> tuple[type[Study], Targets, DnaObjective]:
    """Read what is known of each item, and make of it what networks are trained for."""
    targets = read_targets(collection.table, config, collection.name)
    train = np.flatnonzero(collection.table["split"] == "train")
    return Study, targets, make_objective(config, targets, train)


def _track_lesson(
    collection: Collection, config: Mapping[str, Any]
) -> tuple[type[Study], Signals, DnaObjective]:
    """Open the tracks, and take from them what networks are trained for."""
    task, lengths = config["task"], collection.lengths
    signals = Signals(task["files"], collection.table, lengths, missing=task["missing"])
    for note in signals.notes:
        print(f"note: {note}")
    train = np.flatnonzero(collection.table["split"] == "train")
    objective = Tracks.of(signals, train, lengths[train], kind=task["loss"])
    return TrackStudy, signals, objective


def _make_tokenizer(collection: Collection, config: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer; what it learns it learns from training records alone."""
    chosen = collection.records[(collection.table["split"] == "train").to_numpy()]
    store = collection.sequences
    return build_tokenizer(
        config["tokenizer"], lambda: (store.read(int(record)) for record in chosen)
    )


def _find_leaks(collection: Collection, config: Mapping[str, Any]) -> Leaks:
    """Look for test items that stand in train or validation too, and say how many do."""
    if not is_stratified(config):  # counts by label are counts by class
        unlabelled = collection.table.drop(columns="label", errors="ignore")
        collection = replace(collection, table=unlabelled)
    leaks = find_leaks(collection, progress=True)
    print(f"\n{leaks.text()}\n")
    return leaks
