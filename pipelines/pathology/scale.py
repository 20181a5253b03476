"""`scale`: what a training step takes in time and memory against the number of tiles."""

import gc
import json
import math
import platform
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from pipelines.pathology.data import SlideDataset
from pipelines.pathology.model import SlideClassifier
from pipelines.pathology.ordering import hilbert_order
from pipelines.pathology.store import (
    SCHEMA,
    Provenance,
    encoder_entry,
    is_current,
    slide_folder,
    write_group,
)
from pipelines.shared.errors import InputError
from pipelines.shared.fit import FitReport, FitSettings, fit, require_device, seed_everything
from pipelines.shared.objective import Classification
from pipelines.shared.optim import OptimSettings
from pipelines.shared.record import RunState, finish_run, open_run
from pipelines.shared.study import architecture_of, check_network, name_engines
from pipelines.shared.task import Packs
from sparse_core.testing import peak_memory

TISSUE_SHARE = 0.4
"""Of the cells of a bag's square grid."""

_REVISION = 2
_ENCODER = "normal"
_TILE_PX = 256
_MPP = 0.5


@dataclass(frozen=True, slots=True)
class Row:
    """What the training of one bag took; None where it did not fit the memory.

    `read_seconds` is the way from the store to an example, `step_seconds` a whole optimiser step
    with its layouts, `layout_seconds` the layouts by themselves (medians); `peak_bytes` is what the
    GPU's allocator held at most, or on a CPU this process since its start.
    """

    tiles: int
    read_seconds: float
    layout_seconds: float | None
    step_seconds: float | None
    peak_bytes: int | None
    engine_calls: dict[str, int]


def scale(config: dict[str, Any]) -> int:
    """Measure bag after bag and write the table; 0, or 3 if some did not fit the memory."""
    settings = _settings(config)
    sizes = sorted(set(config["tiles"]))
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"tiles= takes numbers of tiles above 0; got {config['tiles']}")
    build = partial(_build, config)
    check_network(build)
    require_device(settings)
    out = Path(config["out"])
    if open_run(out, config) is RunState.FINISHED:
        print((out / "scale.md").read_text(encoding="utf-8"))
        print(f"{out} holds this finished run; give another out= to measure again")
        return 0
    setup = _describe(build, config)
    rows = _read_rows(out, setup)
    for size in sizes[len(rows) :]:
        rows.append(_measure(size, sizes[0], build, settings, config))
        _write(out, setup, rows)
        if config["trainer"]["progress"]:
            print(_cells(rows[-1]), flush=True)
    calls = sum((Counter(row.engine_calls) for row in rows), Counter[str]())
    finish_run(
        out,
        {
            "summary": _linearity(rows),
            **name_engines(calls),
            "setup": setup,
            "rows": [asdict(row) for row in rows],
        },
    )
    print(f"\n{(out / 'scale.md').read_text(encoding='utf-8')}\ntable  {out / 'scale.md'}")
    return 3 if any(row.step_seconds is None for row in rows) else 0


def make_bag(store: Path, num_tiles: int, *, num_features: int, seed: int) -> str:
    """Store tissue of so many tiles with features drawn at random, unless it is there: its id."""
    slide_id = f"tissue_{num_tiles}"
    source = f"{slide_id}_seed_{seed}_revision_{_REVISION}"
    provenance = Provenance(source, None, source, _ENCODER, f"{_ENCODER}-{num_features}")
    folder = slide_folder(store, slide_id)
    if is_current(folder, provenance):
        return slide_id
    grid = draw_tissue(num_tiles, seed=seed)
    rng = np.random.default_rng([seed, num_tiles])
    side = int(grid.max() + 1) * _TILE_PX
    attributes = {
        "schema": SCHEMA,
        "slide_id": slide_id,
        "dimensions": [side, side],
        "mpp": _MPP,
        "pitch0": float(_TILE_PX),
        "encoders": {_ENCODER: encoder_entry(provenance.encoder_fingerprint, asdict(provenance))},
    }
    arrays = {
        "grid": grid.astype(np.int32),
        "xy0": grid * _TILE_PX,
        "tissue": np.ones(num_tiles, dtype=np.float32),
        f"features/{_ENCODER}": rng.standard_normal(
            (num_tiles, num_features), dtype=np.float32
        ).astype(np.float16),  # as published encoders' are stored
    }
    write_group(folder, attributes, arrays)
    return slide_id


