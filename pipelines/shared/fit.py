"""One training run: batches, selection on validation, resuming, loggers, on Lightning's Trainer."""

import importlib
import importlib.util
import logging
import math
import os
import random
import signal
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Never, TypeVar, cast, get_args

import numpy as np
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import Tensor, nn
from tqdm import tqdm

from pipelines.shared.asides import aside_of
from pipelines.shared.batch import (
    Example,
    Examples,
    PackedBatch,
    Target,
    TokenBudgetBatches,
    pack_within,
)
from pipelines.shared.errors import InputError
from pipelines.shared.loader import BatchStream, ExampleLoader, MakesBatches, Packs
from pipelines.shared.objective import Objective
from pipelines.shared.optim import OptimSettings
from pipelines.shared.preemption import Preempted, Preemption
from pipelines.shared.task import SequenceTask
from sparse_core.nn import compiled_layers
from sparse_core.ops import engines_used

_SAVE_SHARE = 0.05  # of the time at most goes into saving within epochs
_AGREE_EVERY = 50  # steps between two questions of several processes whether to save

Network = TypeVar("Network", bound=nn.Module)
Select = Literal["loss", "last", "auroc", "r2", "c_index"]
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
"""Lightning's names of them."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How to train; the names are those of the configuration.

    A batch holds at most `max_tokens` tokens, a longer sequence comes alone; the batches that all
    devices take at once hold at most `batch_size` sequences. With `steps` the number of epochs
    follows: as many whole ones as hold at least so many steps.
    `select` chooses the weights that are kept: the epoch with the lowest validation loss, with the
    highest validation score of the objective by its name (auroc, r2, c_index), or the last.
    `patience` stops after so many epochs without a better
    one. `save_last` keeps the state in `last.ckpt`, from which the same run goes on;
    `save_seconds` lie between two such states at least, and as long as keeps the time that goes
    into them within epochs below a twentieth. `compiled` trains what surrounds attention through
    torch.compile.
    """

    epochs: int
    max_tokens: int
    batch_size: int | None = None
    seed: int = 0
    steps: int | None = None
    num_workers: int = 0
    optim: OptimSettings = field(default_factory=OptimSettings)
    logger: str = "none"
    select: Select = "loss"
    patience: int | None = None
    save_last: bool = True
    save_seconds: float = 10.0
    progress: bool = True
    accelerator: str = "cpu"
    devices: int | str = 1
    strategy: str = "auto"
    precision: str = "32-true"
    accumulate: int = 1
    gradient_clip: float | None = 1.0
    compiled: bool = False

    def __post_init__(self) -> None:
        for key in ("epochs", "max_tokens", "batch_size", "steps", "patience", "accumulate"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise InputError(f"{key} must be at least 1; got {value}")
        if self.save_seconds < 0:
            raise InputError(
                f"callbacks.save_seconds must not be negative; got {self.save_seconds}"
            )
        if self.num_workers < 0:
            raise InputError(f"num_workers must not be negative; got {self.num_workers}")
        if self.select not in get_args(Select):
            choices = ", ".join(get_args(Select))
            raise InputError(f"callbacks.select must be one of {choices}; got {self.select!r}")
        if self.precision not in PRECISIONS:
            choices = ", ".join(PRECISIONS)
            raise InputError(f"trainer.precision is one of {choices}; got {self.precision!r}")
        if self.seed < 0:
            raise InputError(f"seed must not be negative; got {self.seed}")
        if self.logger not in LOGGERS:
            raise InputError(f"logger must be one of {', '.join(LOGGERS)}; got {self.logger!r}")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "FitSettings":
        """Take the settings from a verb's configuration."""
        own = ("epochs", "max_tokens", "batch_size", "seed", "steps", "num_workers")
        return cls(
            **{key: config[key] for key in own},
            **config["callbacks"],
            **config["trainer"],
            optim=OptimSettings(**config["optim"]),
            logger=config["logger"]["name"],
        )


@dataclass(frozen=True, slots=True)
class FitReport:
    """What a training run took and reached; scores are those of the kept epoch (0-based).

    `engine_calls` counts the attention calls, forward and backward, that each engine served.
    """

    epochs: int
    steps: int
    seconds: float
    best_epoch: int
    scores: dict[str, float]
    engine_calls: dict[str, int]


def fit(
    network: Network,
    train: Examples,
    val: Examples,
    *,
    objective: Objective,
    out: Path,
    settings: FitSettings,
    name: str = "model",
    sample_weights: Sequence[float] | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Network, FitReport]:
    """Train a network in place on an objective and return it with its best weights.

    `out` is this network's own folder: training goes on from a `last.ckpt` in it, within an
    epoch too, with the numbers of an uninterrupted run. `name` stands before the progress lines,
    `callbacks` look on.
    `sample_weights`, one per training example, make an epoch a draw in their proportion. On
    several devices all processes run the same program; each validates on all of `val`, so that
    they agree. Raises `Preempted` after SIGUSR1, its state saved.
    """
    require_device(settings)
    if settings.select not in ("loss", "last", objective.score):
        raise InputError(
            f"callbacks.select={settings.select}: this task's score is {objective.score}; use it, "
            "loss or last"
        )
    seed_everything(settings.seed)
    data = _Batches(train, val, settings, objective, sample_weights)
    epochs = data.count_epochs()
    selection = Selection(settings, out / "last.ckpt")
    task = SequenceTask(
        network,
        objective,
        optim=settings.optim,
        count_steps=data.count_steps,
        seed=settings.seed,
    )
    preemption = Preemption()
    with _quiet_lightning():
        trainer = Trainer(
            accelerator=settings.accelerator,
            devices=settings.devices,
            strategy=settings.strategy,
            precision=cast(Any, settings.precision),
            max_epochs=epochs,
            accumulate_grad_batches=settings.accumulate,
            gradient_clip_val=settings.gradient_clip,
            logger=build_logger(settings.logger, out),
            callbacks=[
                preemption,
                selection,
                Progress(name, epochs, shown=settings.progress),
                *callbacks,
            ],
            plugins=_environment(settings),
            default_root_dir=out,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
        )
        around = compiled_layers(network) if settings.compiled else nullcontext()
        with preemption.listening(), around:
            _run(trainer, task, data, selection.path)
        _close_logger(settings.logger)
    network.load_state_dict(selection.weights)
    return network, selection.report(trainer.global_step)


def require_device(settings: FitSettings) -> None:
    """Raise InputError where a GPU is asked for and none is there."""
    found = torch.cuda.is_available() or torch.backends.mps.is_available()
    if settings.accelerator in ("gpu", "cuda") and not found:
        raise InputError("trainer.accelerator=gpu: no GPU is found here; use trainer=cpu")


def _environment(settings: FitSettings) -> list[LightningEnvironment]:
    """Choose who starts the processes of several devices: this run, or torchrun if that is there.

    A scheduler's variables alone would make Lightning take its one task for all processes there
    are. Raises InputError where SLURM started several tasks and each would start them all.
    """
    if TorchElasticEnvironment.detect():
        return []
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if settings.devices != 1 and tasks > 1:
        raise InputError(
            f"SLURM started {tasks} tasks, and training on several devices starts a process for "
            "each device itself: use srun --ntasks=1"
        )
    return [LightningEnvironment()]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch; call it before a network is made."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_logger(name: str, out: Path) -> Logger | Literal[False]:
    """Build a logger in `out`; raises InputError that names the extra of a missing package."""
    package, extra = LOGGERS[name]
    if package is not None and importlib.util.find_spec(package) is None:
        source = f"gigasparse[{extra}]" if extra else package
        raise InputError(
            f"logger={name} needs the package {package}: `pip install '{source}'`, or logger=csv"
        )
    if name == "none":
        return False
    if name == "csv":
        return cast(Logger, CSVLogger(save_dir=out, name="logs"))
    return _build_foreign_logger(name, out)


class Selection(Checkpoint):
    """Keep the weights of the best epoch, stop early, and save the state to go on from.

    It is a Checkpoint in Lightning's sense, so that it runs after the epoch's scores exist.
    """

    def __init__(self, settings: FitSettings, path: Path) -> None:
        self.path = path
        self.weights: dict[str, Tensor] = {}
        self._settings = settings
        self._best_epoch = 0
        self._scores: dict[str, float] = {}
        self._epochs = 0
        self._seconds = 0.0
        self._served = Counter(engines_used())
        self._served_before: Counter[str] = Counter()
        self._saved_at = time.perf_counter()
        self._save_seconds = 0.0
        self._random: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End at once when the run had already lost its patience; draw on as the run before."""
        self._stop_early(trainer)
        if self._random:
            torch.set_rng_state(self._random["cpu"])
            if len(self._random["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self._random["cuda"])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save the state within a long epoch, between two steps of the optimiser."""
        every = self._settings.accumulate * (1 if trainer.world_size == 1 else _AGREE_EVERY)
        done = batch_idx + 1
        if not self._settings.save_last or done % every or done == trainer.num_training_batches:
            return
        pause = max(self._settings.save_seconds, self._save_seconds / _SAVE_SHARE)
        if trainer.strategy.broadcast(time.perf_counter() - self._saved_at >= pause):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the epoch with the best one; save the state when it is due."""
        task = cast(SequenceTask, pl_module)
        self._epochs += 1
        self._seconds += task.scores["seconds"]
        if not self.weights or self._is_better(task.scores):
            self._scores = dict(task.scores)
            self._best_epoch = self._epochs - 1
            weights = task.network.state_dict()
            self.weights = {key: value.detach().cpu().clone() for key, value in weights.items()}
        self._stop_early(trainer)
        ends = trainer.should_stop or self._epochs == trainer.max_epochs
        due = ends or time.perf_counter() - self._saved_at >= self._settings.save_seconds
        if self._settings.save_last and trainer.strategy.broadcast(due):
            self._save(trainer)

    def state_dict(self) -> dict[str, object]:
        """Return what a resumed run must know."""
        return {
            "weights": self.weights,
            "scores": self._scores,
            "best_epoch": self._best_epoch,
            "epochs": self._epochs,
            "seconds": self._seconds,
            "engine_calls": self._engine_calls(),
            "random": {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run before."""
        self.weights = state_dict["weights"]
        self._scores = state_dict["scores"]
        self._best_epoch = state_dict["best_epoch"]
        self._epochs = state_dict["epochs"]
        self._seconds = state_dict["seconds"]
        self._served_before = Counter(state_dict.get("engine_calls", {}))
        self._random = state_dict.get("random", {})

    def report(self, steps: int) -> FitReport:
        """Sum up the run."""
        return FitReport(
            epochs=self._epochs,
            steps=steps,
            seconds=self._seconds,
            best_epoch=self._best_epoch,
            scores=self._scores,
            engine_calls=self._engine_calls(),
        )

    def _engine_calls(self) -> dict[str, int]:
        return dict(self._served_before + Counter(engines_used()) - self._served)

    def _is_better(self, scores: Mapping[str, float]) -> bool:
        select = self._settings.select
        if select == "last":
            return True
        if select == "loss":
            return scores["val_loss"] < self._scores["val_loss"]

        def rank(of: Mapping[str, float]) -> tuple[float, float]:
            # a validation set of one class has no AUROC; equal scores are told apart by the loss
            return of.get(f"val_{select}", -math.inf), -of["val_loss"]

        return rank(scores) > rank(self._scores)

    def _stop_early(self, trainer: Trainer) -> None:
        patience = self._settings.patience
        if patience is not None and self._epochs - 1 - self._best_epoch >= patience:
            trainer.should_stop = True

    def _save(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        aside = aside_of(self.path)
        trainer.save_checkpoint(aside)
        if trainer.is_global_zero:
            os.replace(aside, self.path)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - started


class Progress(Callback):
    """Show a bar on a terminal, else a line for every tenth of the epochs."""

    def __init__(self, name: str, epochs: int, *, shown: bool) -> None:
        self._name = name
        self._epochs = epochs
        self._every = max(1, epochs // 10)
        self._shown = shown
        self._bar: tqdm[Never] | None = None
        self._started = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the epoch that the run goes on from."""
        self._shown = self._shown and trainer.is_global_zero
        if self._shown and sys.stdout.isatty():
            done = trainer.current_epoch
            self._bar = tqdm(
                total=self._epochs, initial=done, desc=self._name, unit="epoch", file=sys.stdout
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the epoch before this one, whose scores are complete now."""
        self._report(trainer.current_epoch, cast(SequenceTask, pl_module).scores)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last epoch and close the bar."""
        scores = cast(SequenceTask, pl_module).scores
        self._report(trainer.current_epoch, scores, last=True)
        if self._bar is not None:
            self._bar.close()

    def _report(self, epoch: int, scores: Mapping[str, float], *, last: bool = False) -> None:
        if not self._shown or not scores:
            return
        text = "  ".join(
            f"{title} {scores[key]:.3f}" for key, title in _SHOWN.items() if key in scores
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif last or epoch % self._every == 0:
            seconds = time.perf_counter() - self._started
            width = len(str(self._epochs))
            line = f"{self._name}  epoch {epoch:>{width}}/{self._epochs}  {text}  {seconds:.0f} s"
            print(line, flush=True)


# logger -> the package it needs beyond the base installation's, and the extra that brings it
LOGGERS: dict[str, tuple[str | None, str | None]] = {
    "none": (None, None),
    "csv": (None, None),
    "tensorboard": ("tensorboard", None),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow"),
}

_SHOWN = {
    "train_loss": "train loss",
    "val_loss": "val loss",
    "val_auroc": "val AUROC",
    "val_r2": "val R2",
    "val_c_index": "val c-index",
}

# not the user's to mend: batches are made in this process on purpose, the device was chosen, and
# Lightning itself makes LeafSpecs
_HINTS = (
    r".*does not have many workers.*",
    r".*GPU available but not used.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*`IterableDataset` has `__len__` defined.*",  # each worker makes its own batches
    # Lightning sets DDP up on a stream of its own (its issue 21567)
    r".*AccumulateGrad node's stream does not match.*",
)


class _Batches(LightningDataModule):
    """Make the loaders anew for each epoch: shuffled packing changes the number of batches."""

    def __init__(
        self,
        train: Examples,
        val: Examples,
        settings: FitSettings,
        objective: Objective,
        sample_weights: Sequence[float] | None,
    ) -> None:
        super().__init__()
        for examples, split in ((train, "training"), (val, "validation")):
            if len(examples) == 0:
                raise InputError(f"there is no {split} example; give more rows or another split")
        self._train = train
        self._val = val
        self._settings = settings
        self._objective = objective
        self._sample_weights = sample_weights
        # of objectives whose loss needs several sequences: the data know their targets unread
        self._targets: Sequence[Target] | None = (
            cast(Any, train).targets if objective.joint else None
        )

    def train_dataloader(self) -> Iterable[Packs]:
        assert self.trainer is not None, "the data module is attached to a trainer"
        epoch = self.trainer.current_epoch
        if isinstance(self._train, MakesBatches):
            return self._stream(self._train, epoch).loader(self._settings.num_workers)
        set_epoch = getattr(self._train, "set_epoch", None)  # of data that is augmented
        if set_epoch is not None:
            set_epoch(epoch)
        return self._loader(self._train, self._sampler(epoch))

    def val_dataloader(self) -> Iterable[Packs]:
        sampler = TokenBudgetBatches(self._val.lengths, self._settings.max_tokens)
        return self._loader(self._val, sampler)

    def count_epochs(self) -> int:
        """Return the number of epochs that hold `steps`, or as many as were asked for."""
        if self._settings.steps is None:
            return self._settings.epochs
        epochs, steps = 0, 0
        while steps < self._settings.steps:
            steps += self._steps_of(epochs)
            epochs += 1
        return epochs

    def count_steps(self) -> int:
        """Return the optimiser steps of all epochs."""
        return sum(self._steps_of(epoch) for epoch in range(self.count_epochs()))

    def _steps_of(self, epoch: int) -> int:
        if isinstance(self._train, MakesBatches):
            count = len(self._stream(self._train, epoch))
        else:
            count = len(self._sampler(epoch))
        return -(-count // self._settings.accumulate)

    @property
    def _batch_size(self) -> int | None:
        """Sequences of a batch of one device: a step then learns from as many on any number."""
        size, (_, num_ranks) = self._settings.batch_size, self._ranks
        return None if size is None else -(-size // num_ranks)

    @property
    def _ranks(self) -> tuple[int, int]:
        """Which process this is, and of how many."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _stream(self, data: MakesBatches, epoch: int) -> BatchStream:
        rank, num_ranks = self._ranks
        return data.batches(
            epoch=epoch,
            max_tokens=self._settings.max_tokens,
            max_sequences=self._batch_size,
            weights=self._sample_weights,
            rank=rank,
            num_ranks=num_ranks,
        )

    def _sampler(self, epoch: int) -> TokenBudgetBatches:
        rank, num_ranks = self._ranks
        sampler = TokenBudgetBatches(
            self._train.lengths,
            self._settings.max_tokens,
            max_sequences=self._batch_size,
            shuffle=True,
            seed=self._settings.seed,
            rank=rank,
            num_ranks=num_ranks,
            weights=self._sample_weights,
            suffices=None if self._targets is None else self._suffices,
        )
        sampler.set_epoch(epoch)
        return sampler

    def _suffices(self, indices: list[int]) -> bool:
        assert self._targets is not None, "asked of an objective that needs several examples"
        return self._objective.suffices([self._targets[index] for index in indices])

    def _collate(self, examples: list[Example]) -> tuple[PackedBatch, ...]:
        return pack_within(examples, self._settings.max_tokens)

    def _loader(self, examples: Examples, sampler: TokenBudgetBatches) -> ExampleLoader:
        return ExampleLoader(
            examples,
            sampler,
            collate=self._collate,
            num_workers=self._settings.num_workers,
            seed=self._settings.seed,
        )


def _build_foreign_logger(name: str, out: Path) -> Logger:
    from lightning.pytorch import loggers

    if name == "tensorboard":
        return cast(Logger, loggers.TensorBoardLogger(save_dir=out, name="logs"))
    out.mkdir(parents=True, exist_ok=True)
    if name == "wandb":
        return cast(Logger, loggers.WandbLogger(project="gigasparse", name=out.name, save_dir=out))
    if "MLFLOW_TRACKING_URI" not in os.environ:
        raise InputError("logger=mlflow needs MLFLOW_TRACKING_URI: set it to your server's address")
    return cast(Logger, loggers.MLFlowLogger(experiment_name="gigasparse", run_name=out.name))


def _close_logger(name: str) -> None:
    if name == "wandb":
        # else the next network of this process would continue its run
        importlib.import_module("wandb").finish()


def _run(trainer: Trainer, task: SequenceTask, data: _Batches, state: Path) -> None:
    """Fit, from the saved state where there is one; an interruption stays a KeyboardInterrupt."""
    if state.exists() and not zipfile.is_zipfile(state):
        raise InputError(f"{state} is damaged; delete it to train this network anew")
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(
            task,
            datamodule=data,
            ckpt_path=state if state.exists() else None,
            weights_only=True,
        )
    except SystemExit as stopped:
        if not trainer.interrupted or isinstance(stopped, Preempted):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from None


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silence tips and hardware tables; warnings other than `_HINTS` still show."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for hint in _HINTS:
                warnings.filterwarnings("ignore", message=hint)
            yield
    finally:
        logger.setLevel(level)
