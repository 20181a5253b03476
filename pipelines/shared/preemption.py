"""Stop a training when the cluster wants the machine back: SIGUSR1, as SLURM's --signal sends."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lightning.pytorch import Callback, LightningModule, Trainer

from pipelines.shared.batch import PackedBatch

EXIT_CODE = 75
"""Of a run that was asked to stop and goes on when it is started again (EX_TEMPFAIL)."""


class Preempted(SystemExit):
    """The run stopped at SIGUSR1; the same command goes on with it."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Preemption(Callback):
    """End the training after the step in which SIGUSR1 came, in all processes alike."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signal while a training runs; before and after it ends the process.

        Lightning leaves a signal alone that has a handler, so that nothing else is done at it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGUSR1, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGUSR1, before)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: tuple[PackedBatch, ...],
        batch_idx: int,
    ) -> None:
        """Stop if any process was asked to."""
        asked = self.asked
        if trainer.world_size > 1:
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            print("SIGUSR1: stopped; the same command goes on", flush=True)
            raise Preempted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
