import time
from dataclasses import dataclass, is_dataclass

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_core import BlockLayout, build_layout, concat, merge, stack
from sparse_core.layout import Lists
from sparse_core.patterns import (
    BlockList,
    Causal,
    Dense,
    DilatedSegments,
    DilatedWindow,
    GlobalTokens,
    Hierarchical,
    Pattern,
    RandomBlocks,
    Routed,
    SlidingWindow,
    Strided,
)
from sparse_core.patterns.terms import Tokens
from sparse_core.pooling import build_pooled_layout
from sparse_core.routing import build_routed_layout
from sparse_core.testing import make_tissue


@dataclass(frozen=True, repr=False)
class EvenSum(Pattern):
    """A pattern that no terms express."""

    modulus: int = 2

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        return (query.coords[..., 0] * key.coords[..., 0]) % self.modulus == 0


PATTERNS = [
    Dense(),
    Causal(),
    SlidingWindow(5),
    SlidingWindow(left=40, right=3),
    DilatedWindow(3, 4),
    Strided(4),
    Strided(3, block=16),
    GlobalTokens(3),
    GlobalTokens(2, (50, 7)),
    RandomBlocks(2, 16),
    BlockList(((0, 1), (2, 0), (1, 1)), 16),
    EvenSum(3),
    SlidingWindow(20) | GlobalTokens(2) | RandomBlocks(2, 16, seed=3),
    (SlidingWindow(20) | GlobalTokens(2)) & Causal(),
    RandomBlocks(2, 16) & Causal() | BlockList(((0, 1), (2, 0)), 32),
    RandomBlocks(2, 16) & BlockList(((0, 1), (2, 0), (1, 4)), 32),
    SlidingWindow(9) | DilatedWindow(5, 3) | DilatedWindow(4, 7) | GlobalTokens(1, (33,)),
    SlidingWindow(9) | EvenSum(5) | GlobalTokens(1),
    GlobalTokens(4) & SlidingWindow(30) | SlidingWindow(4),
    DilatedSegments(48),
    DilatedSegments(33, 4, 2) & Causal(),
    DilatedSegments(40, 3, 1) | SlidingWindow(3) | GlobalTokens(1),
    DilatedSegments(48, 2, 1) & DilatedSegments(30, 3, 0),
]


def dense_list(lists: Lists, rows: int, columns: int, group: int = 0) -> Tensor:
    """0: absent, 1: partial, 2: full."""
    table = torch.zeros(rows, columns, dtype=torch.int32)
    for row in range(rows):
        begin, end = lists.ptr[group, row : row + 2].tolist()
        for entry in range(begin, end):
            table[row, lists.index[entry]] += 1 + int(entry >= int(lists.full[group, row]))
        ascending = lists.index[begin:end]
        middle = int(lists.full[group, row]) - begin
        assert (ascending[:middle].diff() > 0).all()
        assert (ascending[middle:].diff() > 0).all()
    return table


def check(pattern: Pattern, *coords: object, **arguments: object) -> BlockLayout:
    layout = build_layout(pattern, *coords, **arguments)  # type: ignore[arg-type]
    arguments.pop("block_size", None)
    expected = pattern.mask(*coords, **arguments)  # type: ignore[arg-type]
    assert torch.equal(layout.counts(), expected.int()), "each kept pair exactly once"
    for part in layout.parts:
        rows, columns = len(part.queries), len(part.keys)
        by_row = dense_list(part.rows, rows, columns)
        assert torch.equal(by_row, dense_list(part.columns, columns, rows).T)
    return layout


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_layout_keeps_what_the_pattern_allows(pattern: Pattern) -> None:
    for tokens in (1, 2, 63, 129, 300):
        for block_size in (None, 16, 48):
            check(pattern, tokens, block_size=block_size)
    check(pattern, 200, segments=[60, 1, 0, 100, 39])
    check(pattern, 100, 140, block_size=16)
    check(pattern, 60, 140, segments=[40, 20], key_segments=[90, 50], block_size=16)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_layout_on_tissue_and_on_random_coordinates(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(0)
    axis = torch.arange(13)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    tissue = grid[torch.rand(len(grid), generator=generator) > 0.4]
    check(pattern, tissue, block_size=16)
    scattered = torch.randint(-20, 20, (90, 2), generator=generator)
    check(pattern, scattered, segments=[40, 50], block_size=16)
    line = torch.randint(-200, 200, (90,), generator=generator)
    check(pattern, line, block_size=16)
    check(pattern, line.sort().values, block_size=16)


pieces = st.sampled_from(PATTERNS[:12])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(pieces, min_size=2, max_size=3),
    st.booleans(),
    st.lists(st.integers(0, 70), min_size=1, max_size=4),
    st.sampled_from([16, 32, 48]),
)
def test_composed_patterns(
    parts: list[Pattern], join_first: bool, segments: list[int], block_size: int
) -> None:
    pattern = parts[0] | parts[1] if join_first else parts[0] & parts[1]
    for part in parts[2:]:
        pattern = pattern & part if join_first else pattern | part
    check(pattern, sum(segments), segments=segments, block_size=block_size)


