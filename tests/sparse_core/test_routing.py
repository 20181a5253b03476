from itertools import product

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_core import choosing, listing
from sparse_core.layout import BlockLayout
from sparse_core.listing import with_chosen
from sparse_core.nn import SparseEncoder
from sparse_core.patterns import Causal, GlobalTokens, Hierarchical, Pattern, Routed, SlidingWindow
from sparse_core.patterns.joined import check_axes, is_routed
from sparse_core.routing import (
    RoutedLayout,
    build_routed_layout,
    choose_blocks,
    describe_blocks,
    routed_attention,
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
    Routed(16, 2),
    Routed(8, 3, near=0),
    Routed(16, 2) & Causal(),
    Routed(16, 2) | GlobalTokens(2, (40,)),
    (Routed(8, 2, near=2) | GlobalTokens(1)) & Causal(),
]


def draw(tokens: int, dtype: torch.dtype = torch.float64, *, batch: int = 2) -> list[Tensor]:
    """q, k, v and the scores of tokens; four query heads, two key heads."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(batch, tokens, heads, 16) for heads in (4, 2, 2)] + [(batch, tokens, 2)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def block_of_token(routed: RoutedLayout) -> Tensor:
    """Which block each token belongs to; -1 for global tokens."""
    number = torch.arange(len(routed.tokens))[:, None].expand_as(routed.tokens)
    block = torch.full((routed.seen.num_queries,), -1)
    block[routed.tokens[routed.exists]] = number[routed.exists]
    return block


def averages(x: Tensor, scores: Tensor | None, routed: RoutedLayout, *, queries: bool) -> Tensor:
    """[B, T, Hkv, D] to [B, R, Hkv, D], block by block."""
    found = []
    for tokens, exists in zip(routed.tokens, routed.exists, strict=True):
        chosen = tokens[exists]
        if queries and routed.causal:
            inside = block_of_token(routed) >= 0
            earlier = inside.nonzero()[:, 0]
            end = int((earlier <= tokens[0]).sum())
            chosen = earlier[max(end - routed.tokens.shape[1], 0) : end]
        share = torch.ones_like(x[:, chosen, :, 0]) if scores is None else scores[:, chosen]
        share = share.softmax(1)
        found.append((x[:, chosen] * share[..., None]).sum(1))
    return torch.stack(found, 1) if found else x[:, :0]


def direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routed: RoutedLayout,
    chosen: Tensor,
    query_scores: Tensor | None = None,
    key_scores: Tensor | None = None,
) -> Tensor:
    """The same written out, differentiable by autograd, in one softmax over all tokens."""
    shared, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    about_q = averages(q.unflatten(2, (-1, shared)).mean(3), query_scores, routed, queries=True)
    about_k = averages(k, key_scores, routed, queries=False)
    gates = torch.einsum("brhd,bchd->bhrc", about_q, about_k) * scale
    gates = torch.nn.functional.pad(gates, (0, 1, 0, 1))  # global tokens' block is the last
    picked = torch.zeros(gates.shape, dtype=torch.bool)
    picked[:, :, :-1] = picked[:, :, :-1].scatter(3, chosen, True)
    picked[..., -1] = False
    block = block_of_token(routed)
    seen = routed.seen.counts() == 1
    pairs = picked[:, :, block[:, None], block]
    assert not (pairs & seen).any()
    added = torch.where(pairs, gates[:, :, block[:, None], block], 0)
    added, kept = (x.repeat_interleave(shared, 1) for x in (added, pairs | seen))
    k, v = (x.repeat_interleave(shared, 2) for x in (k, v))
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale + added
    return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~kept, -torch.inf).softmax(-1), v)


def gradients(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    found = torch.autograd.grad((out * weights.to(out)).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


@on_every_device
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize(("tokens", "learned"), [(1, False), (63, True), (129, False), (203, True)])
def test_results_and_gradients_are_those_written_out(
    pattern: Pattern, tokens: int, learned: bool, device: str
) -> None:
    dtypes = (torch.float64, torch.float32) if device == "cpu" else (torch.float32, torch.bfloat16)
    packed = [tokens // 3, 0, tokens - tokens // 3]
    for segments, dtype in product((None, packed), dtypes):
        routed = build_routed_layout(pattern, tokens, segments=segments)
        rounded = draw(tokens, dtype)[: 5 if learned else 3]
        exact = [x.double().requires_grad_() for x in rounded]
        leaves = [x.to(device).requires_grad_() for x in rounded]
        there = routed.to(device)
        scores = dict(zip(("query_scores", "key_scores"), leaves[3:], strict=False))
        chosen = choose_blocks(*describe_blocks(*leaves[:2], there, **scores), there)
        found = routed_attention(*leaves[:3], there, chosen=chosen, **scores)
        expected = direct(*exact[:3], routed, chosen.cpu(), *exact[3:])
        for x, right in zip(
            (found, *gradients(found, leaves)), (expected, *gradients(expected, exact)), strict=True
        ):
            error = (x.detach().double().cpu() - right).norm()
            assert error <= 3 * TOLERANCE[dtype] * max(right.norm(), expected.norm())


def test_the_reference_engine_agrees() -> None:
    q, k, v, *_ = draw(100)
    routed = build_routed_layout(PATTERNS[3], 100, segments=[30, 70])
    found = [routed_attention(q, k, v, routed, backend=b) for b in ("blockwise", "reference")]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_highest_scores_are_chosen_and_ties_go_to_the_first(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, segments = 500, [300, 7, 193]
    routed = build_routed_layout(pattern, tokens, segments=segments)
    num_blocks, near = len(routed.tokens), routed.num_near
    generator = torch.Generator().manual_seed(0)
    about = [torch.randint(-1, 2, (2, num_blocks, 3, 2), generator=generator).float() for _ in "qk"]
    found = choose_blocks(*about, routed)
    scores = torch.einsum("brhd,bchd->bhrc", *about)
    sequence = torch.arange(3).repeat_interleave(torch.tensor(segments))[routed.tokens[:, 0]]
    row, column = torch.arange(num_blocks)[:, None], torch.arange(num_blocks)
    may = (sequence[:, None] == sequence) & ((row - column).abs() > near)
    if routed.causal:
        may &= column < row
    scores = scores.masked_fill(~may, -torch.inf)
    ordered, order = torch.sort(scores, dim=3, descending=True, stable=True)
    expected = torch.where(ordered > -torch.inf, order, num_blocks)[..., : routed.num_chosen]
    assert torch.equal(found, expected)
    assert (found < num_blocks).any()
    monkeypatch.setattr(choosing, "CHUNK_NUMBERS", 1)
    for group, part in ((2, 1), (3, 3), (4, 2)):
        monkeypatch.setattr(choosing, "GROUP", group)
        monkeypatch.setattr(choosing, "PART", part)
        assert torch.equal(choose_blocks(*about, routed), expected)


class Watch(TorchDispatchMode):
    """Remember the largest result, and refuse what would make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2")
        assert name not in (*waits, "unique_dim", "unique_consecutive", "is_nonzero"), name
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), name
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, name
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        return result


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_choosing_never_asks_the_device(pattern: Pattern) -> None:
    q, k, *_ = draw(300, torch.float32)
    routed = build_routed_layout(pattern, 300, segments=[100, 200])
    with Watch():
        chosen = choose_blocks(*describe_blocks(q, k, routed), routed)
        layout = with_chosen(routed.seen, chosen, chosen < len(routed.tokens))
    assert layout.num_biases == chosen[0, 0].numel()