def draw_tissue(num_tiles: int, *, seed: int = 0) -> np.ndarray:
    """Cells int64 [N, 2] (col, row) of ragged tissue on a square grid, in Hilbert order."""
    side = math.ceil(math.sqrt(num_tiles / TISSUE_SHARE))
    x, y = np.meshgrid(np.arange(side), np.arange(side))
    relief = np.sin(x / 37) + np.sin(y / 53) + np.sin((x + y) / 71)
    relief += np.random.default_rng([seed, num_tiles]).normal(scale=0.05, size=relief.shape)
    highest = np.argpartition(relief, relief.size - num_tiles, axis=None)[-num_tiles:]
    grid = np.stack([highest % side, highest // side], axis=-1)
    return grid[hilbert_order(grid)]


def _settings(config: dict[str, Any]) -> FitSettings:
    if config["steps"] < 1 or config["num_features"] < 1:
        raise InputError("steps and num_features must be at least 1")
    if config["trainer"]["devices"] not in (1, "1"):
        raise InputError("scale measures one device; use trainer=cpu or trainer=gpu")
    settings = FitSettings(
        epochs=config["steps"] + 1,
        max_tokens=1,  # every bag comes alone
        seed=config["seed"],
        select="last",
        save_last=False,
        optim=OptimSettings(**config["optim"]),
        **config["trainer"],
    )
    return replace(settings, progress=False)


def _build(config: dict[str, Any]) -> SlideClassifier:
    architecture = architecture_of(config, num_classes=2)
    architecture["checkpointing"] = config["checkpointing"]
    return SlideClassifier(num_features=config["num_features"], **architecture)


def _describe(build: partial[SlideClassifier], config: dict[str, Any]) -> str:
    """Name the machine and what is trained on it."""
    trainer, model = config["trainer"], config["model"]
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in build().parameters())
    threads = f"{platform.machine()}, {torch.get_num_threads()} threads"
    parts = [
        torch.cuda.get_device_name() if _on_gpu(trainer["accelerator"]) else threads,
        f"torch {torch.__version__}",
        f"{weights / 1e6:.1f} million weights",
        f"{model['depth']} layers of {model['dim']}",
        f"{config['num_features']:,} features of a tile",
        f"pattern {config['pattern']['expression']}",
        str(trainer["precision"]),
        f"checkpointing {'on' if config['checkpointing'] else 'off'}",
    ]
    return ", ".join(parts)


class _Stopwatch(Callback):
    """Time the layouts of each step, and the step with all that belongs to it."""

    def __init__(self) -> None:
        self.layout_seconds: list[float] = []
        self.step_seconds: list[float] = []
        self._started = 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Packs, batch_idx: int
    ) -> None:
        """Build the layouts once more, by themselves."""
        started = _now(pl_module.device)
        for pack in batch:
            pl_module.network.build_layouts(pack)
        self._started = _now(pl_module.device)
        self.layout_seconds.append(self._started - started)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: Packs,
        batch_idx: int,
    ) -> None:
        """Stop when the weights have moved."""
        self.step_seconds.append(_now(pl_module.device) - self._started)