def test_full_blocks_of_a_window_need_no_mask() -> None:
    layout = build_layout(SlidingWindow(512), 16_384, block_size=128)
    (part,) = layout.parts
    partial = int((part.rows.full - part.rows.ptr[:, :-1]).sum())
    assert partial == 2 * (16_384 // 128) - 8
    assert layout.num_blocks == 128 * 9 - 20


def test_scattered_global_tokens_are_one_block() -> None:
    positions = tuple(range(100, 5_000, 97))
    layout = build_layout(GlobalTokens(positions=positions), 8_192)
    assert [len(part.keys) for part in layout.parts] == [1, 128]
    assert [len(part.queries) for part in layout.parts] == [128, 1]


def test_dilation_changes_the_index_space_and_not_the_mask() -> None:
    layout = build_layout(DilatedWindow(512, 8), 65_536)
    assert layout.parts[0].queries.stride == 8
    assert not layout.parts[0].queries.order.numel()
    assert layout.visited_pairs() < 1.15 * build_layout(SlidingWindow(512), 65_536).visited_pairs()


def test_strided_blocks_are_whole_blocks() -> None:
    layout = build_layout(Strided(8, block=128), 65_536)
    assert layout.visited_pairs() == 65_536 * 65_536 // 8
    assert not layout.parts[0].queries.order.numel()


def test_documents_start_where_they_start() -> None:
    layout = build_layout(SlidingWindow(8), 150, segments=[70, 80], block_size=32)
    assert layout.parts[0].queries.start.tolist() == [0, 32, 64, 70, 102, 134]
    assert layout.parts[0].queries.count.tolist() == [32, 32, 6, 32, 32, 16]


def test_bit_tiles_are_kept_once() -> None:
    layout = build_layout(EvenSum(2), 640, block_size=64)
    assert layout.parts[0].tiles.shape[0] == 1
    assert layout.num_blocks == 100


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_concat_equals_building_packed(pattern: Pattern) -> None:
    lengths = [70, 1, 129]
    layouts = [build_layout(pattern, n, block_size=16) for n in lengths]
    packed = concat(layouts)
    assert torch.equal(packed.counts(), pattern.mask(200, segments=lengths).int())
    assert packed.lengths.tolist() == lengths


def test_concat_refuses_what_differs() -> None:
    with pytest.raises(ValueError, match="one pattern"):
        concat([build_layout(Causal(), 9), build_layout(Dense(), 9)])
    with pytest.raises(ValueError, match="block sizes"):
        concat([build_layout(Causal(), 9), build_layout(Causal(), 90)])


def test_merge_counts_a_pair_once_per_part() -> None:
    first, second = SlidingWindow(3) | GlobalTokens(1), SlidingWindow(1) | GlobalTokens(0, (4,))
    both = merge([build_layout(first, 40, block_size=16), build_layout(second, 40, block_size=16)])
    assert torch.equal(both.counts(), first.mask(40).int() + second.mask(40).int())


LONGNET = DilatedSegments(40) + DilatedSegments(100, 2) + DilatedSegments(10**6, 4)
BY_HEAD = [
    LONGNET,
    LONGNET & Causal(),
    DilatedSegments(33, 3) + (SlidingWindow(3) | GlobalTokens(1)),
    DilatedSegments(60, 2) | SlidingWindow(5),
    DilatedSegments(48, 2) & DilatedSegments(30, 3),
    DilatedSegments(30, 2) & EvenSum(3),
]


@pytest.mark.parametrize("pattern", BY_HEAD, ids=str)
def test_layouts_that_differ_from_head_to_head(pattern: Pattern) -> None:
    for tokens, segments in ((1, None), (129, None), (200, [60, 1, 0, 100, 39])):
        for block_size in (None, 16):
            layout = build_layout(
                pattern, tokens, segments=segments, block_size=block_size, num_kv_heads=7
            )
            assert layout.group_of.tolist() == [[head % layout.num_groups for head in range(7)]]
            for head in range(layout.num_groups):
                expected = pattern.counts(tokens, segments=segments, head=head)
                assert torch.equal(layout.counts(head), expected)
            assert layout.visited_pairs() >= sum(
                int((layout.counts(group) > 0).sum()) for group in range(layout.num_groups)
            )
    with pytest.raises(ValueError, match="give num_kv_heads"):
        build_layout(pattern, 100)


def test_heads_share_the_lists_of_dilated_segments() -> None:
    one = build_layout(DilatedSegments(4096), 32_768, num_kv_heads=8)
    eight = build_layout(DilatedSegments(32_768, 8), 32_768, num_kv_heads=8)
    both = build_layout(DilatedSegments(4096) + DilatedSegments(32_768, 8), 32_768, num_kv_heads=8)
    assert eight.num_blocks == one.num_blocks == 8 * 64**2
    assert both.num_blocks == 2 * one.num_blocks
    assert eight.visited_pairs() == 32_768 * 4096
    assert [part.queries.stride for part in both.parts] == [1, 8]


def test_stack_gives_heads_their_own_lists() -> None:
    seeds = [RandomBlocks(1, 16, seed=s) for s in range(3)]
    group_of = torch.tensor([[0, 2], [1, 1]])
    both = stack([build_layout(p, 160) for p in seeds], group_of)
    assert both.num_groups == 3
    for group, pattern in enumerate(seeds):
        assert torch.equal(both.mask(group), pattern.mask(160))
    with pytest.raises(ValueError, match="layouts 0 to 2"):
        stack([build_layout(p, 160) for p in seeds], torch.tensor([[3]]))


def test_bad_coordinates_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to 10"):
        build_layout(Dense(), 10, segments=[4, 5])
    with pytest.raises(ValueError, match="integers"):
        build_layout(Dense(), torch.rand(10, 2))
    with pytest.raises(ValueError, match=r"2\*\*30"):
        build_layout(Dense(), torch.tensor([2**31]))
    with pytest.raises(ValueError, match="same axes"):
        build_layout(Dense(), torch.zeros(4, 2, dtype=torch.int64), 5)


MILLION = 1_048_576


@pytest.mark.parametrize(
    "pattern",
    [
        Dense(),
        Causal(),
        SlidingWindow(512),
        SlidingWindow(100_000),
        SlidingWindow(256) | GlobalTokens(64, tuple(range(0, MILLION, 20_971))),
        DilatedWindow(512, 8),
        Strided(64, block=64),
        SlidingWindow(96) | GlobalTokens(128) | RandomBlocks(3, 64),
    ],
    ids=str,
)
def test_a_million_tokens_cost_little(pattern: Pattern) -> None:
    begin = time.process_time()
    layout = build_layout(pattern, MILLION)
    # Not a benchmark: a quadratic step, or a loop over blocks, would take minutes.
    assert time.process_time() - begin < 20
    assert layout.nbytes() < 32e6
    assert layout.num_blocks < 2**21


def test_a_million_tiles_of_tissue_cost_little() -> None:
    tissue = make_tissue(MILLION)
    assert len(tissue) == MILLION
    begin = time.process_time()
    layout = build_layout(SlidingWindow(8), tissue)
    assert time.process_time() - begin < 20
    assert layout.num_blocks < 30 * MILLION // 64
    small = make_tissue(500)
    check(SlidingWindow(3) | GlobalTokens(2), small, block_size=16)


def test_five_thousand_documents_cost_little() -> None:
    lengths = torch.randint(64, 350, (5_000,), generator=torch.Generator().manual_seed(0))
    begin = time.process_time()
    layout = build_layout(SlidingWindow(64) | GlobalTokens(4), int(lengths.sum()), segments=lengths)
    assert time.process_time() - begin < 20
    assert layout.num_blocks < 90_000


def test_memory_grows_with_the_length() -> None:
    pattern = SlidingWindow(256) | GlobalTokens(16)
    short, long = build_layout(pattern, 2**16), build_layout(pattern, 2**18)
    assert long.nbytes() < 4.2 * short.nbytes()


@pytest.mark.parametrize(
    "layout",
    [
        build_layout(PATTERNS[-1], 100, segments=[30, 70]),
        build_layout(EvenSum(), 100, num_kv_heads=2),
        build_pooled_layout(Hierarchical(cell=8) | GlobalTokens(2), 100, segments=[30, 70]),
        build_routed_layout(Routed(16, 2) | GlobalTokens(2), 100, segments=[30, 70]),
    ],
    ids=["parts", "bits", "pooled", "routed"],
)
def test_all_of_a_layout_moves_and_nothing_else_is_a_leaf(layout: BlockLayout) -> None:
    leaves = pytree.tree_leaves(layout.to("meta"))
    assert all(isinstance(leaf, Tensor) and leaf.device.type == "meta" for leaf in leaves)

    def every_tensor(value: object) -> int:
        if isinstance(value, Tensor):
            return 1
        if isinstance(value, tuple):
            return sum(map(every_tensor, value))
        return sum(map(every_tensor, vars(value).values())) if is_dataclass(value) else 0

    assert every_tensor(layout) == len(leaves)


class Operations(TorchDispatchMode):
    """Count operations, views included: on a GPU building a layout takes as long as launching."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.number += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        (SlidingWindow(512), 220),
        (SlidingWindow(256) | GlobalTokens(64), 430),
        (SlidingWindow(96) | GlobalTokens(128) | RandomBlocks(3, block=64), 550),
        (SlidingWindow(8), 600),
        (SlidingWindow(8) | GlobalTokens(4), 780),
    ],
    ids=str,
)
def test_layouts_take_few_operations_at_any_length(pattern: Pattern, most: int) -> None:
    on_grid = "radius=8" in str(pattern)
    with Operations() as few:
        build_layout(pattern, make_tissue(5_000) if on_grid else 5_000)
    with Operations() as many:
        build_layout(pattern, make_tissue(80_000) if on_grid else 80_000)
    assert few.number < most
    assert many.number < most
