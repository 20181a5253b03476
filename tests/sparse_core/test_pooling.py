from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_core import sparse_attention
from sparse_core.masking import KEEP_ALL
from sparse_core.nn import SparseEncoder
from sparse_core.patterns import Causal, GlobalTokens, Hierarchical, Pattern, SlidingWindow
from sparse_core.patterns.joined import is_pooled
from sparse_core.pooling import (
    PooledLayout,
    _group,
    _Spread,
    _Total,
    _with_entries,
    build_pooled_layout,
    pooled_attention,
)
from sparse_core.testing import TOLERANCE, make_tissue, no_waiting

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
on_every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=GPU)], ids=str
)
PATTERNS = [
    Hierarchical(cell=8),
    Hierarchical(cell=4, near=2, factor=2),
    Hierarchical(cell=8) & Causal(),
    Hierarchical(cell=4, factor=2) | GlobalTokens(2, (30,)),
    (Hierarchical(cell=4, near=2) | GlobalTokens(1)) & Causal(),
]


def members_of_cells(pooled: PooledLayout) -> Tensor:
    """[cells of all levels, tokens]: which tokens a cell stands for."""
    below = torch.eye(len(pooled.coords), dtype=torch.int64)
    found = []
    for level in pooled.levels:
        inside = (level.group_of < len(level.sizes)).nonzero()[:, 0]
        below = below.new_zeros(len(level.sizes), below.shape[1]).index_add_(
            0, level.group_of[inside], below[inside]
        )
        found.append(below)
    members = torch.cat(found) if found else below[:0]
    assert not found or torch.equal(members.sum(1), pooled.num_tokens)
    return members


def members_of_keys(pooled: PooledLayout) -> Tensor:
    """[keys, tokens]: which tokens a key stands for."""
    tokens = torch.eye(len(pooled.coords), dtype=torch.int64)
    return torch.cat([tokens, members_of_cells(pooled)[pooled.entries.group_of]])


def covered(pooled: PooledLayout) -> Tensor:
    """[queries, tokens]: in how many of the keys that a query sees a token stands."""
    return (pooled.layout.counts().float() @ members_of_keys(pooled).float()).long()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 203])
def test_every_token_stands_in_one_place(pattern: Pattern, tokens: int) -> None:
    for segments in (None, [tokens // 3, 0, tokens - tokens // 3]):
        pooled = build_pooled_layout(pattern, tokens, segments=segments)
        lengths = torch.tensor([tokens] if segments is None else segments)
        sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
        seen = sequence[:, None] == sequence
        found = covered(pooled)
        if "Causal" not in str(pattern):
            assert torch.equal(found, seen.long())
            continue
        before = torch.arange(tokens)[:, None] >= torch.arange(tokens)
        assert torch.equal(found, (seen & before).long())


@pytest.mark.parametrize("factor", [2, 3])
def test_every_tile_of_ragged_tissue_stands_in_one_place(factor: int) -> None:
    coords = make_tissue(300) + torch.tensor([5, -70])
    for near in (1, 2):
        pattern = Hierarchical(cell=2, near=near, factor=factor)
        pooled = build_pooled_layout(pattern, coords, segments=[100, 200])
        sequence = torch.arange(2).repeat_interleave(torch.tensor([100, 200]))
        assert torch.equal(covered(pooled), (sequence[:, None] == sequence).long())
        assert len(pooled.entries.group_of) > 0


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999), dims=st.integers(1, 2), cell=st.integers(1, 5),
    near=st.integers(1, 2), factor=st.integers(2, 4), levels=st.integers(1, 3),
    num_globals=st.integers(0, 2),
)  # fmt: skip
def test_within_reach_every_token_stands_in_one_place_and_none_in_two(
    seed: int, dims: int, cell: int, near: int, factor: int, levels: int, num_globals: int
) -> None:
    """Coordinates with gaps, repeats and any sign, in two sequences of different extent."""
    generator = torch.Generator().manual_seed(seed)
    coords = [torch.randint(-w, w, (60, dims), generator=generator) for w in (90, 7)]
    pattern = Hierarchical(cell, near=near, factor=factor, levels=levels)
    joined = pattern | GlobalTokens(num_globals) if num_globals else pattern
    pooled = build_pooled_layout(joined, torch.cat(coords), segments=[60, 60])
    found = covered(pooled)
    assert int(found.max()) == 1
    sequence = torch.arange(2).repeat_interleave(60)
    distance = (torch.cat(coords)[:, None] - torch.cat(coords)).abs().amax(-1)
    within = (distance <= near * cell * factor**levels) & (sequence[:, None] == sequence)
    place = torch.arange(60).repeat(2)
    ordinary = place >= num_globals
    assert (found[within & ordinary[:, None] & ordinary] == 1).all()
    assert (found[sequence[:, None] != sequence] == 0).all()
    met = (sequence[:, None] == sequence) & ~(ordinary[:, None] & ordinary)
    assert (found[met] == 1).all()


