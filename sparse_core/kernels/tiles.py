"""What all kernels do with a tile: find its tokens, load, mask, measure distance, store.

A kernel owns a tile of one side (queries, or keys in dK/dV) and walks over tiles of the other side.
Own tokens stand along the tile's rows, the others along its columns, so that no kernel transposes
what a dot gave. What is constant while a kernel runs but differs between parts of a layout comes
as `META`, a nested tuple of constants that `sparse_core.kernels.arguments` writes.
"""

import triton
import triton.language as tl

from sparse_core.kernels import INTERPRETED
from sparse_core.schedule import WHOLE

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

NO_BOX, FULL_BOXED, BOXED = range(3)
"""Which tiles of a part are boxes in memory: none, those of full blocks, all."""
INTERVAL, CONGRUENT, QUERY_FLAG, KEY_FLAG = range(4)
"""The codes of sparse_core.masking; a test holds them equal."""
MASKED_STAGES = tl.constexpr(None if triton.__version__.startswith("3.6.") else 2)
"""Stages of loops that look up what their masks need; None leaves it to the configuration.

With three, Triton 3.5 and 3.9 refuse such loops ("Op used before defined"); 3.6 takes them, and is
what the figures were measured with.
"""
GO_ON = tl.constexpr(WHOLE)
"""Slot of an item of which an earlier launch may have left a state."""
FAR = tl.constexpr(2**31 - 1)
"""Coordinate of what is no token: more than 2**30 from any other, even where differences wrap."""
BEYOND = tl.constexpr(2**30)
"""More than any place relative to a tile."""


@triton.constexpr_function
def small(meta, s):
    """Tokens of the other side's blocks, if a tile holds several blocks; else 0."""
    return meta[s].small


@triton.constexpr_function
def single(meta, s):
    """Whether a tile holds just one block of the other side."""
    return meta[s].single


@triton.constexpr_function
def ragged(meta, s):
    """Whether tiles may hold lanes beyond their blocks even where every block is full."""
    return meta[s].ragged


@triton.constexpr_function
def indexed(meta, s):
    """Whether positions are places in a table of tokens."""
    return meta[s].indexed


@triton.constexpr_function
def guarded(meta, s):
    """Whether what lies at the address of a token that does not exist may not be read."""
    return meta[s].indexed or meta[s].small > 0


@triton.constexpr_function
def affine(meta, s):
    """Whether the full blocks of a row follow one another, so that addresses are arithmetic."""
    return meta[s].affine


@triton.constexpr_function
def wide(meta, s):
    """Whether lanes, times the elements of a token, may exceed 32 bits."""
    return meta[s].wide


@triton.constexpr_function
def natural(meta, s):
    """Whether tokens' numbers differ as their coordinates do, so that none need be loaded."""
    return meta[s].natural


@triton.constexpr_function
def relative(meta, s):
    """Whether a part's terms may count tokens from a tile's first."""
    return meta[s].relative


@triton.constexpr_function
def regular(meta, s):
    """Whether block b begins at token b * size."""
    return meta[s].regular


@triton.constexpr_function
def has_bits(meta, s):
    """Whether partial blocks are masked by tiles of bits."""
    return meta[s].bits


@triton.constexpr_function
def biased(meta, s):
    """Whether each entry's scores take a number of their own."""
    return meta[s].biased


@triton.constexpr_function
def takes_key_bias(meta, s):
    """Whether keys' biases are added to scores."""
    return meta[s].takes_key_bias


@triton.constexpr_function
def any_takes_no_key_bias(meta):
    """Whether some part leaves keys' biases out."""
    return not all(part.takes_key_bias for part in meta)


@triton.constexpr_function
def num_own(meta, s):
    """Number of clauses that keep a pair."""
    return meta[s].num_own


@triton.constexpr_function
def num_clauses(meta, s):
    """Number of clauses in all."""
    return len(meta[s].clauses)


@triton.constexpr_function
def num_terms(meta, s, c):
    """Number of terms of a clause."""
    return len(meta[s].clauses[c])


@triton.constexpr_function
def code(meta, s, c, t):
    """Kind of a term."""
    return meta[s].clauses[c][t][0]


