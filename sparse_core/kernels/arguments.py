"""From a layout and its schedule to what kernels take."""

from functools import cache
from typing import NamedTuple

import torch
import triton
from jaxtyping import Int
from torch import Tensor

from sparse_core.blocking import Blocks
from sparse_core.kernels import INTERPRETED
from sparse_core.kernels.tiles import BOXED, FULL_BOXED, NO_BOX
from sparse_core.layout import BlockLayout, Lists, Part
from sparse_core.masking import CONGRUENT, INTERVAL, KEY_FLAG, QUERY_FLAG, Program, decode
from sparse_core.schedule import Launch, Side

Clauses = tuple[tuple[tuple[int, int, int, bool], ...], ...]
MIN_TILE = 16
"""The fewest rows that a dot takes."""
NEAR = 2**29
"""Differences of places may reach this far; sums of two then fit int32."""


class Own(NamedTuple):
    """The blocks of a kernel's own side."""

    start: Tensor
    counts: Tensor
    order: Tensor
    size: int
    stride: int


class Other(NamedTuple):
    """A part's lists, and the blocks of the other side that they name.

    `barring` says of each block whether it holds tokens that flags leave out of the part.
    """

    ptr: Tensor
    full: Tensor
    indices: Tensor
    tile: Tensor
    bias: Tensor | None
    start: Tensor
    counts: Tensor
    order: Tensor
    bits: Tensor
    barring: Tensor
    size: int
    stride: int
    tile_rows: int
    tile_bytes: int


class Meta(NamedTuple):
    """What of a part is compiled into a kernel; see the functions of `tiles`.

    A clause is a tuple of terms (code, axis, place of the first of its numbers, whether those are
    within 2**30). `boxed` is NO_BOX, FULL_BOXED or BOXED.
    """

    small: int
    single: bool
    ragged: bool
    indexed: bool
    wide: bool
    boxed: int
    natural: bool
    relative: bool
    regular: bool
    affine: bool
    bits: bool
    biased: bool
    takes_key_bias: bool
    num_own: int
    clauses: Clauses


def own_blocks(layout: BlockLayout, launch: Launch, side: Side) -> Blocks:
    """Give the blocks that a launch works through."""
    blocks: Blocks = getattr(layout.parts[launch.part_numbers[0]], side)
    return blocks


def own_side(blocks: Blocks) -> Own:
    """Describe the blocks that a launch works through."""
    return Own(blocks.start, blocks.count, blocks.order, blocks.size, blocks.stride)


def other_side(
    layout: BlockLayout, launch: Launch, side: Side, tile: int, token_elements: int, boxes: bool
) -> tuple[tuple[Other, ...], tuple[tuple[int, ...], ...], tuple[Meta, ...]]:
    """Describe each part of a launch for tiles of `tile` tokens: pointers, numbers, constants.

    `token_elements` is how far apart tokens lie in memory; `boxes` whether tensors allow boxes.
    """
    others, numbers, metas = [], [], []
    for number, affine in zip(launch.part_numbers, launch.affine, strict=True):
        part = layout.parts[number]
        others.append(other_tensors(layout, part, side))
        natural = _is_natural(layout, part.program)
        blocks = part.keys if side == "queries" else part.queries
        relative = natural and not blocks.order.numel() and _is_relative(layout, part.program)
        clauses, values = _clauses(part.program, NEAR if relative else None)
        numbers.append(values)
        metas.append(
            Meta(
                small=blocks.size if blocks.size < tile else 0,
                single=blocks.size == tile,
                ragged=blocks.size % tile != 0,
                indexed=blocks.order.numel() > 0,
                wide=_is_wide(blocks, tile, token_elements),
                boxed=_boxed(blocks, tile, natural) if boxes else NO_BOX,
                natural=natural,
                relative=relative,
                regular=blocks.regular,
                affine=affine and not part.num_biases,
                bits=not part.program,
                biased=part.num_biases > 0,
                takes_key_bias=part.takes_key_bias,
                num_own=part.program[0] if part.program else 0,
                clauses=clauses,
            )
        )
    return tuple(others), tuple(numbers), tuple(metas)


def _is_wide(blocks: Blocks, tile: int, token_elements: int) -> bool:
    """Whether a lane's place, from its tile's first token on, may exceed 32 bits."""
    gathered = blocks.order.numel() > 0 or blocks.size < tile
    return gathered or tile * blocks.stride * token_elements >= 2**31


