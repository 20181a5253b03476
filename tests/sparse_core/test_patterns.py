import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_core.patterns import (
    PATTERNS,
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

EXAMPLES = [
    Dense(),
    Causal(),
    SlidingWindow(5),
    SlidingWindow(left=4, right=0),
    DilatedWindow(3, 4),
    Strided(3, block=16),
    GlobalTokens(2, (7, 50)),
    RandomBlocks(2, 16, seed=5),
    BlockList(((0, 1), (2, 0)), 16),
    (SlidingWindow(2) | GlobalTokens(1)) & Causal() | Strided(4),
    DilatedSegments(20, 3, 1),
    DilatedSegments(16) + DilatedSegments(64, 4) + (SlidingWindow(2) | GlobalTokens(1)),
    Hierarchical(16, near=2, factor=2) | GlobalTokens(1),
    (Routed(64, top=4) | GlobalTokens(1)) & Causal(),
]


@pytest.mark.parametrize("pattern", EXAMPLES, ids=str)
def test_text_round_trip(pattern: Pattern) -> None:
    again = Pattern.parse(str(pattern))
    assert again == pattern
    assert hash(again) == hash(pattern)


def test_every_pattern_has_an_example_and_a_picture() -> None:
    used = str(EXAMPLES)
    for name, cls in PATTERNS.items():
        assert name in used
        assert "##" in (cls.__doc__ or "") or "#." in (cls.__doc__ or "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Windo(3)", "unknown pattern 'Windo'.*SlidingWindow"),
        ("__import__('os')", "unknown pattern"),
        ("SlidingWindow(radius=open('x'))", "cannot read"),
        ("SlidingWindow(3) - Causal()", "not a pattern"),
        ("(SlidingWindow(3) + Causal()) | Dense()", "no part of a union"),
        ("DilatedSegments(8, 2, 2)", "offset lies between"),
        ("SlidingWindow(", "not a pattern"),
        ("SlidingWindow(left=3)", "give radius, or left and right"),
        ("Strided(0)", "stride >= 1"),
    ],
)
def test_parse_says_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern.parse(text)


def test_window_is_a_band_in_one_dimension() -> None:
    i = torch.arange(40)
    assert torch.equal(SlidingWindow(3).mask(40), (i[:, None] - i).abs() <= 3)
    causal = SlidingWindow(left=3, right=0).mask(40)
    assert torch.equal(causal, SlidingWindow(3).mask(40) & Causal().mask(40))


def test_window_is_a_square_in_two_dimensions() -> None:
    coords = torch.randint(0, 12, (50, 2), generator=torch.Generator().manual_seed(0))
    far = (coords[:, None] - coords[None]).abs().amax(-1)
    assert torch.equal(SlidingWindow(2).mask(coords), far <= 2)
    slab = SlidingWindow((2, 0)).mask(coords)
    assert torch.equal(slab, (far <= 2) & (coords[:, None, 1] == coords[None, :, 1]))


def test_dilated_window_counts_steps() -> None:
    i = torch.arange(60)
    difference = i[:, None] - i
    expected = (difference.abs() <= 12) & (difference % 4 == 0)
    assert torch.equal(DilatedWindow(3, 4).mask(60), expected)


def test_dilated_segments_differ_from_head_to_head() -> None:
    pattern = DilatedSegments(6, 2)
    i = torch.arange(20)
    segment, place = i // 6, i % 6 % 2
    same = segment[:, None] == segment
    for head in range(3):
        takes_part = place == head % 2
        expected = same & takes_part[:, None] & takes_part
        assert torch.equal(pattern.of_head(head).mask(20), expected)
        assert torch.equal(pattern.counts(20, head=head), expected.int())
    with pytest.raises(ValueError, match="from head to head"):
        pattern.mask(20)


def test_a_sum_counts_a_pair_once_for_each_part() -> None:
    both = SlidingWindow(3) + (SlidingWindow(1) | GlobalTokens(1)) + SlidingWindow(3)
    near, other = SlidingWindow(3).mask(9), (SlidingWindow(1) | GlobalTokens(1)).mask(9)
    assert torch.equal(both.counts(9), 2 * near.int() + other.int())
    assert torch.equal(both.mask(9), near | other)
    causal = Causal().mask(9).int()
    assert torch.equal((both & Causal()).counts(9), both.counts(9) * causal)
    assert torch.equal((Causal() & both).counts(9), both.counts(9) * causal)


def test_global_tokens_see_all_and_all_see_them() -> None:
    mask = GlobalTokens(1, (5,)).mask(20)
    assert mask[[0, 5]].all()
    assert mask[:, [0, 5]].all()
    assert int(mask.sum()) == 2 * 20 * 2 - 4


def test_global_tokens_count_in_each_sequence() -> None:
    mask = GlobalTokens(1).mask(10, segments=[4, 6])
    assert mask[0, :4].all()
    assert mask[4, 4:].all()
    assert not mask[0, 4:].any()


def test_random_blocks_draw_distinct_blocks_everywhere() -> None:
    mask = RandomBlocks(4, 16, seed=3).mask(16 * 40)
    blocks = mask.view(40, 16, 40, 16)[:, 0, :, 0]
    assert (blocks.sum(1) == 4).all()
    assert blocks.any(0).sum() > 30
    assert not torch.equal(mask, RandomBlocks(4, 16, seed=4).mask(16 * 40))
    assert torch.equal(mask, RandomBlocks(4, 16, seed=3).mask(16 * 40))


def test_block_list_reads_a_matrix() -> None:
    blocks = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)
    mask = BlockList.from_mask(blocks, block=8).mask(16)
    assert torch.equal(mask, blocks.repeat_interleave(8, 0).repeat_interleave(8, 1))


def test_patterns_refuse_axes_they_do_not_have() -> None:
    with pytest.raises(ValueError, match="axis 2"):
        Causal(2).mask(5)
    with pytest.raises(ValueError, match="2 radii"):
        SlidingWindow((1, 2)).mask(5)


simple = st.sampled_from(EXAMPLES[:9])


@settings(max_examples=40, deadline=None)
@given(simple, simple, simple)
def test_algebra_is_that_of_sets(a: Pattern, b: Pattern, c: Pattern) -> None:
    n = 70
    mask_a, mask_b, mask_c = a.mask(n), b.mask(n), c.mask(n)
    assert torch.equal((a | b).mask(n), mask_a | mask_b)
    assert torch.equal((a & b).mask(n), mask_a & mask_b)
    assert torch.equal(((a | b) & c).mask(n), (mask_a | mask_b) & mask_c)
    assert Pattern.parse(str((a | b) & c)) == (a | b) & c