@triton.constexpr_function
def axis(meta, s, c, t):
    """Axis that a term speaks of."""
    return meta[s].clauses[c][t][1]


@triton.constexpr_function
def place(meta, s, c, t):
    """Where a term's numbers begin."""
    return meta[s].clauses[c][t][2]


@triton.constexpr_function
def bounds_tile(meta, s, c, t):
    """Whether a term is false for lanes beyond the tile's tokens because their end bounds it."""
    interval = meta[s].clauses[c][t][0] == INTERVAL
    return interval and meta[s].relative and meta[s].small == 0


@triton.constexpr_function
def needs_exists(meta, s, c, own_is_query):
    """Whether no term of a clause is false for tokens that do not exist."""
    other_flag = KEY_FLAG if own_is_query else QUERY_FLAG
    for code, _, _, bounded in meta[s].clauses[c]:
        if code == other_flag:
            return False
        if code == INTERVAL and meta[s].relative and meta[s].small == 0:
            return False
        if code == INTERVAL and bounded and not meta[s].natural:
            return False
    return True


@triton.constexpr_function
def boxed(meta, s, masked):
    """Whether a tile's tokens are a box in memory, whose lanes beyond a block may be read."""
    return meta[s].boxed == BOXED or (meta[s].boxed == FULL_BOXED and not masked)


@triton.constexpr_function
def only_intervals(meta, s):
    """How many intervals keep a pair, if one clause of them does, less flagged tokens; else 0."""
    part = meta[s]
    if part.num_own != 1 or any(term[0] != INTERVAL for term in part.clauses[0]):
        return 0
    if len(part.clauses) == 1:
        return len(part.clauses[0])
    flags = all(len(c) == 1 and c[0][0] in (QUERY_FLAG, KEY_FLAG) for c in part.clauses[1:])
    return len(part.clauses[0]) if flags and part.small == 0 else 0


@triton.constexpr_function
def barring(meta, s, own, own_is_query):
    """Where the bits are named that leave tokens out of a part: own tokens, or the other side's."""
    code = QUERY_FLAG if own == own_is_query else KEY_FLAG
    return tuple(c[0][2] for c in meta[s].clauses[1:] if c[0][0] == code)


@triton.constexpr_function
def count(places):
    """How many there are."""
    return len(places)


@triton.constexpr_function
def speaks_of_own(meta, s, c, t, own_is_query):
    """Whether a flag term looks at the kernel's own tokens."""
    return (meta[s].clauses[c][t][0] == QUERY_FLAG) == own_is_query


