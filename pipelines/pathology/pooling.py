"""Models that pool a slide's tiles without looking at where they lie: what ours must beat.

Each tile goes through the same layers, h_k; the slide's vector is z = sum over k of a_k h_k, and
one linear layer reads it. Kinds:

    mean         a_k = 1 / N
    max          the largest value of each channel; a_k is the share of channels that tile k gave
    abmil        a_k = softmax of w' tanh(V h_k): attention pooling (Ilse et al., ICML 2018, eq. 8)
    gated_abmil  a_k = softmax of w' (tanh(V h_k) * sigmoid(U h_k)) (there, equation 9)
    clam_sb      gated attention whose highest and lowest tiles are told apart by a classifier of
                 tiles while training (CLAM-SB, Lu et al., Nature Biomedical Engineering 2021)
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from pipelines.shared.batch import PackedBatch
from pipelines.shared.network import (
    FeatureStem,
    NetworkOutput,
    SequencePooling,
    segment_softmax,
)

KINDS = ("mean", "max", "abmil", "gated_abmil", "clam_sb")


class AttentionPooling(SequencePooling):
    """Attention of `attention_dim` hidden units, gated or not (Ilse et al. 2018, eqs. 8 and 9)."""

    def __init__(self, dim: int, attention_dim: int, *, gated: bool) -> None:
        super().__init__(dim, "mean")
        self.content = nn.Linear(dim, attention_dim)
        self.gate = nn.Linear(dim, attention_dim) if gated else None
        self.score = nn.Linear(attention_dim, 1)

    def _weights(
        self, x: Float[Tensor, "T E"], segment: Int64[Tensor, " T"], num_sequences: int
    ) -> Float[Tensor, " T"]:
        hidden = self.content(x).tanh()
        if self.gate is not None:
            hidden = hidden * self.gate(x).sigmoid()
        return segment_softmax(self.score(hidden)[:, 0].to(x.dtype), segment, num_sequences)


class PoolingClassifier(nn.Module):
    """Layers for each tile, a pooling (`kind`, see the module), a linear layer.

    `hidden` are the widths of the tiles' layers, each with ReLU and `dropout`; none (an empty list)
    leaves the features as they are. For clam_sb, `instance_weight` is the share of the tiles' loss
    beside the slide's 1, `instances` the number of tiles from either end of the attention, and
    `subtyping` adds that the highest tiles of a slide show none of the other classes, for classes
    that exclude each other. Its loss is the smooth top-1 SVM's (Berrada et al. 2018, equation 5,
    margin and temperature 1).

    `config` holds what `PoolingClassifier(**config)` needs.
    """

    stem: FeatureStem

    def __init__(
        self,
        *,
        kind: str,
        num_features: int,
        num_classes: int,
        hidden: list[int],
        attention_dim: int = 128,
        dropout: float = 0.25,
        instances: int = 8,
        instance_weight: float = 3 / 7,
        subtyping: bool = False,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"model.kind is one of {', '.join(KINDS)}; got {kind!r}")
        self.config: dict[str, object] = {
            "kind": kind,
            "num_features": num_features,
            "num_classes": num_classes,
            "hidden": list(hidden),
            "attention_dim": attention_dim,
            "dropout": dropout,
            "instances": instances,
            "instance_weight": instance_weight,
            "subtyping": subtyping,
        }
        widths = [num_features, *hidden]
        layers = [
            part
            for before, after in pairwise(widths)
            for part in (nn.Linear(before, after), nn.ReLU(), nn.Dropout(dropout))
        ]
        dim = widths[-1]
        self.stem = FeatureStem(num_features, dim, nn.Sequential(*layers))
        self.pool: SequencePooling = (
            SequencePooling(dim, kind)
            if kind in ("mean", "max")
            else AttentionPooling(dim, attention_dim, gated=kind != "abmil")
        )
        self.head = nn.Sequential(nn.Identity(), nn.Linear(dim, num_classes))
        self.tile_classifiers = (
            nn.ModuleList(nn.Linear(dim, 2) for _ in range(num_classes))
            if kind == "clam_sb"
            else None
        )
        self.instances, self.instance_weight = instances, instance_weight
        self.subtyping = subtyping

    def forward(self, batch: PackedBatch, *, explain: bool = False) -> NetworkOutput:
        """Score every sequence; in training, clam_sb adds the loss of its tiles.

        A tile's contribution is its share of the pooled vector through the head: attention times
        the head of the tile. Over a slide they sum to the logits less the head's bias.
        """
        x = self.stem(batch.inputs, batch.lengths)
        number = torch.arange(batch.lengths.numel(), device=x.device)
        segment = number.repeat_interleave(batch.lengths.to(x.device), output_size=len(x))
        pooled, attention = self.pool(x, segment, batch.lengths.numel())
        contributions = None
        if explain:
            shares = self.pool.shares(x, segment, batch.lengths.numel())
            contributions = shares @ self.head[1].weight.to(shares.dtype).T
        auxiliary = None
        if self.tile_classifiers is not None and self.training and batch.targets is not None:
            auxiliary = self.instance_weight * self._tile_loss(x, attention, batch)
        return NetworkOutput(self.head(pooled), attention, pooled, contributions, auxiliary)

    def _tile_loss(
        self, x: Float[Tensor, "T E"], attention: Float[Tensor, " T"], batch: PackedBatch
    ) -> Float[Tensor, ""]:
        """Mean over the sequences of the loss of their highest and lowest tiles."""
        assert batch.targets is not None, "asked in training only"
        lengths = batch.lengths.tolist()
        parts = zip(x.split(lengths), attention.split(lengths), batch.targets, strict=True)
        losses = [self._loss_of(tiles, weights, int(label)) for tiles, weights, label in parts]
        return torch.stack(losses).mean()

    def _loss_of(
        self, tiles: Float[Tensor, "N E"], weights: Float[Tensor, " N"], label: int
    ) -> Float[Tensor, ""]:
        """One slide: highest tiles show its class, lowest do not (CLAM's attention branch)."""
        assert self.tile_classifiers is not None, "asked of clam_sb only"
        count = max(1, min(self.instances, len(tiles) // 2))
        order = weights.detach().argsort(descending=True, stable=True)
        highest, lowest = tiles[order[:count]], tiles[order[-count:]]
        ones = torch.ones(count, dtype=torch.int64, device=tiles.device)
        both = self.tile_classifiers[label](torch.cat([highest, lowest]))
        losses = [smooth_svm(both, torch.cat([ones, ones * 0]))]
        if self.subtyping:
            others = [c for number, c in enumerate(self.tile_classifiers) if number != label]
            losses += [smooth_svm(other(highest), ones * 0) for other in others]
        return torch.stack(losses).mean()


def smooth_svm(scores: Float[Tensor, "N C"], labels: Int64[Tensor, " N"]) -> Float[Tensor, ""]:
    """Smooth top-1 SVM loss with margin 1 and temperature 1: cross-entropy with a margin.

    log of the sum over classes of exp(score + 1 if the class is wrong), less the right score.
    """
    margin = torch.ones_like(scores).scatter_(1, labels[:, None], 0.0)
    return cross_entropy(scores.float() + margin, labels)
