"""`pretrain`: a network that guesses bases, and how it does beside Markov models."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.data import WindowDataset
from pipelines.genomics.ingest import provide_store, require_input
from pipelines.genomics.markov import MAX_ORDER, MarkovModel, count_words
from pipelines.genomics.model import TASK, DnaClassifier
from pipelines.genomics.pretraining import BaseGuesser, BitsPerBase, HiddenBases, Hiding
from pipelines.genomics.store import SequenceStore
from pipelines.genomics.tokenizers import BaseTokenizer, digest
from pipelines.shared.checkpoint import LoadedModel, load_model, save_model
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitReport, FitSettings, fit, seed_everything
from pipelines.shared.record import finish_run, is_main_process
from pipelines.shared.study import architecture_of, begin_run, check_network
from pipelines.shared.tables import align

_BODY = ("stem.", "encoder.", "registers")
"""What a pretrained network hands on: all but pooling and head."""

_POOLED_BY = ("pooling", "head_norm", "per")

_SIZES = ("dim", "depth", "num_heads", "mlp_ratio", "stem", "kernel", "stem_stride", "num_tokens")

ROTARY_BASE = 10_000.0
"""That of networks which were written before it could be chosen."""


def pretrain(config: dict[str, Any]) -> int:
    """Train a network to guess bases, and write it and what it reached; 0."""
    require_input(config)
    settings = FitSettings.from_config(config)
    hiding = Hiding(
        config["guess"], config["mask_rate"], config["mask_span"], config["soft_mask_weight"]
    )
    build = partial(_build, config)
    check_network(build)
    if not 0 <= config["markov"] <= MAX_ORDER:
        raise InputError(f"markov is an order, 0 to {MAX_ORDER}; got {config['markov']}")
    if config["context"] < 1:
        raise InputError(f"context is a number of bases, 1 or more; got {config['context']}")
    if not 0 < config["val_fraction"] < 1:
        raise InputError(f"val_fraction lies between 0 and 1; got {config['val_fraction']}")
    out = Path(config["out"])
    if not begin_run(out, config):
        return 0
    store = provide_store(config, out)
    print(store.counts)
    train, val = split_windows(store, config)
    print(f"windows of up to {config['context']:,} bases: {len(train):,} train, {len(val):,} val")
    hidden = HiddenBases(train, hiding), HiddenBases(val, hiding)
    for name, bases in zip(("to train on", "to validate by"), hidden, strict=True):
        if not bases.asks():
            raise InputError(
                f"no base of the windows {name} is to be guessed: they hold no A C G T, or so few "
                "that none is hidden; give more records, or a higher mask_rate"
            )
    seed_everything(settings.seed)
    guesser, report = fit(
        build(),
        *hidden,
        objective=BitsPerBase(),
        out=out / "models" / "model",
        settings=settings,
        name="pretrain",
    )
    if is_main_process():
        assert isinstance(guesser, BaseGuesser)
        markov = measure_markov(train, val, config["markov"], both_strands=config["rc"] != "none")
        _write(out, config, guesser, report, markov, store)
    return 0


def split_windows(
    store: SequenceStore, config: Mapping[str, Any]
) -> tuple[WindowDataset, WindowDataset]:
    """Windows to train on and to validate by: other records, or other stretches of all records.

    Raises InputError where nothing is left for one of them.
    """
    whole = partial(WindowDataset, store, context=config["context"], seed=config["seed"])
    turned = config["rc"] == "augment"
    if config["val_by"] == "window":
        chosen = _late_windows(whole(range(len(store))).records, config["val_fraction"])
        train = whole(range(len(store)), reverse_complement=turned).take(~chosen)
        val = whole(range(len(store))).take(chosen)
    elif config["val_by"] == "record":
        held = _held_records(store, config)
        train = whole(np.flatnonzero(~held), reverse_complement=turned)
        val = whole(np.flatnonzero(held))
    else:
        raise InputError(f"val_by is record or window; got {config['val_by']!r}")
    if not (len(train) and len(val)):
        raise InputError(
            f"{len(store):,} records leave {len(train):,} windows to train on and {len(val):,} to "
            "validate by; give more records, or val_by=window, which holds out the end of each"
        )
    return train, val


def measure_markov(
    train: WindowDataset, val: WindowDataset, max_order: int, *, both_strands: bool
) -> dict[int, float]:
    """Bits per base of validation by the Markov models of orders 0 to `max_order`."""
    counts = count_words(_bases(train), max_order, both_strands=both_strands)
    found = {}
    for order in range(max_order + 1):
        model = MarkovModel(counts[: order + 1])
        measured = [model.measure(tokens) for tokens in _bases(val)]
        found[order] = sum(bits for bits, _ in measured) / max(sum(n for _, n in measured), 1)
    return found


def load_body(
    network: DnaClassifier, model: LoadedModel, task: Mapping[str, object], *, freeze: bool
) -> str:
    """Give a network the stem, registers and encoder of another; say what was taken.

    Pooling and head too, where the other was trained for the same `task` (an objective's `plain`)
    and pools alike. With `freeze` stem, registers and encoder learn no more. The sizes must be
    those of `pretrained_sizes`.
    """
    alike = all(network.config.get(key) == model.config.get(key) for key in _POOLED_BY)
    same = alike and _means(model.metadata.get("task")) == _means(task)
    wanted = (*_BODY, "pool.", "head.") if same else _BODY
    taken = {name: w for name, w in model.state_dict.items() if name.startswith(wanted)}
    missing, unexpected = network.load_state_dict(taken, strict=False)
    assert not unexpected, "sizes are those of the file"
    if freeze:
        for name, weight in network.named_parameters():
            weight.requires_grad_(not name.startswith(_BODY))
    own = ", ".join(sorted({name.split(".")[0] for name in missing})) or "nothing"
    said = "frozen" if freeze else "to be tuned"
    return f"{len(taken)} arrays taken ({said}); new: {own}"


def _means(task: object) -> object:
    """What a network's numbers say: a task without what is chosen afterwards, or weighs it."""
    if not isinstance(task, dict):
        return None
    other = ("threshold", "thresholds", "class_weights")
    return {key: value for key, value in task.items() if key not in other}


def read_pretrained(path: Path) -> LoadedModel:
    """Read a network that `pretrain` or `train` wrote; raises InputError for one of words."""
    model = load_model(path, task=TASK)
    refuse_other_version(model, path)
    kind = model.metadata["tokenizer"]["kind"]
    if kind != "base":
        raise InputError(f"{path} reads {kind} tokens; pretrained= takes networks that read bases")
    return model


def refuse_other_version(model: LoadedModel, path: Path) -> None:
    """Raise InputError for a model of DNA that lacks what models of this version have."""
    if not model.metadata.keys() & {"task", "guess"} or "stem" not in model.config:
        raise InputError(f"{path} was written by another version of gigasparse: train it again")


def pretrained_sizes(model: LoadedModel, rc: str) -> dict[str, object]:
    """Sizes and pattern of a pretrained network; raises InputError for an `rc` that differs."""
    shared, wanted = model.config["rc"] == "equivariant", rc == "equivariant"
    if shared != wanted:
        raise InputError(
            f"rc={rc}, but the pretrained network has rc={model.config['rc']}: weights that are "
            "tied between strands and weights that are not do not fit; give both the same"
        )
    sizes = {name: model.config[name] for name in (*_SIZES, "pattern")}
    return sizes | {"rotary_base": model.config.get("rotary_base", ROTARY_BASE)}


def _build(config: Mapping[str, Any]) -> BaseGuesser:
    architecture = architecture_of(dict(config), num_classes=1)
    own = {key: config[key] for key in ("stem", "stem_stride", "kernel", "rc", "checkpointing")}
    return BaseGuesser(DnaClassifier(**architecture, **own), config["guess"])


def _late_windows(records: Int64[ndarray, "W"], fraction: float) -> ndarray:
    """Choose the last windows of each record; of a record of one, none."""
    counts = np.bincount(records)
    place = np.arange(records.size) - np.repeat(np.cumsum(counts) - counts, counts)
    held = np.where(counts > 1, np.maximum(np.round(counts * fraction), 1), 0)
    return place >= (counts - held)[records]


def _held_records(store: SequenceStore, config: Mapping[str, Any]) -> ndarray:
    """Choose the named records, or draw some until they hold the share of the bases."""
    held = np.zeros(len(store), dtype=bool)
    if config["val"]:
        for name in str(config["val"]).split(","):
            found = [row for row, own in enumerate(store.ids) if re.fullmatch(name.strip(), own)]
            if not found:
                raise InputError(f"val={name.strip()} matches no record; there are "
                                 f"{', '.join(store.ids[:8])}")  # fmt: skip
            held[found] = True
        return held
    order = np.random.default_rng(config["seed"]).permutation(len(store))
    reach = np.cumsum(store.lengths[order])
    wanted = int(np.searchsorted(reach, config["val_fraction"] * reach[-1])) + 1
    held[order[: min(wanted, len(store) - 1)]] = True
    return held


def _bases(windows: WindowDataset) -> Iterator[UInt8[ndarray, "T"]]:
    places = zip(
        windows.records.tolist(), windows.starts.tolist(), windows.ends.tolist(), strict=True
    )
    return (windows.store.read(record, start, end) for record, start, end in places)


def _write(
    out: Path,
    config: Mapping[str, Any],
    guesser: BaseGuesser,
    report: FitReport,
    markov: Mapping[int, float],
    store: SequenceStore,
) -> None:
    bits = -report.scores[f"val_{BitsPerBase().score}"]
    tokenizer = BaseTokenizer()
    metadata: dict[str, object] = {
        "guess": config["guess"],
        "context": config["context"],
        "bits_per_base": bits,
        "tokenizer": tokenizer.config,
        "tokenizer_digest": digest(tokenizer),
        "data": store.fingerprint,
    }
    save_model(out / "model.ckpt", guesser.network, task=TASK, metadata=metadata)
    rows = [["", "bits per base"], [f"model ({config['guess']})", f"{bits:.4f}"]]
    rows += [[f"Markov, order {order}", f"{value:.4f}"] for order, value in markov.items()]
    sees = " (which sees both sides of a hidden base)" if config["guess"] == "masked" else ""
    summary = (
        f"validation, unweighted; the model{sees}\n{align(rows)}\n\n"
        f"model        {out / 'model.ckpt'}\n"
        f"metrics      {out / 'metrics.json'}\n"
        f"go on with   python -m pipelines.genomics train pretrained={out / 'model.ckpt'} "
        "sequences=FILE labels=TABLE\n"
    )
    (out / "summary.txt").write_text(summary, encoding="utf-8")
    scores = {"bits_per_base": bits, "markov": {str(k): value for k, value in markov.items()}}
    finish_run(out, {"summary": {"bits_per_base": bits}, **scores, "training": asdict(report)})
    print(f"\n{summary}")