def _boxed(blocks: Blocks, tile: int, natural: bool) -> int:
    """Tell whose tiles are boxes in memory.

    Lanes beyond a partial block may lie in another sequence, of which nothing may be read. Loops
    that load coordinates for their masks are short of registers, and boxes want some.
    """
    if blocks.order.numel() or blocks.stride != 1 or blocks.size % tile:
        return NO_BOX
    return BOXED if blocks.regular and natural else FULL_BOXED


def takes_boxes(head_dim: int, tensors: tuple[Tensor, Tensor]) -> bool:
    """Whether tiles of these tensors [B, T, H, D] may come by the tensor memory accelerator.

    It is there from compute capability 9.0 on and wants addresses and strides that are multiples of
    16 bytes (CUDA driver API, cuTensorMapEncodeTiled); expanded tensors have strides of none.
    Channels that come in two pieces have no boxes.
    """
    if tensors[0].element_size() != 2 or split_head_dim(head_dim) != (head_dim, 0):
        return False
    return all(map(_is_box, tensors)) and _has_accelerator(tensors[0].device)


def _is_box(x: Tensor) -> bool:
    steps = (stride for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1)
    return x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps)


@cache
def _has_accelerator(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (9, 0)


def _is_natural(layout: BlockLayout, program: Program) -> bool:
    """Whether token numbers may stand for coordinates in a part's terms."""
    if layout.schedule.spacing == "tokens":
        return True
    return layout.schedule.spacing == "segments" and not _has_residues(program)


def _is_relative(layout: BlockLayout, program: Program) -> bool:
    """Whether a part's terms ask for differences of natural coordinates only."""
    few = max(layout.num_queries, layout.num_keys) < NEAR
    return few and bool(program) and not _has_residues(program)


def _has_residues(program: Program) -> bool:
    own, earlier = decode(program) if program else ([], [])
    return any(term[0] == CONGRUENT for clause in own + earlier for term in clause)


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Cover the channels with one or two powers of two: 96 = 64 + 32, 72 = 64 + 16, 100 = 128."""
    largest = max(MIN_TILE, 1 << (head_dim.bit_length() - 1))
    if largest >= head_dim:
        return largest, 0
    rest = max(MIN_TILE, int(triton.next_power_of_2(head_dim - largest)))
    return (2 * largest, 0) if rest >= largest else (largest, rest)


def tile_of(size: int, wanted: int) -> int:
    """Rows of an own tile: no more than its block needs."""
    return max(MIN_TILE, min(wanted, int(triton.next_power_of_2(size))))


def other_tensors(layout: BlockLayout, part: Part, side: Side) -> Other:
    """Describe a part's lists and the blocks of the other side that they name."""
    lists: Lists = part.rows if side == "queries" else part.columns
    blocks = part.keys if side == "queries" else part.queries
    return Other(
        lists.ptr, lists.full, lists.index, lists.tile, lists.bias, blocks.start, blocks.count,
        blocks.order, part.tiles, _barring(layout, part, side), blocks.size, blocks.stride,
        part.tiles.shape[1], part.tiles.shape[2],
    )  # fmt: skip


def _barring(layout: BlockLayout, part: Part, side: Side) -> Int[Tensor, "R"]:
    blocks, flags, code = (
        (part.keys, layout.key_flags, KEY_FLAG)
        if side == "queries"
        else (part.queries, layout.query_flags, QUERY_FLAG)
    )
    earlier = decode(part.program)[1] if part.program else []
    bits = sum({1 << clause[0][1] for clause in earlier if clause and clause[0][0] == code})
    if not bits:
        return blocks.count[:0]
    tokens, exists = blocks.tokens()
    return (((flags[tokens] & bits) != 0) & exists).any(1).to(torch.int32)


def _clauses(program: Program, limit: int | None) -> tuple[Clauses, tuple[int, ...]]:
    """Part a program into its form, which is compiled, and its numbers, which are not.

    Intervals are cut to -limit to limit if there is one.
    """
    if not program:
        return (), (0,)
    own, earlier = decode(program)
    values: list[int] = []
    clauses = []
    for clause in own + earlier:
        terms = []
        for code, a, b, c in clause:
            if code == INTERVAL and limit is not None:
                b, c = max(b, -limit), min(c, limit)
            bounded = code == INTERVAL and b >= -(2**30) and c <= 2**30
            terms.append((code, a if code in (INTERVAL, CONGRUENT) else 0, len(values), bounded))
            values += [b, c] if code in (INTERVAL, CONGRUENT) else [a]
        clauses.append(tuple(terms))
    return tuple(clauses), tuple(values) or (0,)
