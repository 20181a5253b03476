"""The parts of the network, and that a sequence's result does not depend on its batch."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor, nn

from pipelines.shared.batch import Example, PackedBatch, pack
from pipelines.shared.network import (
    ConvolutionStem,
    SequenceClassifier,
    SequenceNorm,
    build_pooling,
    token_of_input,
)

LENGTHS = [13, 1, 40, 8]


def build(stride: int = 1, **architecture: object) -> SequenceClassifier:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "dim": 8,
        "depth": 2,
        "num_heads": 2,
        "pattern": "SlidingWindow(radius=4) | GlobalTokens(first=2)",
        "num_classes": 3,
    }
    stem = ConvolutionStem(5, 8, kernel=5, stride=stride)
    return SequenceClassifier(stem, coord_dims=1, **settings | architecture)  # type: ignore[arg-type]


def draw(lengths: list[int], seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Example(
            torch.randint(5, (length,), generator=generator),
            torch.arange(length)[:, None],
            number % 3,
            f"e{number}",
            f"e{number}",
            number,
        )
        for number, length in enumerate(lengths)
    ]


def settle(network: nn.Module, batch: PackedBatch) -> None:
    """Let running estimates see some batches."""
    network.train()
    for _ in range(3):
        network(batch)
    network.eval()


@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("head_norm", ["layer", "batch"])
@pytest.mark.parametrize("pooling", ["attention", "mean", "max", "mean+max", "max+attention+mean"])
def test_a_result_does_not_depend_on_the_batch(pooling: str, head_norm: str, stride: int) -> None:
    network = build(stride, pooling=pooling, head_norm=head_norm).double()
    examples = draw(LENGTHS)
    settle(network, pack(examples))
    with torch.inference_mode():
        together = network(pack(examples))
        alone = [network(pack([example])) for example in examples]
        backwards = network(pack(examples[::-1]))
    torch.testing.assert_close(together.logits, torch.cat([one.logits for one in alone]))
    torch.testing.assert_close(together.logits, backwards.logits.flip(0))
    torch.testing.assert_close(together.attention, torch.cat([one.attention for one in alone]))
    totals = torch.stack([part.sum() for part in together.attention.split(LENGTHS)])
    torch.testing.assert_close(totals, torch.ones_like(totals))


@pytest.mark.parametrize("pattern", ["Routed(block=4, top=2)", "Hierarchical(cell=4)"])
def test_patterns_that_route_or_pool_serve_too(pattern: str) -> None:
    network = build(pattern=f"{pattern} | GlobalTokens(first=2)").double().eval()
    examples = draw(LENGTHS)
    together = network(pack(examples)).logits
    alone = [network(pack([example])).logits for example in examples]
    torch.testing.assert_close(together, torch.cat(alone))
    together.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_the_default_keeps_the_weights_that_it_had() -> None:
    names = set(build().state_dict())
    assert {"pool.content.weight", "head.0.weight", "head.2.weight"} < names
    assert not any("mean" in name for name in names)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "median"}, "attention, mean, max.*'median'"),
        ({"pooling": "mean+"}, "attention, mean, max"),
        ({"pooling": "mean+mean"}, "twice"),
        ({"head_norm": "group"}, "layer or batch; got 'group'"),
        ({"stride": 0}, "stride must be at least 1"),
    ],
)
def test_wrong_names_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**settings)  # type: ignore[arg-type]


def test_several_poolings_stand_side_by_side() -> None:
    x = torch.randn(10, 4)
    segment = torch.tensor([0] * 3 + [1] * 7)
    both, weights = build_pooling(4, "max+mean")(x, segment, 2)
    expected = torch.stack([torch.cat([part.amax(0), part.mean(0)]) for part in x.split([3, 7])])
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(weights[:3].sum(), torch.tensor(1.0))


def test_without_registers_several_poolings_work_too() -> None:
    network = build(pattern="SlidingWindow(radius=3)", pooling="mean+max", head_norm="batch")
    assert network(pack(draw(LENGTHS))).logits.shape == (4, 3)


def test_half_precision_counts_every_token() -> None:
    network = build(pattern=None).eval()
    batch = pack(draw([5_000, 300]))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        output = network(batch)
    with torch.inference_mode():
        exact = network(batch)
    totals = torch.stack([part.sum() for part in output.attention.split([5_000, 300])])
    torch.testing.assert_close(totals, torch.ones(2))
    torch.testing.assert_close(output.logits.float(), exact.logits, rtol=0.05, atol=0.02)


def test_a_token_stands_for_as_many_inputs_as_the_stride() -> None:
    stem = ConvolutionStem(5, 8, kernel=3, stride=4).double()
    examples = draw([10, 4])
    batch = pack(examples)
    tokens = stem(batch.inputs, batch.lengths)
    fine = ConvolutionStem(5, 8, kernel=3).double()
    fine.load_state_dict(stem.state_dict())
    hidden = fine(batch.inputs, batch.lengths)
    expected = torch.stack([hidden[i:j].mean(0) for i, j in [(0, 4), (4, 8), (8, 10), (10, 14)]])
    torch.testing.assert_close(tokens, expected)


def test_tokens_keep_the_coordinates_of_inputs() -> None:
    network = build(stride=4)
    batch = pack(draw([10, 4]))
    layout = network.build_layouts(batch)[0]
    registers = [0, 0]
    assert layout.query_coords[:, 0].tolist() == [*registers, 0, 4, 8, *registers, 0]
    assert layout.lengths.tolist() == [5, 3]


def test_layouts_serve_again_where_tokens_stand_as_before() -> None:
    network = build()
    first, again = (pack(draw([10, 4], seed)) for seed in (0, 1))
    layouts = network.build_layouts(first)
    assert network.build_layouts(again) is layouts
    shifted = replace(again, coords=again.coords + (again.coords > 3))
    for other in (pack(draw([4, 10])), shifted, first):
        found = network.build_layouts(other)
        assert found is not layouts
        assert (
            found[0].query_coords.tolist() == build().build_layouts(other)[0].query_coords.tolist()
        )
        layouts = found
    with torch.inference_mode():
        assert network.build_layouts(first) is not layouts
    network(first).logits.sum().backward()


def test_inputs_know_their_tokens() -> None:
    owner, share = token_of_input(torch.tensor([5, 1, 4]), 2)
    assert owner.tolist() == [0, 0, 1, 1, 2, 3, 4, 4, 5, 5]
    assert share.tolist() == [2, 2, 1, 1, 2, 2]


def test_batches_are_standardised_as_by_batch_normalisation() -> None:
    ours, theirs = SequenceNorm(6).double(), nn.BatchNorm1d(6, eps=1e-8).double()
    x = torch.randn(9, 6, dtype=torch.float64) * 3 + 5
    grads = []
    for norm in (ours, theirs):
        inputs = x.clone().requires_grad_()
        out = norm(inputs)
        (out * torch.arange(6)).square().sum().backward()
        grads.append((out, inputs.grad, norm.weight.grad, norm.bias.grad))
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference)


def test_estimates_are_those_of_the_sequences_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([1e-3, 1e-2, 1.0])
    mean = torch.tensor([1.0, -3.0, 0.0])
    norm = SequenceNorm(3)
    for _ in range(300):
        norm(torch.randn(16, 3, generator=generator) * spread + mean)
    norm.eval()
    torch.testing.assert_close(norm.mean, mean, rtol=0, atol=0.2)
    torch.testing.assert_close(norm.variance.sqrt(), spread, rtol=0.2, atol=0)
    fresh = norm(torch.randn(999, 3, generator=generator) * spread + mean)
    torch.testing.assert_close(fresh.std(0), torch.ones(3), rtol=0.2, atol=0)


def test_single_sequences_are_standardised_by_the_estimates() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = SequenceNorm(3)
    for _ in range(400):
        x = (torch.randn(1, 3, generator=generator) * 0.1 + 2).requires_grad_()
        out = norm(x)
        assert out.isfinite().all()
    out.sum().backward()
    assert x.grad is not None
    assert (x.grad > 0.1).all()
    torch.testing.assert_close(norm.mean, torch.full((3,), 2.0), rtol=0, atol=0.15)
    assert ((norm.variance > 0.003) & (norm.variance < 0.03)).all()


def test_half_precision_leaves_statistics_whole() -> None:
    norm = SequenceNorm(4)
    x = torch.randn(8, 4) * 0.01 + 100
    expected = SequenceNorm(4)(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected)


def test_evaluation_changes_no_estimate() -> None:
    norm = SequenceNorm(2).eval()
    norm(torch.randn(5, 2))
    assert norm.num_steps == 0
    assert norm.mean.tolist() == [0, 0]


def _normalise_part(rank: int, folder: str, parts: list[Tensor]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(parts)
    )
    norm = SequenceNorm(3).double()
    x = parts[rank].clone().requires_grad_()
    out = norm(x)
    out.pow(3).sum().backward()
    torch.save((out.detach(), x.grad, norm.mean, norm.variance), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_their_statistics(tmp_path: Path) -> None:
    parts = [torch.randn(count, 3, dtype=torch.float64) + 4 for count in (5, 1)]
    torch.multiprocessing.spawn(_normalise_part, (str(tmp_path), parts), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    norm = SequenceNorm(3).double()
    x = torch.cat(parts).requires_grad_()
    out = norm(x)
    out.pow(3).sum().backward()
    torch.testing.assert_close(torch.cat([part[0] for part in found]), out)
    torch.testing.assert_close(torch.cat([part[1] for part in found]), x.grad)
    for part in found:
        torch.testing.assert_close(part[2:], (norm.mean, norm.variance))


@pytest.mark.parametrize("stride", [1, 3])
def test_contributions_are_slopes_times_what_a_token_is_beside_the_mean(stride: int) -> None:
    network = build(stride, pooling="mean+max").double().eval()
    batch = pack(draw(LENGTHS))
    with torch.no_grad():
        found = network(batch, explain=True)
        torch.testing.assert_close(found.logits, network(batch).logits)
        tokens = network.stem(batch.inputs, batch.lengths)
        parts = tokens.split([-(-length // stride) for length in LENGTHS])
        away = torch.cat([part - part.mean(0) for part in parts])
        step = 1e-6
        moved = [network._read(tokens + sign * step * away, batch).logits for sign in (1, -1)]
    slope = (moved[0] - moved[1]) / (2 * step)
    sums = torch.stack([part.sum(0) for part in found.contributions.split(LENGTHS)])
    torch.testing.assert_close(sums, slope, rtol=1e-4, atol=1e-6)
