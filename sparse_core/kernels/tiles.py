"""What all kernels do with a tile: find its tokens, load, mask, measure distance, store.

A kernel owns a tile of one side (queries, or keys in dK/dV) and walks over tiles of the other side.
Own tokens stand along the tile's rows, the others along its columns, so that no kernel transposes
what a dot gave. What is constant while a kernel runs but differs between parts of a layout comes
as `META`, a nested tuple of constants that `sparse_core.kernels.arguments` writes.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

INTERVAL, CONGRUENT, QUERY_FLAG, KEY_FLAG = range(4)
"""The codes of sparse_core.masking; a test holds them equal."""


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
def regular(meta, s):
    """Whether block b begins at token b * size."""
    return meta[s].regular


@triton.constexpr_function
def has_bits(meta, s):
    """Whether partial blocks are masked by tiles of bits."""
    return meta[s].bits


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
def run_start(part, META: tl.constexpr, S: tl.constexpr, first, last):
    """Where the run of full blocks begins that the list entries first to last - 1 name."""
    some = first < last
    block = tl.load(part.indices + first, mask=some, other=0)
    return block_start(part, META, S, block, some)


@triton.jit
def other_tokens(
    part,
    num_others,
    META: tl.constexpr,
    S: tl.constexpr,
    first,
    last,
    start,
    tile,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find a tile of the other side: tokens are origin + lanes, [BLOCK].

    Also which exist, their list entries, and their places in their blocks. Where a tile lies in one
    block, origin is a number and lanes stay the same from tile to tile.
    """
    lane = tl.arange(0, BLOCK)
    if AFFINE:
        entry = first + tl.zeros_like(lane)
        inner = tile * BLOCK + lane
        origin = start + tile * (BLOCK * part.stride)
        lanes = lane * part.stride
        exists = inner < (last - first) * part.size
    elif small(META, S) > 0:
        per_tile = BLOCK // small(META, S)
        entry = first + tile * per_tile + lane // small(META, S)
        inner = lane % small(META, S)
        valid = (entry < last) & (lane < per_tile * small(META, S))
        block = tl.load(part.indices + entry, mask=valid, other=0)
        origin = tile * 0
        lanes = block_start(part, META, S, block, valid) + inner * part.stride
        exists = valid & (inner < block_count(part, num_others, META, S, block, valid))
    else:
        which, step = first + tile, 0
        if not single(META, S):
            tiles = tl.cdiv(part.size, BLOCK)
            which, step = first + tile // tiles, (tile % tiles) * BLOCK
        entry = which + tl.zeros_like(lane)
        inner = step + lane
        block = tl.load(part.indices + which)
        origin = block_start(part, META, S, block, True) + step * part.stride
        lanes = lane * part.stride
        exists = inner < block_count(part, num_others, META, S, block, True)
    if indexed(META, S):
        lanes = tl.load(part.order + origin + lanes, mask=exists, other=0)
        return tile * 0, lanes, exists, entry, inner
    else:
        return origin, lanes, exists, entry, inner


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
    for a in tl.static_range(P):
        axis_coords = tl.load(coords + tokens.to(tl.int64) * P + a, mask=exists, other=0)
        found = found + (axis_coords,)  # type: ignore[assignment]
    return found


@triton.jit
def own_axes(coords, tokens, META: tl.constexpr, S: tl.constexpr):
    """Own coordinates as a part's terms want them."""
    if natural(META, S):
        return (tokens,)
    else:
        return coords


@triton.jit
def other_axes(coords, tokens, exists, META: tl.constexpr, S: tl.constexpr, P: tl.constexpr):
    """Coordinates of the other side's tokens as a part's terms want them."""
    if natural(META, S):
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
    OWN_IS_QUERY: tl.constexpr,
):
    """Evaluate one term on each pair; the shape may be [M, N], [M, 1] or [1, N]."""
    if code(META, S, C, T) == INTERVAL_CODE:
        # one comparison: differences below `low` wrap around to large unsigned numbers
        low, high = numbers[place(META, S, C, T)], numbers[place(META, S, C, T) + 1]
        mine, theirs = own_coords[axis(META, S, C, T)], other_coords[axis(META, S, C, T)]
        if OWN_IS_QUERY:
            above = (mine - low)[:, None] - theirs[None, :]
        else:
            above = theirs[None, :] - (mine + low)[:, None]
        span = tl.cast(high - low, tl.uint32, bitcast=True)
        return above.to(tl.uint32, bitcast=True) <= span
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
    OWN_IS_QUERY: tl.constexpr,
):
    """Whether all terms of a clause hold, for each pair whose other token exists."""
    kept = tl.broadcast_to(other_exists[None, :], (own_flags.shape[0], other_exists.shape[0]))
    for t in tl.static_range(num_terms(META, S, C)):
        kept = kept & term_holds(
            META, S, C, t, numbers, own_coords, other_coords, own_flags, other_flags, OWN_IS_QUERY
        )
    return kept


@triton.jit
def kept_pairs(
    part,
    numbers,
    META: tl.constexpr,
    S: tl.constexpr,
    own_coords,
    other_coords,
    own_flags,
    other_flags,
    own_inner,
    other_exists,
    entry,
    inner,
    OWN_IS_QUERY: tl.constexpr,
):
    """Which pairs of a partial tile are kept, [own, other]."""
    if has_bits(META, S):
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
        return ((byte >> (key % 8)) & 1) > 0
    else:
        kept = clause_holds(
            META, S, 0, numbers, own_coords, other_coords, own_flags, other_flags, other_exists,
            OWN_IS_QUERY,
        )  # fmt: skip
        for c in tl.static_range(1, num_own(META, S)):
            kept = kept | clause_holds(
                META, S, c, numbers, own_coords, other_coords, own_flags, other_flags, other_exists,
                OWN_IS_QUERY,
            )  # fmt: skip
        for c in tl.static_range(num_own(META, S), num_clauses(META, S)):
            kept = kept & ~clause_holds(
                META, S, c, numbers, own_coords, other_coords, own_flags, other_flags, other_exists,
                OWN_IS_QUERY,
            )  # fmt: skip
        return kept


@triton.jit
def entry_range(part, group, block, first, last, passed, num_blocks):
    """Cut an item's range out of a part's list: begin, middle, end, and entries passed so far.

    An item counts entries over the lists of all parts of its block, one part after another.
    Entries before `middle` need a mask.
    """
    row = group.to(tl.int64) * num_blocks + block
    begin = tl.load(part.ptr + row + group)
    end = tl.load(part.ptr + row + group + 1)
    middle = tl.load(part.full + row)
    low = begin + tl.minimum(tl.maximum(first - passed, 0), end - begin)
    high = begin + tl.minimum(tl.maximum(last - passed, 0), end - begin)
    middle = tl.minimum(tl.maximum(middle, low), high)
    return low, middle, high, passed + (end - begin)