def test_blocks_times_blocks_are_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "CHUNK_NUMBERS", 2**18)
    tokens, heads = 2**16, 2
    routed = build_routed_layout(Routed(16, 4), tokens)
    about = torch.randn(1, 4096, heads, 2)
    with Watch() as watch:
        choose_blocks(about, about, routed)
    assert watch.largest < 2**18 + 4096 * heads * 8 < heads * 4096**2 // 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_never_waits() -> None:
    q, k, v, *_ = (x.cuda().requires_grad_() for x in draw(3000, torch.float32))
    routed = build_routed_layout(Routed(64, 4) | GlobalTokens(2), 3000, device="cuda")
    routed_attention(q, k, v, routed).sum().backward()
    torch.cuda.synchronize()
    with no_waiting():
        routed_attention(q, k, v, routed).sum().backward()


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("pattern", [*PATTERNS, Routed(16, 2) | GlobalTokens(16)], ids=str)
def test_lists_and_items_hold_each_choice_once(
    pattern: Pattern, split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if split:
        monkeypatch.setattr(listing, "ITEM_TOKENS", 16)
        monkeypatch.setattr(listing, "SHARE", 1)
    routed = build_routed_layout(pattern, 420, segments=[130, 290])
    num_blocks = len(routed.tokens)
    q, k, *_ = draw(420)
    k[:, 150] *= 1000  # a block that all would see
    chosen = choose_blocks(*describe_blocks(q, k, routed), routed)
    layout = with_chosen(routed.seen, chosen, chosen < num_blocks)
    part = layout.parts[-1]
    assert part.num_biases == chosen[0, 0].numel()
    for group, mine in enumerate(chosen.flatten(0, 1)):
        pairs = {(r, c) for r, row in enumerate(mine.tolist()) for c in row if c < num_blocks}
        for side, lists, turned in (("queries", "rows", False), ("keys", "columns", True)):
            check_launch(layout, side, lists, group)
            lists = getattr(part, lists)
            ptr, full = lists.ends(group)
            found = set()
            for row in range(num_blocks):
                entries = lists.index[ptr[row] : ptr[row + 1]].tolist()
                for members in (
                    entries[: full[row] - ptr[row]],
                    entries[full[row] - ptr[row] :],
                ):
                    assert len(members) == len(set(members))
                for place, other in enumerate(entries):
                    number = int(lists.bias[ptr[row] + place])
                    assert mine.flatten()[number] == (row if turned else other)
                    assert number // mine.shape[1] == (other if turned else row)
                    short = min(int(part.queries.count[x]) for x in (row, other))
                    assert (place >= full[row] - ptr[row]) == (short == part.queries.size)
                    found.add((other, row) if turned else (row, other))
            assert found == pairs
    if not routed.causal or not split:
        assert split == any((x.splits[..., 0] >= 0).any() for x in layout.schedule.keys.launches)


def check_launch(layout: BlockLayout, side: str, lists: str, group: int) -> None:
    """The launch of chosen blocks has every entry of its parts in one item, where they say."""
    agenda = getattr(layout.schedule, side)
    (launch,) = (x for x in agenda.launches if len(layout.parts) - 1 in x.part_numbers)
    lengths = [0] * len(getattr(layout.parts[launch.part_numbers[0]], side))
    for at, (number, places) in enumerate(zip(launch.part_numbers, launch.places, strict=True)):
        ptr, _ = getattr(layout.parts[number], lists).ends(group)
        for row in range(len(ptr) - 1):
            block = int(places[row]) if places.numel() else row
            lengths[block] += ptr[row + 1] - ptr[row]
            mine = launch.ranges[group, launch.items[group, :, 0] == block, at].tolist()
            visited = sorted(e for begin, _, end, *_ in mine for e in range(begin, end))
            assert visited == list(range(ptr[row], ptr[row + 1]))
    check_items(launch, group, lengths)


def check_items(launch, group: int, lengths: list[int]) -> None:  # type: ignore[no-untyped-def]
    """Every entry of every row is in one item; pieces have slots of their own."""
    items = [x for x in launch.items[group].tolist() if x[0] >= 0]
    splits = [x for x in launch.splits[group].tolist() if x[0] >= 0]
    slots = [slot for *_, slot in items if slot >= 0]
    assert len(set(slots)) == len(slots) == sum(n for *_, n in splits)
    assert all(slot < launch.num_slots for slot in slots)
    for row, length in enumerate(lengths):
        mine = sorted(x[1:] for x in items if x[0] == row)
        assert [first for first, *_ in mine] == [0, *(last for _, last, _ in mine[:-1])]
        assert mine[-1][1] == length
        known = [(first, number) for block, first, number in splits if block == row]
        assert known == ([(mine[0][2], len(mine))] if len(mine) > 1 else [])
        assert len(mine) == 1 or [x[2] for x in mine] == list(
            range(mine[0][2], mine[0][2] + len(mine))
        )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_router_learns_through_chosen_blocks_only(pattern: Pattern) -> None:
    """The scores of tokens act through what is added to chosen blocks, and in no other way."""
    tokens = 90
    q, k, v, query_scores, key_scores = draw(tokens, batch=1)
    routed = build_routed_layout(pattern, tokens)
    chosen = choose_blocks(*describe_blocks(q, k, routed), routed)
    chosen[chosen == 0] = len(routed.tokens)  # the first block is seen by its neighbours only
    scores = query_scores.requires_grad_(), key_scores.requires_grad_()

    def attend(query_scores: Tensor, key_scores: Tensor) -> Tensor:
        names = {"query_scores": query_scores, "key_scores": key_scores}
        return routed_attention(q, k, v, routed, chosen=chosen, **names)

    assert torch.autograd.gradcheck(attend, scores, fast_mode=True)
    _, by_key = gradients(attend(*scores), list(scores))
    block = block_of_token(routed)
    for head in range(2):
        named = [bool((chosen[0, head] == b).any()) for b in range(len(routed.tokens))]
        for b, is_named in enumerate(named):
            assert bool((by_key[0, block == b, head].abs() > 1e-9).any()) == is_named
        assert any(named)
        assert not named[0]


@pytest.mark.parametrize("pattern", [PATTERNS[0], PATTERNS[4]], ids=str)
def test_gradients_are_finite_differences_at_fixed_choice(pattern: Pattern) -> None:
    q, k, v, *_ = draw(70, batch=1)
    routed = build_routed_layout(pattern, 70, segments=[60, 10])
    chosen = choose_blocks(*describe_blocks(q, k, routed), routed)
    assert (chosen < len(routed.tokens)).any()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(
        lambda *x: routed_attention(*x, routed, chosen=chosen), leaves, fast_mode=True
    )


@pytest.mark.parametrize("pooling", ["mean", "learned"])
@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "Causal" in str(p)], ids=str)
def test_causal_routing_leaks_nothing(pattern: Pattern, pooling: str) -> None:
    q, k, v, *scores = draw(300, torch.float32)
    routed = build_routed_layout(pattern, 300)

    def attend(q: Tensor, k: Tensor, v: Tensor, *scores: Tensor) -> Tensor:
        names = zip(("query_scores", "key_scores"), scores, strict=False)
        return routed_attention(q, k, v, routed, **dict(names))

    given = [q, k, v, *(scores if pooling == "learned" else [])]
    before = attend(*given)
    for at in (1, 100, 143, 144, 145, 255):
        for only in (slice(at, at + 1), slice(at, None)):
            changed = [x.clone() for x in given]
            for x in changed:
                x[:, only] = x[:, only] * -3 + 10
            after = attend(*changed)
            assert torch.equal(before[:, :at], after[:, :at])
            assert not torch.equal(before[:, at:], after[:, at:])