def test_levels_bound_the_reach() -> None:
    tokens = 400
    pattern = Hierarchical(cell=2, near=2, factor=2, levels=3)
    found = covered(build_pooled_layout(pattern, tokens))
    distance = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs()
    reach = pattern.near * pattern.cell * pattern.factor**3
    assert int(found.max()) == 1
    assert (found[distance <= reach] == 1).all()
    assert (found[distance > 2 * reach] == 0).all()


def test_a_million_tokens_need_few_keys() -> None:
    pooled = build_pooled_layout(Hierarchical(cell=256, near=2), 1_048_576)
    assert len(pooled.levels) == 6
    per_query = pooled.layout.visited_pairs() / 1_048_576
    assert 1280 < per_query < 1280 + 6 * 64
    assert pooled.layout.num_keys < 1.3 * 1_048_576


def test_blocks_of_tissue_see_what_they_need_and_little_else() -> None:
    """Cells of 8 x 8 tiles, in the order of a curve that does not follow them."""
    pooled = build_pooled_layout(Hierarchical(cell=8, factor=2), make_tissue(20_000))
    assert pooled.layout.visited_pairs() < 20_000 * (9 * 64 + 5 * 27)
    assert len(pooled.layout.schedule.queries.launches) == 1
    assert len(pooled.layout.schedule.keys.launches) == 1


