"""Joining the pieces of blocks whose lists were split, in a fixed order."""

import triton
import triton.language as tl

from sparse_core.kernels.tiles import load_rows, own_tokens, store_rows


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_states", "num_slots", "num_splits", "own_tiles", "shared",
    ]
)  # fmt: skip
def combine_kernel(
    partial,
    partial_vector,
    state,
    state_vector,
    state_of,
    out,
    vector,
    splits,
    group_of,
    own,
    num_tokens,
    num_states,
    num_slots,
    num_splits,
    own_tiles,
    shared,
    stride_b: tl.int64,
    stride_t,
    stride_h: tl.int64,
    WEIGHTED: tl.constexpr,
    OWN_INDEXED: tl.constexpr,
    OWN_REGULAR: tl.constexpr,
    FINAL: tl.constexpr,
    PRIOR: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add up the pieces of one tile, and what earlier launches left of its tokens.

    `WEIGHTED` takes the vector for log-sum-exps and the rows for outputs that belong to them;
    without it both are plain sums, and there may be no vector.
    """
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(1)
    split, tile = tl.program_id(0) // own_tiles, tl.program_id(0) % own_tiles
    if group_of is not None:
        kv_head = head // shared
        split += tl.load(group_of + sample * (num_heads // shared) + kv_head) * num_splits
    block = tl.load(splits + split * 3)
    slot, pieces = tl.load(splits + split * 3 + 1), tl.load(splits + split * 3 + 2)
    if block < 0:
        return
    tokens, exists, inner = own_tokens(
        own, block, tile, num_tokens, OWN_INDEXED, OWN_REGULAR, BLOCK
    )
    line = sample * num_heads + head
    states = line * num_states
    places, known = tokens, exists
    if PRIOR or not FINAL:
        if state_of is not None:
            places = tl.load(state_of + tokens, mask=exists, other=-1)
            known = places >= 0
    EMPTY: tl.constexpr = -float("inf") if WEIGHTED else 0.0
    joined = tl.full((BLOCK,), EMPTY, tl.float32)
    acc1 = tl.zeros((BLOCK, D1), tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros((BLOCK, D2), tl.float32)
    if PRIOR:
        acc1 = load_rows(state + states * D, 0, places, D, known, D, 0, D1, True)
        if D2 > 0:
            acc2 = load_rows(state + states * D, 0, places, D, known, D, D1, D2, True)
        if vector is not None:
            joined = tl.load(state_vector + states + places, mask=known, other=EMPTY)
    for piece in range(0, pieces):
        rows = (line * num_slots + slot + piece) * own.size
        more1 = load_rows(partial + rows * D, 0, inner, D, exists, D, 0, D1, True)
        more2 = more1
        if D2 > 0:
            more2 = load_rows(partial + rows * D, 0, inner, D, exists, D, D1, D2, True)
        if WEIGHTED:
            more_lse = tl.load(partial_vector + rows + inner, mask=exists, other=EMPTY)
            largest = tl.maximum(joined, more_lse)
            shift = tl.where(largest == EMPTY, 0.0, largest)
            old, new = tl.exp(joined - shift), tl.exp(more_lse - shift)
            total = old + new
            safe = tl.where(total > 0, total, 1.0)
            acc1 = acc1 * (old / safe)[:, None] + more1 * (new / safe)[:, None]
            if D2 > 0:
                acc2 = acc2 * (old / safe)[:, None] + more2 * (new / safe)[:, None]
            joined = tl.where(total > 0, tl.log(safe) + shift, EMPTY)
        else:
            acc1 += more1
            if D2 > 0:
                acc2 += more2
            if vector is not None:
                joined += tl.load(partial_vector + rows + inner, mask=exists, other=0.0)
    if FINAL:
        out += sample * stride_b + head * stride_h
        store_rows(out, tokens, stride_t, exists, acc1, D, 0, D1)
        if D2 > 0:
            store_rows(out, tokens, stride_t, exists, acc2, D, D1, D2)
        if vector is not None:
            tl.store(vector + line * num_tokens + tokens, joined, mask=exists)
    else:
        store_rows(state + states * D, places, D, exists, acc1, D, 0, D1)
        if D2 > 0:
            store_rows(state + states * D, places, D, exists, acc2, D, D1, D2)
        if vector is not None:
            tl.store(state_vector + states + places, joined, mask=exists)
