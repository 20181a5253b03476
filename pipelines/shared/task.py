"""Training of a network on an objective as a Lightning module."""

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipelines.shared.batch import PackedBatch
from pipelines.shared.objective import Objective, concatenate
from pipelines.shared.optim import OptimSettings, build_optimizer

Packs = Sequence[PackedBatch]
"""One training batch: more than one pack where a loss needs more sequences than a pack holds."""


class SequenceTask(LightningModule):
    """Train a network on an objective over packed sequences.

    A batch of several packs has one loss over all their sequences. Each pack then is computed
    twice, without and with its graph, so that memory holds one pack's activations and gradients
    are those of the joint loss, dropout included (gradient caching, Gao et al. 2021, done here by
    activation checkpointing of whole packs).

    A network may add a loss of its own: `auxiliary` of its output, a mean over the pack.
    Scores are computed once per epoch, into `scores` (`train_loss`, `val_loss`, `val_` and the
    objective's score, `lr`); nothing is logged per step.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        *,
        optim: OptimSettings,
        count_steps: Callable[[], int],
        seed: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.objective = objective
        self.scores: dict[str, float] = {}
        self._optim = optim
        self._count_steps = count_steps
        self._seed = seed
        self._train_losses: list[tuple[Tensor, int]] = []
        self._outputs: list[tuple[Tensor, Tensor]] = []
        self._started = 0.0

    def configure_optimizers(self) -> dict[str, object]:
        """Build the optimiser with a schedule over all steps of the run."""
        optimizer, schedule = build_optimizer(
            self.network,
            self._optim,
            total_steps=self._count_steps(),
            fused=self.trainer.precision == "32-true",
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_train_epoch_start(self) -> None:
        """Seed dropout by epoch, so that a resumed run goes on as it would have."""
        torch.manual_seed((self._seed << 20) + self.current_epoch)
        self._train_losses.clear()
        self._started = time.perf_counter()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what an unfinished epoch has come to."""
        checkpoint["epoch_so_far"] = {
            "losses": [float(loss) for loss, _ in self._train_losses],
            "counts": [count for _, count in self._train_losses],
            "seconds": time.perf_counter() - self._started,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with an unfinished epoch; one that begins forgets this."""
        before = checkpoint["epoch_so_far"]
        self._train_losses = [
            (torch.tensor(loss), count)
            for loss, count in zip(before["losses"], before["counts"], strict=True)
        ]
        self._started = time.perf_counter() - before["seconds"]

    def training_step(self, packs: Packs, batch_idx: int) -> Tensor:
        """Return the loss over the sequences of all packs."""
        results = [self._forward(pack, again=len(packs) > 1) for pack in packs]
        targets = concatenate([_targets(pack) for pack in packs])
        loss = self.objective.loss(concatenate([outputs for outputs, _ in results]), targets)
        self._train_losses.append((loss.detach(), len(targets)))
        for pack, (_, auxiliary) in zip(packs, results, strict=True):
            if auxiliary is not None:
                loss = loss + auxiliary * (len(pack.ids) / len(targets))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the outputs of the epoch before."""
        self._outputs.clear()

    def validation_step(self, packs: Packs, batch_idx: int) -> None:
        """Keep outputs and targets for the epoch's scores."""
        for pack in packs:
            self._outputs.append((self._forward(pack, again=False)[0], _targets(pack)))

    def on_train_epoch_end(self) -> None:
        """Compute the epoch's scores and hand them to the logger."""
        losses = torch.stack([loss.cpu() for loss, _ in self._train_losses])
        counts = torch.tensor([count for _, count in self._train_losses], dtype=losses.dtype)
        self.scores = {
            "train_loss": float((losses * counts).sum() / counts.sum()),
            "lr": float(self.trainer.optimizers[0].param_groups[0]["lr"]),
            "seconds": time.perf_counter() - self._started,
        }
        self.scores |= self._validation_scores()
        self.log_dict(self.scores, sync_dist=True)

    def _validation_scores(self) -> dict[str, float]:
        outputs = torch.cat([outputs for outputs, _ in self._outputs])
        targets = torch.cat([targets for _, targets in self._outputs])
        scores = {"val_loss": float(self.objective.loss(outputs, targets))}
        found = self.objective.evaluate(outputs.double().cpu().numpy(), targets.cpu().numpy())
        if found is not None:
            scores[f"val_{self.objective.score}"] = found
        return scores

    def _forward(self, pack: PackedBatch, *, again: bool) -> tuple[Tensor, Tensor | None]:
        """Return outputs and the network's own loss; `again` recomputes them in backward."""
        if not again:
            return self._compute(pack)
        found = checkpoint(self._compute, pack, use_reentrant=False)
        return cast(tuple[Tensor, Tensor | None], found)

    def _compute(self, pack: PackedBatch) -> tuple[Tensor, Tensor | None]:
        output = self.network(pack)
        return output.logits.float(), getattr(output, "auxiliary", None)


def _targets(pack: PackedBatch) -> Tensor:
    if pack.targets is None:
        raise ValueError(f"training needs targets; {pack.ids[0]!r} has none")
    return pack.targets