@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[3], Hierarchical(cell=100)], ids=str)
def test_only_order_and_short_blocks_need_masks(pattern: Pattern) -> None:
    for part in build_pooled_layout(pattern, torch.arange(300).flip(0)).layout.parts:
        assert part.program == KEEP_ALL
        for lists, blocks in ((part.rows, part.keys), (part.columns, part.queries)):
            whole = (blocks.count == blocks.size)[lists.index.long()]
            entries = torch.arange(len(whole))
            row = torch.searchsorted(lists.ptr[0], entries, right=True) - 1
            assert torch.equal(whole, entries >= lists.full[0, row])


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 999), num_groups=st.integers(1, 9), rows=st.integers(1, 40),
    kind=st.sampled_from(["runs", "runs after some", "any"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
def test_totals_and_their_gradients_are_those_of_a_loop(
    seed: int, num_groups: int, rows: int, kind: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    group_of = torch.randint(num_groups + 1, (rows,), generator=generator)
    if kind != "any":
        group_of = torch.arange(rows) // -(-rows // num_groups)
        num_groups = int(group_of[-1]) + 1
    if kind == "runs after some":
        group_of = torch.cat([torch.full((3,), num_groups), group_of])
    groups = _group(group_of, num_groups)
    assert kind == "any" or groups.run
    x = torch.randn(2, len(group_of), 3, generator=generator).to(dtype).requires_grad_()
    chosen = torch.nn.functional.one_hot(group_of, num_groups + 1)[:, :num_groups].double()
    total = _Total.apply(x, groups)
    expected = torch.einsum("brd,rc->bcd", x.detach().double(), chosen)
    torch.testing.assert_close(total.double(), expected, rtol=0, atol=10 * TOLERANCE[dtype])
    weights = torch.randn(total.shape, generator=generator).to(dtype)
    (found,) = torch.autograd.grad(total, x, weights.to(total.dtype))
    assert torch.equal(found.double(), torch.einsum("bcd,rc->brd", weights.double(), chosen))
    spread = _Spread.apply(weights.requires_grad_(), groups)
    assert torch.equal(spread, found)
    (found,) = torch.autograd.grad(spread, weights, x.detach())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=10 * TOLERANCE[dtype])


@on_every_device
def test_results_are_the_same_in_every_run(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 2000, 2, 16, generator=generator).to(device) for _ in range(3)]
    leaves = [x.requires_grad_() for x in given]
    scores = torch.randn(2, 2000, 2, generator=generator).to(device).requires_grad_()
    for pattern, coords in ((PATTERNS[3], 2000), (Hierarchical(4), make_tissue(2000))):
        pooled = build_pooled_layout(pattern, coords, device=device)
        for more in ([], [scores]):
            runs = []
            for _ in range(3):
                out = pooled_attention(*leaves, pooled, scores=scores if more else None)
                runs.append((out, *gradients(out, leaves + more)))
            for results in zip(*runs, strict=True):
                assert all(torch.equal(results[0], other) for other in results[1:])


class Widest(TorchDispatchMode):
    """Remember the most bytes of a tensor that an operation wrote."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out._is_view() and 0 not in out.stride():
            self.most = max(self.most, out.numel() * out.element_size())
        return out


@pytest.mark.parametrize("globals_first", [0, 4])
def test_pooling_copies_no_tokens_in_float32(globals_first: int) -> None:
    pattern = Hierarchical(cell=16)
    joined = pattern | GlobalTokens(globals_first) if globals_first else pattern
    pooled = build_pooled_layout(joined, 5_000)
    x = torch.randn(1, 5_000, 2, 16).bfloat16().requires_grad_()
    with Widest() as widest:
        keys = _with_entries(x, pooled, None)
        torch.autograd.grad(keys, x, torch.ones_like(keys))
    assert widest.most == keys.numel() * keys.element_size()


def direct(q: Tensor, k: Tensor, v: Tensor, pooled: PooledLayout, scores: Tensor | None) -> Tensor:
    """The same written out: each key's average over its tokens, then one softmax."""
    members = members_of_keys(pooled).to(q)
    if scores is None:
        weights = (members / members.sum(1, keepdim=True))[None, :, :, None]
    else:
        inside = torch.where(members[None, :, :, None] > 0, scores[:, None], -torch.inf)
        weights = inside.softmax(2)
    keys = torch.einsum("bnth,bthd->bnhd", weights.expand(len(q), -1, -1, k.shape[2]), k)
    values = torch.einsum("bnth,bthd->bnhd", weights.expand(len(q), -1, -1, k.shape[2]), v)
    shared = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(shared, 2) for x in (keys, values))
    logits = torch.einsum("bqhd,bnhd->bhqn", q, keys) * q.shape[-1] ** -0.5
    logits = logits + members.sum(1).log()
    logits = logits.masked_fill(pooled.layout.counts() == 0, -torch.inf)
    return torch.einsum("bhqn,bnhd->bqhd", logits.softmax(-1), values)


@on_every_device
@pytest.mark.parametrize("learned", [False, True], ids=["mean", "learned"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_results_and_gradients_are_those_written_out(
    pattern: Pattern, learned: bool, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = (torch.float64, torch.float32) if device == "cpu" else (torch.float32, torch.bfloat16)
    shapes = [(2, 100, 4, 16), (2, 100, 2, 16), (2, 100, 2, 16), (2, 100, 2)]
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for segments, dtype in product((None, [30, 70]), dtypes):
        pooled = build_pooled_layout(pattern, 100, segments=segments)
        rounded = [x.to(dtype) for x in given[: 3 + learned]]
        exact = [x.double().requires_grad_() for x in rounded]
        leaves = [x.to(device).requires_grad_() for x in rounded]
        found = pooled_attention(
            *leaves[:3], pooled.to(device), scores=leaves[3] if learned else None
        )
        expected = direct(*exact[:3], pooled, exact[3] if learned else None)
        for x, right in zip(
            (found, *gradients(found, leaves)), (expected, *gradients(expected, exact)), strict=True
        ):
            error = (x.detach().double().cpu() - right).norm() / right.norm()
            assert error < 3 * TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_never_waits() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, 3000, 2, 16, generator=generator).cuda() for _ in range(3)]
    q, k, v = (x.requires_grad_() for x in leaves)
    scores = torch.randn(1, 3000, 2, generator=generator).cuda().requires_grad_()
    pooled = build_pooled_layout(Hierarchical(cell=16) | GlobalTokens(2), 3000, device="cuda")
    pooled_attention(q, k, v, pooled, scores=scores).sum().backward()
    torch.cuda.synchronize()
    with no_waiting():
        pooled_attention(q, k, v, pooled, scores=scores).sum().backward()


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return torch.autograd.grad((out * weights.to(out)).sum(), leaves)


def test_causal_pooling_leaks_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 300, 2, 8, generator=generator) for _ in range(3))
    pooled = build_pooled_layout(PATTERNS[-1], 300)
    before = pooled_attention(q, k, v, pooled)
    for at in (1, 100, 255):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, at:] += 10
        after = pooled_attention(*changed, pooled)
        assert torch.equal(before[:, :at], after[:, :at])
        assert not torch.equal(before[:, at:], after[:, at:])


