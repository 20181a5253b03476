"""Classification of sequences as a Lightning module."""

import time
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int64
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.shared.batch import PackedBatch
from pipelines.shared.metrics import auroc
from pipelines.shared.optim import OptimSettings, build_optimizer


def balanced_weights(targets: Sequence[int], *, num_classes: int) -> list[float]:
    """Return a weight per class, inverse to its frequency, with mean 1 over the examples."""
    counts = Counter(targets)
    return [len(targets) / (num_classes * max(1, counts[label])) for label in range(num_classes)]


class ClassificationTask(LightningModule):
    """Train a network on the cross-entropy of packed sequences.

    Scores are computed once per epoch, into `scores` (`train_loss`, `val_loss`, `val_auroc`, `lr`);
    nothing is logged per step.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optim: OptimSettings,
        count_steps: Callable[[], int],
        seed: int,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.scores: dict[str, float] = {}
        self._optim = optim
        self._count_steps = count_steps
        self._seed = seed
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self._train_losses: list[tuple[Tensor, int]] = []
        self._outputs: list[tuple[Tensor, Tensor]] = []
        self._started = 0.0

    def configure_optimizers(self) -> dict[str, object]:
        """Build AdamW with a schedule over all steps of the run."""
        optimizer, schedule = build_optimizer(
            self.network, self._optim, total_steps=self._count_steps()
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

    def training_step(self, batch: PackedBatch, _: int) -> Tensor:
        """Return the mean loss over the batch's sequences."""
        logits, targets = self._forward(batch)
        loss = self._loss(logits, targets)
        self._train_losses.append((loss.detach(), len(targets)))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Forget the outputs of the epoch before."""
        self._outputs.clear()

    def validation_step(self, batch: PackedBatch, _: int) -> None:
        """Keep logits and targets for the epoch's scores."""
        self._outputs.append(self._forward(batch))

    def on_train_epoch_end(self) -> None:
        """Compute the epoch's scores and hand them to the logger."""
        losses = torch.stack([loss for loss, _ in self._train_losses]).cpu()
        counts = torch.tensor([count for _, count in self._train_losses], dtype=losses.dtype)
        self.scores = {
            "train_loss": float((losses * counts).sum() / counts.sum()),
            "lr": float(self.trainer.optimizers[0].param_groups[0]["lr"]),
            "seconds": time.perf_counter() - self._started,
        }
        self.scores |= self._validation_scores()
        self.log_dict(self.scores, sync_dist=True)

    def _validation_scores(self) -> dict[str, float]:
        logits = torch.cat([logits for logits, _ in self._outputs])
        targets = torch.cat([targets for _, targets in self._outputs])
        scores = {"val_loss": float(self._loss(logits, targets))}
        area = auroc(targets.cpu().numpy(), logits.cpu().numpy())
        if area is not None:
            scores["val_auroc"] = area
        return scores

    def _forward(self, batch: PackedBatch) -> tuple[Float[Tensor, "S C"], Int64[Tensor, " S"]]:
        if batch.targets is None:
            raise ValueError(f"training needs targets; {batch.ids[0]!r} has none")
        return self.network(batch).logits.float(), batch.targets

    def _loss(self, logits: Float[Tensor, "S C"], targets: Int64[Tensor, " S"]) -> Tensor:
        return cross_entropy(logits, targets, weight=self.class_weights)