def test_packing_changes_nothing() -> None:
    q, k, v, *_ = draw(150)
    for pattern in PATTERNS:
        alone = routed_attention(q, k, v, build_routed_layout(pattern, 150))
        twice = build_routed_layout(pattern, 300, segments=[150, 150])
        packed = routed_attention(*(torch.cat([x, x], 1) for x in (q, k, v)), twice)
        torch.testing.assert_close(packed, torch.cat([alone, alone], 1))


def test_all_blocks_may_be_chosen() -> None:
    q, k, *_ = draw(100)
    routed = build_routed_layout(Routed(16, 99), 100)
    chosen = choose_blocks(*describe_blocks(q, k, routed), routed)
    layout = with_chosen(routed.seen, chosen, chosen < len(routed.tokens))
    for group in range(4):
        assert (layout.counts(group) == 1).all()


def test_tissue_is_routed_in_its_order() -> None:
    q, k, v, *_ = draw(100, torch.float32)
    routed = build_routed_layout(Routed(16, 2), make_tissue(100))
    plain = build_routed_layout(Routed(16, 2), 100)
    assert torch.equal(routed_attention(q, k, v, routed), routed_attention(q, k, v, plain))


def make_encoder(pooling: str, *patterns: Pattern) -> SparseEncoder:
    torch.manual_seed(0)
    return SparseEncoder(32, len(patterns), 4, patterns, num_kv_heads=2, pooling=pooling)