def test_causal_cells_hold_nothing_later() -> None:
    """One changed token is enough to tell; learned pooling, layers upon layers, global tokens."""
    torch.manual_seed(0)
    encoder = SparseEncoder(16, 2, 2, PATTERNS[-1], pooling="learned").eval()
    for layer in encoder.layers:
        torch.nn.init.normal_(layer.attention.pool_by)
    x, layouts = torch.randn(1, 200, 16), encoder.build_layouts(200, segments=[50, 150])
    before = encoder(x, layouts)
    for at in (0, 49, 50, 113, 199):
        changed = x.clone()
        changed[:, at] -= 3
        after = encoder(changed, layouts)
        end = 50 if at < 50 else 200
        same = (after == before).all(-1)[0]
        assert same[:at].all()
        assert same[end:].all()
        assert not same[at]
        assert at + 20 >= end or not same[at + 20 : end].all()


def test_moving_and_packing_change_nothing() -> None:
    coords = make_tissue(200)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 200, 2, 8, generator=generator) for _ in range(3))
    pattern = Hierarchical(cell=2, factor=2) | GlobalTokens(2)
    alone = pooled_attention(q, k, v, build_pooled_layout(pattern, coords))
    moved = build_pooled_layout(pattern, coords + torch.tensor([37, 1001]))
    assert torch.equal(pooled_attention(q, k, v, moved), alone)
    twice = build_pooled_layout(pattern, torch.cat([coords, coords + 9]), segments=[200, 200])
    packed = pooled_attention(*(torch.cat([x, x], 1) for x in (q, k, v)), twice)
    torch.testing.assert_close(packed, torch.cat([alone, alone], 1), rtol=1e-5, atol=1e-6)


def test_cells_that_all_are_near_leave_plain_attention() -> None:
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    pooled = build_pooled_layout(Hierarchical(cell=16), 20)
    assert not pooled.levels
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    torch.testing.assert_close(pooled_attention(q, k, v, pooled), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "learned"])
def test_encoders_pool(pooling: str) -> None:
    torch.manual_seed(0)
    encoder = SparseEncoder(32, 2, 4, PATTERNS[3], num_kv_heads=2, pooling=pooling)
    x = torch.randn(1, 150, 32, requires_grad=True)
    encoder(x, encoder.build_layouts(150)).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    names = [name for name, p in encoder.named_parameters() if "pool" in name]
    assert len(names) == (2 if pooling == "learned" else 0)
    assert all(encoder.get_parameter(name).grad.any() for name in names)


def test_what_pools_is_known_and_refused_elsewhere() -> None:
    assert all(map(is_pooled, PATTERNS))
    assert not is_pooled(SlidingWindow(3) | GlobalTokens(1))
    with pytest.raises(ValueError, match="build_pooled_layout"):
        PATTERNS[0].mask(9)
    with pytest.raises(ValueError, match="one Hierarchical"):
        build_pooled_layout(Hierarchical(4) | SlidingWindow(3), 9)
    with pytest.raises(ValueError, match="one dimension only"):
        build_pooled_layout(Hierarchical(4) & Causal(), make_tissue(9))
    q = torch.zeros(1, 9, 1, 8)
    with pytest.raises(ValueError, match="layout is for"):
        sparse_attention(q, q, q, build_pooled_layout(Hierarchical(2), 9).layout)