def _measure(
    num_tiles: int,
    val_tiles: int,
    build: partial[SlideClassifier],
    settings: FitSettings,
    config: dict[str, Any],
) -> Row:
    """Train on one bag, an epoch per step; the smallest bag is the validation set."""
    store = Path(config["features"] or Path(config["out"]) / "features")
    given = {"num_features": config["num_features"], "seed": config["seed"]}
    val = SlideDataset(store, [make_bag(store, val_tiles, **given)], [1])
    slide_id = make_bag(store, num_tiles, **given)
    started = time.perf_counter()
    data = SlideDataset(store, [slide_id], [0])
    data[0]
    read_seconds = time.perf_counter() - started
    stopwatch = _Stopwatch()
    _forget_peak()
    seed_everything(settings.seed)
    report: FitReport | None = None
    try:
        _, report = fit(
            build(),
            data,
            val,
            objective=Classification(("0", "1")),
            out=Path(config["out"]),
            settings=settings,
            callbacks=[stopwatch],
        )
    except torch.OutOfMemoryError as error:
        print(f"{num_tiles:,} tiles: {str(error).splitlines()[0]}")
    if report is None:
        return Row(num_tiles, read_seconds, None, None, None, {})
    return Row(
        num_tiles,
        read_seconds,
        statistics.median(stopwatch.layout_seconds[1:]),
        statistics.median(stopwatch.step_seconds[1:]),
        torch.cuda.max_memory_allocated() if _on_gpu(settings.accelerator) else peak_memory(),
        report.engine_calls,
    )


def _on_gpu(accelerator: str) -> bool:
    return accelerator in ("gpu", "cuda")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _forget_peak() -> None:
    gc.collect()  # a bag that did not fit leaves cycles that hold its tensors
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _read_rows(out: Path, setup: str) -> list[Row]:
    """Take up the bags that an interrupted run has measured, if it ran on such a machine."""
    path = out / "rows.json"
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [Row(**row) for row in found["rows"]] if found["setup"] == setup else []


def _write(out: Path, setup: str, rows: list[Row]) -> None:
    found = {"setup": setup, "rows": [asdict(row) for row in rows]}
    (out / "rows.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    lines = [setup, "", _HEADER, "|--:|--:|--:|--:|--:|--:|---|", *map(_cells, rows)]
    sentence = _sentence(rows)
    lines += ["", sentence] if sentence else []
    (out / "scale.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


_HEADER = "| tiles | reading s | layout s | step s | tiles/s | peak GiB | engine |"


def _cells(row: Row) -> str:
    head = f"| {row.tiles:,} | {row.read_seconds:.3f} |"
    if row.step_seconds is None or row.layout_seconds is None or row.peak_bytes is None:
        return f"{head} - | - | - | out of memory | - |"
    return (
        f"{head} {row.layout_seconds:.3f} | {row.step_seconds:.3f} | "
        f"{row.tiles / row.step_seconds:,.0f} | {row.peak_bytes / 2**30:.2f} | "
        f"{' + '.join(row.engine_calls) or '-'} |"
    )


def _sentence(rows: list[Row]) -> str:
    """Say in words how linear the table is."""
    found = _linearity(rows)
    if not found:
        return ""
    done = [row.tiles for row in rows if row.step_seconds is not None]
    return (
        f"A tile takes {found['time_ratio']:.2f} x the time and {found['memory_ratio']:.2f} x the "
        f"memory at {done[-1]:,} tiles of what it takes at {done[0]:,}. Straight lines: "
        f"{found['seconds']:.3f} s + {found['seconds_per_million']:.3f} s per million tiles (off "
        f"by {found['seconds_off']:.1%} at most), {found['gib']:.2f} GiB + "
        f"{found['gib_per_million']:.2f} GiB per million tiles (off by {found['gib_off']:.1%})."
    )


def _linearity(rows: list[Row]) -> dict[str, float]:
    """Compare the largest bag with the smallest, and all of them with straight lines."""
    done = [row for row in rows if row.step_seconds is not None]
    if len(done) < 2:
        return {}
    tiles = np.array([row.tiles for row in done], dtype=np.float64)
    seconds = np.array([row.step_seconds for row in done], dtype=np.float64)
    gib = np.array([row.peak_bytes for row in done], dtype=np.float64) / 2**30
    found: dict[str, float] = {}
    for name, values in (("seconds", seconds), ("gib", gib)):
        slope, start = np.polyfit(tiles, values, 1, w=1 / values)  # all errors weigh as shares
        off = np.abs((start + slope * tiles) / values - 1).max()
        found |= {name: start, f"{name}_per_million": slope * 1e6, f"{name}_off": off}
    for name, values in (("time_ratio", seconds / tiles), ("memory_ratio", gib / tiles)):
        found[name] = values[-1] / values[0]
    return {name: float(value) for name, value in found.items()}