@pytest.mark.parametrize("pooling", ["mean", "learned"])
def test_encoders_route(pooling: str) -> None:
    encoder = make_encoder(pooling, PATTERNS[3], PATTERNS[2])
    x = torch.randn(1, 150, 32, requires_grad=True)
    encoder(x, encoder.build_layouts(150)).square().sum().backward()
    assert torch.isfinite(x.grad).all()
    names = [name for name, p in encoder.named_parameters() if "pool" in name]
    assert len(names) == (2 if pooling == "learned" else 0)
    assert all(encoder.get_parameter(name).grad.any() for name in names)


def test_compiles_whole_and_new_lengths_do_not_recompile() -> None:
    torch._dynamo.reset()
    encoder, counter = make_encoder("learned", PATTERNS[3]), CompileCounter()
    compiled = torch.compile(encoder, fullgraph=True, backend=counter)
    for tokens in (100, 130, 257):
        x, layouts = torch.randn(1, tokens, 32), encoder.build_layouts(tokens)
        out = compiled(x, layouts)
        out.sum().backward()
        torch.testing.assert_close(out, encoder(x, layouts), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2


def test_traces_through_autograd() -> None:
    torch._dynamo.reset()
    encoder = make_encoder("mean", PATTERNS[3])
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    x, layouts = torch.randn(1, 100, 32), encoder.build_layouts(100)
    found = []
    for model in (compiled, encoder):
        encoder.zero_grad()
        model(x, layouts).square().sum().backward()
        found.append([p.grad.clone() for p in encoder.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_choice_is_a_sound_custom_op() -> None:
    routed = build_routed_layout(PATTERNS[0], 200)
    queries, keys = (torch.randn(1, 2, len(routed.tokens), 8) for _ in "qk")
    torch.library.opcheck(
        torch.ops.gigasparse.choose, (queries, keys, routed.low, routed.high, 1, 2)
    )
    chosen = choosing.choose(queries, keys, routed.low, routed.high, 1, 2)
    torch.library.opcheck(
        torch.ops.gigasparse.score_blocks,
        (queries.requires_grad_(), keys.requires_grad_(), chosen),
    )


def test_scores_of_choices_and_their_gradients_come_in_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queries, keys = (torch.randn(2, 3, 20, 4, dtype=torch.float64).requires_grad_() for _ in "qk")
    chosen = torch.randint(0, 20, (2, 3, 20, 5))
    expected = torch.einsum("bhrd,bhcd->bhrc", queries, keys).gather(3, chosen)
    weights = torch.randn_like(expected)
    for size in (2**20, 500, 1):
        monkeypatch.setattr(choosing, "CHUNK_NUMBERS", size)
        found = choosing.score_blocks(queries, keys, chosen)
        torch.testing.assert_close(found, expected)
        for ours, right in zip(
            *(torch.autograd.grad(x, (queries, keys), weights, retain_graph=True)
              for x in (found, expected)),
            strict=True,
        ):  # fmt: skip
            torch.testing.assert_close(ours, right)


def test_what_routes_is_known_and_refused_elsewhere() -> None:
    assert all(map(is_routed, PATTERNS))
    assert not is_routed(SlidingWindow(3) | GlobalTokens(1))
    with pytest.raises(ValueError, match="build_routed_layout"):
        PATTERNS[0].mask(9)
    with pytest.raises(ValueError, match="one Routed"):
        build_routed_layout(Routed(4) | SlidingWindow(3), 9)
    with pytest.raises(ValueError, match="one Routed"):
        build_routed_layout(Routed(4) | Hierarchical(3), 9)
    with pytest.raises(ValueError, match="one dimension only"):
        check_axes(Routed(4) & Causal(), 2)
    with pytest.raises(ValueError, match="order of their coordinates"):
        build_routed_layout(Routed(4) & Causal(), torch.tensor([3, 1, 2]))
    with pytest.raises(ValueError, match="top >= 1"):
        Routed(64, 0)