@triton.jit
def own_tokens(
    own,
    block,
    tile,
    num_tokens,
    OWN_INDEXED: tl.constexpr,
    OWN_REGULAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens [BLOCK] of a tile of an own block, which exist, and their places in the block."""
    inner = tile * BLOCK + tl.arange(0, BLOCK)
    if OWN_REGULAR:
        start = block * own.size
        count = tl.minimum(num_tokens - start, own.size)
    else:
        start, count = tl.load(own.start + block), tl.load(own.counts + block)
    exists = inner < count
    position = start + inner * own.stride
    if OWN_INDEXED:
        return tl.load(own.order + position, mask=exists, other=0), exists, inner
    else:
        return tl.where(exists, position, 0), exists, inner


@triton.jit
def num_tiles(
    part,
    META: tl.constexpr,
    S: tl.constexpr,
    first,
    last,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count the tiles that the list entries first to last - 1 fill."""
    if AFFINE:
        return tl.cdiv((last - first) * part.size, BLOCK)
    elif small(META, S) > 0:
        return tl.cdiv(last - first, BLOCK // small(META, S))
    elif single(META, S):
        return last - first
    else:
        return (last - first) * tl.cdiv(part.size, BLOCK)


@triton.jit
def block_start(part, META: tl.constexpr, S: tl.constexpr, block, valid):
    """Where blocks of the other side begin."""
    if regular(META, S):
        return block * part.size
    else:
        return tl.load(part.start + block, mask=valid, other=0)


@triton.jit
def block_count(part, num_others, META: tl.constexpr, S: tl.constexpr, block, valid):
    """How many tokens blocks of the other side have."""
    if regular(META, S):
        return tl.minimum(num_others - block * part.size, part.size)
    else:
        return tl.load(part.counts + block, mask=valid, other=0)


@triton.jit
def next_block(part, META: tl.constexpr, S: tl.constexpr, first, last, tile, BLOCK: tl.constexpr):
    """Read, ahead of its use, the block that tile `tile` of the entries first to last - 1 is in."""
    if small(META, S) > 0:
        return tile * 0
    else:
        which = first + tile
        if not single(META, S):
            which = first + tile // tl.cdiv(part.size, BLOCK)
        return tl.load(part.indices + which, mask=which < last, other=0)


@triton.jit
def other_tokens(
    part,
    num_others,
    META: tl.constexpr,
    S: tl.constexpr,
    first,
    last,
    block,
    tile,
    AFFINE: tl.constexpr,
    CHECK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find a tile of the other side: its tokens are origin + rows, [BLOCK].

    Where a tile lies in one block, origin is a number; rows of tokens that do not exist are those
    of the block's last, whose memory may be read. Lanes are rows as if all did exist, the same from
    tile to tile. Also which tokens exist, the lane of the last, their list entries, and their
    places in their blocks. `block` is the tile's, or the first of an affine run.
    """
    lane = tl.arange(0, BLOCK)
    if small(META, S) > 0:
        per_tile = BLOCK // small(META, S)
        entry = first + tile * per_tile + lane // small(META, S)
        inner = lane % small(META, S)
        valid = (entry < last) & (lane < per_tile * small(META, S))
        blocks = tl.load(part.indices + entry, mask=valid, other=0)
        origin, end = tile * 0, tile * 0
        lanes = block_start(part, META, S, blocks, valid) + inner * part.stride
        exists = valid & (inner < block_count(part, num_others, META, S, blocks, valid))
        rows = lanes
    else:
        if AFFINE:
            which, step = first, tile * BLOCK
            count = (last - first) * part.size
        else:
            which, step = first + tile, 0
            if not single(META, S):
                tiles = tl.cdiv(part.size, BLOCK)
                which, step = first + tile // tiles, (tile % tiles) * BLOCK
            count = block_count(part, num_others, META, S, block, True)
        entry = which + tl.zeros_like(lane)
        inner = step + lane
        origin = block_start(part, META, S, block, True) + step * part.stride
        lanes = lane * part.stride
        exists = inner < count
        end = (count - 1 - step) * part.stride
        rows = lanes
        if CHECK:
            rows = tl.minimum(lane, count - 1 - step) * part.stride
    if indexed(META, S):
        rows = tl.load(part.order + origin + rows, mask=exists, other=0)
        origin, lanes = tile * 0, rows
    return origin, rows, lanes, exists, end, entry, inner


@triton.jit
def next_bias(
    block_bias, part, META: tl.constexpr, S: tl.constexpr, first, last, tile, BLOCK: tl.constexpr
):
    """Read, ahead of its use, the number in base 2 that tile `tile` adds to its scores.

    Also its place in `block_bias`. Where a tile holds several blocks, both are vectors of lanes.
    """
    if small(META, S) > 0:
        lane = tl.arange(0, BLOCK)
        per_tile = BLOCK // small(META, S)
        which = first + tile * per_tile + lane // small(META, S)
        valid = (which < last) & (lane < per_tile * small(META, S))
    else:
        which = first + tile
        if not single(META, S):
            which = first + tile // tl.cdiv(part.size, BLOCK)
        valid = which < last
    place = tl.load(part.bias + which, mask=valid, other=0)
    bias = tl.load(block_bias + place, mask=valid, other=0.0).to(tl.float32)
    return bias * LOG2_E, place


@triton.jit
def spread_bias(bias, META: tl.constexpr, S: tl.constexpr):
    """A tile's number as it is added to scores [own, other]."""
    if small(META, S) > 0:
        return bias[None, :]
    else:
        return bias


@triton.jit
def store_bias_grad(
    grad_bias,
    by_entry,
    slopes,
    part,
    META: tl.constexpr,
    S: tl.constexpr,
    first,
    last,
    tile,
    place,
    BLOCK: tl.constexpr,
):
    """Write the sums of a tile's slopes [own, other] over the pairs of each of its list entries.

    A block of several tiles adds up in `by_entry`, and its last tile writes what stays.
    """
    if small(META, S) > 0:
        lane = tl.arange(0, BLOCK)
        per_tile = BLOCK // small(META, S)
        mine = (lane // small(META, S))[None, :] == lane[:, None]
        sums = tl.sum(tl.where(mine, tl.sum(slopes, 0)[None, :], 0.0), 1)
        which = first + tile * per_tile + lane
        valid = (which < last) & (lane < per_tile)
        place = tl.load(part.bias + which, mask=valid, other=0)
        tl.store(grad_bias + place, sums, mask=valid)
        return by_entry
    else:
        total = tl.sum(slopes)
        if not single(META, S):
            total += tl.where(tile % tl.cdiv(part.size, BLOCK) == 0, 0.0, by_entry)
        tl.store(grad_bias + place, total)
        return total


@triton.jit
def load_rows(
    base,
    origin,
    lanes,
    stride,
    exists,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    CHECK: tl.constexpr,
    WIDE: tl.constexpr = True,
):
    """Channels FIRST to FIRST + WIDTH of tokens origin + lanes, [BLOCK, WIDTH]; zeros beyond.

    Without `WIDE` what the lanes add fits 32 bits, which spares registers.
    """
    channel = FIRST + tl.arange(0, WIDTH)
    # offsets exceed int32 beyond 2**31 elements
    start = base + tl.cast(origin, tl.int64) * stride
    if WIDE:
        pointers = start + (lanes.to(tl.int64)[:, None] * stride + channel[None, :])
    else:
        pointers = start + (lanes[:, None] * stride + channel[None, :])
    if FIRST + WIDTH > D:
        inside = channel[None, :] < D
        if CHECK:
            inside = inside & exists[:, None]
        return tl.load(pointers, mask=inside, other=0.0)
    elif CHECK:
        return tl.load(pointers, mask=exists[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_tile(
    base,
    box,
    sample,
    head,
    origin,
    rows,
    stride,
    exists,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    META: tl.constexpr,
    S: tl.constexpr,
    MASKED: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Channels of a tile of the other side, [BLOCK, WIDTH].

    Boxes [1, 1, BLOCK, WIDTH] of a descriptor [B, H, T, D] come by the tensor memory accelerator,
    zeros beyond the last token; the rest row by row.
    """
    if boxed(META, S, MASKED):
        tile = box.load([sample.to(tl.int32), head, origin, FIRST])
        return tl.reshape(tile, (rows.shape[0], WIDTH))
    else:
        GUARD: tl.constexpr = CHECK and guarded(META, S)
        WIDE: tl.constexpr = wide(META, S)
        return load_rows(base, origin, rows, stride, exists, D, FIRST, WIDTH, GUARD, WIDE)


@triton.jit
def store_rows(
    base,
    rows,
    stride,
    exists,
    values,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write [BLOCK, WIDTH] to channels FIRST to FIRST + WIDTH of these rows."""
    channel = FIRST + tl.arange(0, WIDTH)
    pointers = base + rows.to(tl.int64)[:, None] * stride + channel[None, :]
    inside = exists[:, None]
    if FIRST + WIDTH > D:
        inside = inside & (channel[None, :] < D)
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_coords(coords, tokens, exists, P: tl.constexpr):
    """Coordinates of these tokens: a tuple of P vectors."""
    found = ()
    if P == 2:
        pairs = coords + tokens.to(tl.int64)[:, None] * 2 + tl.arange(0, 2)[None, :]
        return tl.split(tl.load(pairs, mask=exists[:, None], other=FAR))
    for a in tl.static_range(P):
        axis_coords = tl.load(coords + tokens.to(tl.int64) * P + a, mask=exists, other=FAR)
        found = found + (axis_coords,)  # type: ignore[assignment]
    return found


@triton.jit
def own_axes(coords, tokens, origin, META: tl.constexpr, S: tl.constexpr):
    """Own coordinates as a part's terms want them."""
    if relative(META, S):
        return (tokens - origin,)
    elif natural(META, S):
        return (tokens,)
    else:
        return coords


@triton.jit
def other_axes(coords, tokens, lanes, exists, META: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """Coordinates of the other side's tokens as a part's terms want them."""
    if relative(META, S):
        return (lanes,)
    elif natural(META, S):
        return (tokens,)
    else:
        return load_coords(coords, tokens, exists, P)


@triton.jit
def distance(own, other, P: tl.constexpr):
    """Euclidean distance of each pair of the tile."""
    if P == 1:
        return tl.abs(own[0][:, None] - other[0][None, :]).to(tl.float32)
    else:
        total = (own[0][:, None] - other[0][None, :]).to(tl.float32)
        total = total * total
        for a in tl.static_range(1, P):
            step = (own[a][:, None] - other[a][None, :]).to(tl.float32)
            total += step * step
        return tl.sqrt(total)


@triton.jit
def place_in_interval(
    META: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    numbers,
    own_coords,
    other_coords,
    other_end,
    own_barred,
    OWN_IS_QUERY: tl.constexpr,
):
    """How far each pair stands in an interval, [M, N], and how far it may: [M, 1], or a number.

    Both are unsigned, and what stands before the interval wraps around to large numbers: one
    comparison tells. Where the tile's last token bounds it, `own_barred` rows have no interval.
    """
    low, high = numbers[place(META, S, C, T)], numbers[place(META, S, C, T) + 1]
    mine, theirs = own_coords[axis(META, S, C, T)], other_coords[axis(META, S, C, T)]
    if bounds_tile(META, S, C, T):
        # the tile's last token bounds each row's interval
        if OWN_IS_QUERY:
            start, end = mine - high, mine - low
        else:
            start, end = mine + low, mine + high
        end = tl.minimum(end, other_end)
        none = (end < start) | own_barred
        span = tl.where(none, 0, end - start)[:, None].to(tl.uint32, bitcast=True)
        above = theirs[None, :] - tl.where(none, BEYOND, start)[:, None]
    else:
        span = tl.cast(high - low, tl.uint32, bitcast=True)
        if OWN_IS_QUERY:
            above = (mine - low)[:, None] - theirs[None, :]
        else:
            above = theirs[None, :] - (mine + low)[:, None]
    return above.to(tl.uint32, bitcast=True), span


@triton.jit
def barred(flags, numbers, PLACES: tl.constexpr):
    """Which tokens have one of these bits."""
    found = flags * 0
    for i in tl.static_range(0, count(PLACES)):
        found |= flags >> numbers[PLACES[i]]
    return (found & 1) > 0


@triton.jit
def keep_within(values, above, span, OTHERWISE: tl.constexpr):
    """Put `OTHERWISE`, -inf or 0, where `above` exceeds `span`.

    In PTX, because LLVM would gather a tile's comparisons in the bits of integers.
    """
    if IN_INTERPRETER:
        return tl.where(above <= span, values, OTHERWISE)
    elif OTHERWISE == 0.0:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.le.u32 p, $2, $3; selp.f32 $0, $1, 0f00000000, p; }",
            "=f,f,r,r", [values, above, span], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.le.u32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }",
            "=f,f,r,r", [values, above, span], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def keep_within_both(values, above, span, above2, span2, OTHERWISE: tl.constexpr):
    """Do the same for two intervals at once."""
    if IN_INTERPRETER:
        return tl.where((above <= span) & (above2 <= span2), values, OTHERWISE)
    elif OTHERWISE == 0.0:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.le.u32 p, $2, $3; setp.le.and.u32 p, $4, $5, p; "
            "selp.f32 $0, $1, 0f00000000, p; }",
            "=f,f,r,r,r,r", [values, above, span, above2, span2], dtype=tl.float32, is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.le.u32 p, $2, $3; setp.le.and.u32 p, $4, $5, p; "
            "selp.f32 $0, $1, 0fFF800000, p; }",
            "=f,f,r,r,r,r", [values, above, span, above2, span2], dtype=tl.float32, is_pure=True,
            pack=1,
        )  # fmt: skip


IN_INTERPRETER = tl.constexpr(INTERPRETED)


@triton.jit
def term_holds(
    META: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    numbers,
    own_coords,
    other_coords,
    own_flags,
    other_flags,
    other_end,
    OWN_IS_QUERY: tl.constexpr,
):
    """Evaluate one term on each pair; the shape may be [M, N], [M, 1] or [1, N]."""
    if code(META, S, C, T) == INTERVAL_CODE:
        above, span = place_in_interval(
            META, S, C, T, numbers, own_coords, other_coords, other_end,
            own_flags != own_flags, OWN_IS_QUERY,
        )  # fmt: skip
        return above <= span
    elif code(META, S, C, T) == CONGRUENT_CODE:
        block, stride = numbers[place(META, S, C, T)], numbers[place(META, S, C, T) + 1]
        mine = residue(own_coords[axis(META, S, C, T)], block, stride)
        theirs = residue(other_coords[axis(META, S, C, T)], block, stride)
        return mine[:, None] == theirs[None, :]
    else:
        bit = numbers[place(META, S, C, T)]
        if speaks_of_own(META, S, C, T, OWN_IS_QUERY):
            return ((own_flags >> bit) & 1)[:, None] > 0
        else:
            return ((other_flags >> bit) & 1)[None, :] > 0


INTERVAL_CODE = tl.constexpr(INTERVAL)
CONGRUENT_CODE = tl.constexpr(CONGRUENT)


@triton.jit
def residue(coords, block, stride):
    """Coordinates' blocks modulo stride, rounding down also below zero."""
    quotient = coords // block
    quotient = tl.where(quotient * block > coords, quotient - 1, quotient)
    rest = quotient % stride
    return tl.where(rest < 0, rest + stride, rest)


@triton.jit
def clause_holds(
    META: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    numbers,
    own_coords,
    other_coords,
    own_flags,
    other_flags,
    other_exists,
    other_end,
    OWN_IS_QUERY: tl.constexpr,
):
    """Whether all terms of a clause hold, for each pair whose other token exists."""
    if num_terms(META, S, C) == 0:
        kept = tl.broadcast_to(other_exists[None, :], (own_flags.shape[0], other_exists.shape[0]))
    else:
        kept = term_holds(
            META, S, C, 0, numbers, own_coords, other_coords, own_flags, other_flags, other_end,
            OWN_IS_QUERY,
        )  # fmt: skip
        for t in tl.static_range(1, num_terms(META, S, C)):
            kept = kept & term_holds(
                META, S, C, t, numbers, own_coords, other_coords, own_flags, other_flags, other_end,
                OWN_IS_QUERY,
            )  # fmt: skip
        if needs_exists(META, S, C, OWN_IS_QUERY):
            kept = kept & other_exists[None, :]
    return kept


@triton.jit
def keep_pairs(
    values,
    part,
    numbers,
    META: tl.constexpr,
    S: tl.constexpr,
    own_coords,
    other_coords,
    own_flags,
    flags_at,
    own_inner,
    block,
    other_exists,
    other_end,
    entry,
    inner,
    OWN_IS_QUERY: tl.constexpr,
    OTHERWISE: tl.constexpr,
):
    """Put `OTHERWISE` in a partial tile's values [own, other] where a pair is not kept.

    `flags_at` is where the other tokens' flags lie, `block` the other block if there is just one.
    """
    if only_intervals(META, S) > 0:
        LAST: tl.constexpr = only_intervals(META, S) - 1
        OWN: tl.constexpr = barring(META, S, True, OWN_IS_QUERY)
        OTHER: tl.constexpr = barring(META, S, False, OWN_IS_QUERY)
        away = barred(own_flags, numbers, OWN)
        for t in tl.static_range(0, LAST, 2):
            above, span = place_in_interval(
                META, S, 0, t, numbers, own_coords, other_coords, other_end, away, OWN_IS_QUERY
            )
            above2, span2 = place_in_interval(
                META, S, 0, t + 1, numbers, own_coords, other_coords, other_end, away, OWN_IS_QUERY
            )
            values = keep_within_both(values, above, span, above2, span2, OTHERWISE)
        if LAST % 2 == 0:
            above, span = place_in_interval(
                META, S, 0, LAST, numbers, own_coords, other_coords, other_end, away, OWN_IS_QUERY
            )
            values = keep_within(values, above, span, OTHERWISE)
        if needs_exists(META, S, 0, OWN_IS_QUERY):
            values = tl.where(other_exists[None, :], values, OTHERWISE)
        if count(OWN) > 0 and not bounds_tile(META, S, 0, 0):
            values = tl.where(away[:, None], OTHERWISE, values)
        if count(OTHER) > 0:
            # few blocks hold such tokens, and looking at all columns takes half a tile's time
            if tl.load(part.barring + block) != 0:
                others = barred(tl.load(flags_at, mask=other_exists, other=0), numbers, OTHER)
                values = tl.where(others[None, :], OTHERWISE, values)
        return values
    elif has_bits(META, S):
        which = tl.load(part.tile + entry, mask=other_exists, other=0).to(tl.int64)
        if OWN_IS_QUERY:
            query, key = own_inner[:, None], inner[None, :]
        else:
            query, key = inner[None, :], own_inner[:, None]
        address = which[None, :] * (part.tile_rows * part.tile_bytes)
        address += query * part.tile_bytes + key // 8
        # own lanes beyond a block would read beyond its tile
        inside = other_exists[None, :] & (query < part.tile_rows) & (key < part.tile_bytes * 8)
        byte = tl.load(part.bits + address, mask=inside, other=0).to(tl.int32)
        return tl.where(((byte >> (key % 8)) & 1) > 0, values, OTHERWISE)
    else:
        other_flags = tl.load(flags_at, mask=other_exists, other=0)
        kept = clause_holds(
            META, S, 0, numbers, own_coords, other_coords, own_flags, other_flags, other_exists,
            other_end, OWN_IS_QUERY,
        )  # fmt: skip
        for c in tl.static_range(1, num_own(META, S)):
            kept = kept | clause_holds(
                META, S, c, numbers, own_coords, other_coords, own_flags, other_flags, other_exists,
                other_end, OWN_IS_QUERY,
            )  # fmt: skip
        for c in tl.static_range(num_own(META, S), num_clauses(META, S)):
            kept = kept & ~clause_holds(
                META, S, c, numbers, own_coords, other_coords, own_flags, other_flags, other_exists,
                other_end, OWN_IS_QUERY,
            )  # fmt: skip
        return tl.where(kept, values, OTHERWISE)


@triton.jit
def program_place(heads_together):
    """Number of the item's tile, head and sample of this program; how many of the first two."""
    swapped = heads_together != 0
    first, second = tl.program_id(0), tl.program_id(1)
    num_first, num_second = tl.num_programs(0), tl.num_programs(1)
    number, head = tl.where(swapped, second, first), tl.where(swapped, first, second)
    numbers = tl.where(swapped, num_second, num_first)
    heads = tl.where(swapped, num_first, num_second)
    return number, head, tl.program_id(2).to(tl.int64), numbers, heads


@triton.jit
def is_empty(ranges, row, NUM_PARTS: tl.constexpr):
    """Whether an item takes nothing of any part's list."""
    count = 0
    for s in tl.static_range(NUM_PARTS):
        at = ranges + (row.to(tl.int64) * NUM_PARTS + s) * 5
        count += tl.load(at + 2) - tl.load(at)
    return count == 0


@triton.jit
def part_range(ranges, row, S: tl.constexpr, NUM_PARTS: tl.constexpr):
    """What an item takes of a part's list: begin, middle, end, and the blocks at begin and middle.

    Entries before `middle` need a mask.
    """
    at = ranges + (row.to(tl.int64) * NUM_PARTS + S) * 5
    begin, middle, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    return begin, middle, end, tl.load(at + 3), tl.load(at + 4)
