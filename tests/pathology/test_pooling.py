"""Pooling models against their equations."""

import pytest
import torch

from pipelines.pathology.model import build_network, read_choice
from pipelines.pathology.pooling import KINDS, PoolingClassifier, smooth_svm
from pipelines.shared.batch import Example, PackedBatch, pack

LENGTHS = [7, 1, 30]


def draw(seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    return pack(
        [
            Example(
                torch.randn(length, 5, generator=generator), torch.zeros(length, 2).long(),
                number % 2, f"s{number}", "p", number,
            )
            for number, length in enumerate(LENGTHS)
        ]
    )  # fmt: skip


def build(kind: str, **settings: object) -> PoolingClassifier:
    torch.manual_seed(1)
    sizes = {"num_features": 5, "num_classes": 3, "hidden": [8], "attention_dim": 4}
    return PoolingClassifier(kind=kind, **sizes | settings).double()  # type: ignore[arg-type]


def tiles(network: PoolingClassifier, batch: PackedBatch) -> list[torch.Tensor]:
    return list(network.stem(batch.inputs, batch.lengths).split(LENGTHS))


@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_vector_are_those_of_the_equation(kind: str) -> None:
    network, batch = build(kind).eval(), draw()
    found = network(batch)
    pool = network.pool
    for row, h in enumerate(tiles(network, batch)):
        if kind == "mean":
            weights = torch.full((len(h),), 1 / len(h), dtype=h.dtype)
        elif kind == "max":
            torch.testing.assert_close(found.embedding[row], h.amax(0))
            continue
        else:
            score = (h @ pool.content.weight.T + pool.content.bias).tanh()
            if kind != "abmil":
                score = score * (h @ pool.gate.weight.T + pool.gate.bias).sigmoid()
            weights = (score @ pool.score.weight.T)[:, 0].softmax(0)
        torch.testing.assert_close(found.embedding[row], weights @ h)
        torch.testing.assert_close(found.attention.split(LENGTHS)[row], weights)
        torch.testing.assert_close(
            found.logits[row], network.head[1].weight @ (weights @ h) + network.head[1].bias
        )


@pytest.mark.parametrize("kind", KINDS)
def test_contributions_sum_to_the_output_less_the_bias(kind: str) -> None:
    network, batch = build(kind).eval(), draw()
    found = network(batch, explain=True)
    for row, part in enumerate(found.contributions.split(LENGTHS)):
        torch.testing.assert_close(part.sum(0) + network.head[1].bias, found.logits[row])
    assert network(batch).contributions is None


def test_order_of_tiles_does_not_matter() -> None:
    for kind in KINDS:
        network, batch = build(kind).eval(), draw()
        turned = PackedBatch(
            torch.cat([part.flip(0) for part in batch.inputs.split(LENGTHS)]), batch.coords,
            batch.lengths, batch.targets, batch.ids,
        )  # fmt: skip
        torch.testing.assert_close(network(batch).logits, network(turned).logits)


@pytest.mark.parametrize("subtyping", [False, True])
def test_clam_tells_its_highest_tiles_from_its_lowest(subtyping: bool) -> None:
    network = build("clam_sb", dropout=0.0, instances=3, subtyping=subtyping).train()
    batch = draw()
    found = network(batch)
    expected = []
    attention = found.attention.split(LENGTHS)
    for h, weights, label in zip(tiles(network, batch), attention, batch.targets, strict=True):
        count = max(1, min(3, len(h) // 2))
        order = weights.argsort(descending=True)
        chosen = torch.cat([h[order[:count]], h[order[-count:]]])
        labels = torch.tensor([1] * count + [0] * count)
        losses = [smooth_svm(network.tile_classifiers[label](chosen), labels)]
        if subtyping:
            others = [c for c in range(3) if c != label]
            losses += [smooth_svm(network.tile_classifiers[c](chosen[:count]), labels[-count:])
                       for c in others]  # fmt: skip
        expected.append(torch.stack(losses).mean())
    torch.testing.assert_close(found.auxiliary, 3 / 7 * torch.stack(expected).mean().double())
    assert network.eval()(batch).auxiliary is None


def test_smooth_svm_equals_its_definition() -> None:
    scores = torch.tensor([[2.0, -1.0], [0.5, 0.25]])
    labels = torch.tensor([0, 1])
    wanted = [
        torch.logsumexp(torch.tensor([2.0, -1.0 + 1]), 0) - 2.0,
        torch.logsumexp(torch.tensor([0.5 + 1, 0.25]), 0) - 0.25,
    ]
    torch.testing.assert_close(smooth_svm(scores, labels), torch.stack(wanted).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_choice_and_comes_back_from_its_values(kind: str) -> None:
    network = build_network({**read_choice(kind), "num_features": 5, "num_classes": 2})
    assert isinstance(network, PoolingClassifier)
    again = build_network(network.config)
    again.load_state_dict(network.state_dict())
    with pytest.raises(ValueError, match="is one of"):
        build("median")
