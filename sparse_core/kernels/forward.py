"""Output and log-sum-exp: one program a tile of queries and a head (Dao 2023, FlashAttention-2).

The running maximum of an online softmax only keeps exponents in range. Once a row has met some of
its keys, their maximum serves for the full blocks that follow: no maxima, no rescaling, a quarter
of the loop's instructions less. Rows that outgrow it are computed again with a running maximum,
which is the same softmax (Milakov and Gimelshein 2018, "Online normalizer calculation").
"""

import triton
import triton.language as tl

from sparse_core.kernels.tiles import (
    GO_ON,
    LN_2,
    LOG2_E,
    MASKED_STAGES,
    affine,
    any_takes_no_key_bias,
    biased,
    distance,
    is_empty,
    keep_pairs,
    load_coords,
    load_rows,
    load_tile,
    next_bias,
    next_block,
    num_tiles,
    only_intervals,
    other_axes,
    other_tokens,
    own_axes,
    own_tokens,
    part_range,
    program_place,
    ragged,
    spread_bias,
    store_rows,
    takes_key_bias,
)


@triton.jit
def softmax_step(scores, scale, largest, total, SAFE: tl.constexpr):
    """One step of the online softmax in base 2: weights, new maximum and sum, and the old's share.

    `scale` is above 0; it multiplies the scores within the exponent's one multiply-add. `SAFE` says
    that a row may hold nothing but -inf.
    """
    joined = tl.maximum(largest, tl.max(scores, 1) * scale)
    shift = joined
    if SAFE:
        shift = tl.where(joined == -float("inf"), 0.0, joined)
    weights = tl.math.exp2(scores * scale - shift[:, None])
    share = tl.math.exp2(largest - shift)
    return weights, joined, total * share + tl.sum(weights, 1), share


@triton.jit
def attend(
    acc1,
    acc2,
    largest,
    total,
    q1,
    q2,
    k,
    v,
    k_box,
    v_box,
    sample,
    kv_head,
    key_bias,
    slope,
    block_bias,
    part,
    num_others,
    numbers,
    key_coords,
    key_flags,
    my_tokens,
    own_coords,
    own_flags,
    own_inner,
    first,
    last,
    block,
    stride_k,
    stride_v,
    scale_log2,
    META: tl.constexpr,
    S: tl.constexpr,
    MASKED: tl.constexpr,
    STEADY: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take the list entries first to last - 1 of one part into the softmax.

    `STEADY` leaves the maxima as they are; `total` then is [M, 4], parts of each row's sum.
    """
    KEY_BIASED: tl.constexpr = key_bias is not None and takes_key_bias(META, S)
    BIASED: tl.constexpr = block_bias is not None and biased(META, S)
    AFFINE: tl.constexpr = affine(META, S) and not MASKED
    CHECK: tl.constexpr = MASKED or ragged(META, S)
    STAGES: tl.constexpr = MASKED_STAGES if MASKED else None
    count = num_tiles(part, META, S, first, last, AFFINE, BLOCK)
    if BIASED:
        ahead, _ = next_bias(block_bias, part, META, S, first, last, 0, BLOCK)
    for tile in tl.range(0, count, num_stages=STAGES):
        origin, rows, lanes, exists, end, entry, inner = other_tokens(
            part, num_others, META, S, first, last, block, tile, AFFINE, CHECK, BLOCK
        )
        here = block
        if not AFFINE:
            block = next_block(part, META, S, first, last, tile + 1, BLOCK)
        if BIASED:
            added = spread_bias(ahead, META, S)
            ahead, _ = next_bias(block_bias, part, META, S, first, last, tile + 1, BLOCK)
        tokens = origin + rows
        k1 = load_tile(
            k, k_box, sample, kv_head, origin, rows, stride_k, exists, D, 0, D1,
            META, S, MASKED, CHECK,
        )  # fmt: skip
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        if D2 > 0:
            k2 = load_tile(
                k, k_box, sample, kv_head, origin, rows, stride_k, exists, D, D1, D2,
                META, S, MASKED, CHECK,
            )  # fmt: skip
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
        scale = scale_log2
        if KEY_BIASED or slope is not None or (BIASED and not STEADY):
            scores = scores * scale_log2
            scale = 1.0
        my_coords = own_axes(own_coords, my_tokens, origin, META, S)
        other_coords = other_axes(key_coords, tokens, lanes, exists, META, S, P)
        if KEY_BIASED:
            bias = tl.load(key_bias + tokens, mask=exists, other=0.0).to(tl.float32)
            scores += (bias * LOG2_E)[None, :]
        if BIASED and not STEADY:
            scores += added
        if slope is not None:
            scores -= (slope * LOG2_E) * distance(my_coords, other_coords, P)
        if MASKED:
            scores = keep_pairs(
                scores, part, numbers, META, S, my_coords, other_coords, own_flags,
                key_flags + tokens, own_inner, here, exists, end, entry, inner, True, -float("inf"),
            )  # fmt: skip
        elif CHECK:
            scores = tl.where(exists[None, :], scores, -float("inf"))
        if STEADY:
            shift = largest[:, None]
            if BIASED:
                shift -= added
            weights = tl.math.exp2(scores * scale - shift)
            # columns of a product lie two by two in four threads: each adds up its own
            shares = tl.reshape(weights, (weights.shape[0], BLOCK // 8, 4, 2))
            total += tl.sum(tl.sum(shares, 3), 1)
        else:
            weights, largest, total, share = softmax_step(
                scores, scale, largest, total, CHECK or KEY_BIASED or BIASED
            )
            acc1 = acc1 * share[:, None]
            if D2 > 0:
                acc2 = acc2 * share[:, None]
        v1 = load_tile(
            v, v_box, sample, kv_head, origin, rows, stride_v, exists, D, 0, D1,
            META, S, MASKED, CHECK,
        )  # fmt: skip
        weights = weights.to(v1.dtype)
        acc1 = tl.dot(weights, v1, acc1, input_precision=PRECISION)
        if D2 > 0:
            v2 = load_tile(
                v, v_box, sample, kv_head, origin, rows, stride_v, exists, D, D1, D2,
                META, S, MASKED, CHECK,
            )  # fmt: skip
            acc2 = tl.dot(weights, v2, acc2, input_precision=PRECISION)
    return acc1, acc2, largest, total


@triton.jit
def outgrown(acc1, acc2, total, D2: tl.constexpr):
    """Whether weights of some row came near the end of what numbers can hold."""
    beyond = tl.where(total < ROOM, 0, 1) + tl.sum(tl.where(tl.abs(acc1) < ENDLESS, 0, 1), 1)
    if D2 > 0:
        beyond += tl.sum(tl.where(tl.abs(acc2) < ENDLESS, 0, 1), 1)
    return tl.sum(beyond) > 0


ROOM = tl.constexpr(2.0**64)
ENDLESS = tl.constexpr(float("inf"))


@triton.jit(
    do_not_specialize=[
        "numbers", "num_queries", "num_keys", "num_items", "num_states", "num_slots", "own_tiles",
        "num_biases", "heads_together", "shared",
    ]
)  # fmt: skip
def forward_kernel(
    q,
    k,
    v,
    k_box,
    v_box,
    key_bias,
    slopes,
    block_bias,
    out,
    lse,
    state,
    state_lse,
    state_of,
    partial,
    partial_lse,
    items,
    ranges,
    group_of,
    own,
    parts,
    numbers,
    query_coords,
    key_coords,
    query_flags,
    key_flags,
    scale_log2,
    num_queries,
    num_keys,
    num_items,
    num_states,
    num_slots,
    own_tiles,
    num_biases,
    heads_together,
    shared,
    stride_qb: tl.int64,
    stride_kb: tl.int64,
    stride_vb: tl.int64,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_qh,
    stride_kh,
    stride_vh,
    META: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    OWN_INDEXED: tl.constexpr,
    OWN_REGULAR: tl.constexpr,
    FINAL: tl.constexpr,
    PRIOR: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    ALIKE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend from one tile of queries to the keys of one work item.

    With `PRIOR` the softmax goes on from the state that earlier launches left of these queries.
    A whole row ends in `out` and `lse` (`FINAL`) or in the state; a piece in `partial`.
    """
    if ALIKE:
        stride_vt = stride_kt
    number, head, sample, _num_programs, num_heads = program_place(heads_together)
    kv_head = head // shared
    item, tile = number // own_tiles, number % own_tiles
    group = 0
    if group_of is not None:
        group = tl.load(group_of + sample * (num_heads // shared) + kv_head)
    item += group * num_items
    block = tl.load(items + item * 4)
    slot = tl.load(items + item * 4 + 3)
    if block < 0:
        return
    if PRIOR and not FINAL:
        if (slot == GO_ON) & is_empty(ranges, item, NUM_PARTS):
            return  # the state stays as it is
    tokens, exists, own_inner = own_tokens(
        own, block, tile, num_queries, OWN_INDEXED, OWN_REGULAR, BLOCK_OWN
    )
    row = (sample * num_heads + head) * num_queries
    q += sample * stride_qb + head.to(tl.int64) * stride_qh
    k += sample * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += sample * stride_vb + kv_head.to(tl.int64) * stride_vh
    if key_bias is not None:
        key_bias += sample * num_keys
    if block_bias is not None:
        block_bias += (sample * (num_heads // shared) + kv_head) * num_biases
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32)
    q1 = load_rows(q, 0, tokens, stride_qt, exists, D, 0, D1, True)
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q, 0, tokens, stride_qt, exists, D, D1, D2, True)
    states = (sample * num_heads + head) * num_states
    places, known = tokens, exists
    if PRIOR or not FINAL:
        if state_of is not None:
            places = tl.load(state_of + tokens, mask=exists, other=-1)
            known = places >= 0
    own_coords = load_coords(query_coords, tokens, exists, P)
    own_flags = tl.load(query_flags + tokens, mask=exists, other=0)
    HALF: tl.constexpr = q.dtype.element_ty.primitive_bitwidth == 16
    UNBIASED: tl.constexpr = key_bias is None or any_takes_no_key_bias(META)
    # windows of several axes have few full blocks
    STEADY: tl.constexpr = HALF and UNBIASED and slopes is None and only_intervals(META, 0) <= 1
    acc1 = tl.zeros((BLOCK_OWN, D1), tl.float32)
    acc2 = acc1
    if D2 > 0:
        acc2 = tl.zeros((BLOCK_OWN, D2), tl.float32)
    largest = tl.full((BLOCK_OWN,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_OWN,), tl.float32)
    attempt = 0
    while attempt < 2:
        if STEADY:
            acc1, acc2 = tl.zeros_like(acc1), tl.zeros_like(acc2)
            largest = tl.full((BLOCK_OWN,), -float("inf"), tl.float32)
            total = tl.zeros((BLOCK_OWN,), tl.float32)
        if PRIOR:
            if slot == GO_ON:
                largest = tl.load(state_lse + states + places, mask=known, other=-float("inf"))
                total = tl.where(largest > -float("inf"), 1.0, 0.0)
                largest = largest * LOG2_E
                acc1 = load_rows(state + states * D, 0, places, D, known, D, 0, D1, True)
                if D2 > 0:
                    acc2 = load_rows(state + states * D, 0, places, D, known, D, D1, D2, True)
        for s in tl.static_range(NUM_PARTS):
            begin, middle, end, partial_block, full_block = part_range(ranges, item, s, NUM_PARTS)
            acc1, acc2, largest, total = attend(
                acc1, acc2, largest, total, q1, q2, k, v, k_box, v_box, sample,
                kv_head, key_bias, slope, block_bias, parts[s],
                num_keys, numbers[s],
                key_coords, key_flags, tokens, own_coords, own_flags,
                own_inner, begin, middle, partial_block,
                stride_kt, stride_vt, scale_log2,
                META, s, True, False, D, D1, D2, P, BLOCK_OTHER, PRECISION,
            )  # fmt: skip
            first = end
            if STEADY and (key_bias is None or not takes_key_bias(META, s)):
                # rows that met no key yet take one block to find their shift
                lacking = (tl.min(largest) == -float("inf")).to(tl.int32)
                first = tl.minimum(middle + lacking + attempt * (end - middle), end)
            acc1, acc2, largest, total = attend(
                acc1, acc2, largest, total, q1, q2, k, v, k_box, v_box, sample,
                kv_head, key_bias, slope, block_bias, parts[s],
                num_keys, numbers[s],
                key_coords, key_flags, tokens, own_coords, own_flags,
                own_inner, middle, first, full_block,
                stride_kt, stride_vt, scale_log2,
                META, s, False, False, D, D1, D2, P, BLOCK_OTHER, PRECISION,
            )  # fmt: skip
            if STEADY and (key_bias is None or not takes_key_bias(META, s)):
                sums = tl.zeros((BLOCK_OWN, 4), tl.float32)
                full_block = tl.load(parts[s].indices + first, mask=first < end, other=0)
                acc1, acc2, largest, sums = attend(
                    acc1, acc2, largest, sums, q1, q2, k, v, k_box, v_box, sample,
                    kv_head, key_bias, slope, block_bias, parts[s],
                    num_keys, numbers[s],
                    key_coords, key_flags, tokens, own_coords, own_flags,
                    own_inner, first, end, full_block,
                    stride_kt, stride_vt, scale_log2,
                    META, s, False, True, D, D1, D2, P, BLOCK_OTHER, PRECISION,
                )  # fmt: skip
                total += tl.sum(sums, 1)
        attempt += 2
        if STEADY:
            if outgrown(acc1, acc2, total, D2):
                attempt -= 1
    some = total > 0
    safe = tl.where(some, total, 1.0)
    row_lse = tl.where(some, (largest + tl.math.log2(safe)) * LN_2, -float("inf"))
    acc1 = acc1 / safe[:, None]
    if D2 > 0:
        acc2 = acc2 / safe[:, None]
    if slot >= 0:
        pieces = (sample * num_heads + head) * num_slots + slot
        partial += pieces * (own.size * D)
        tl.store(partial_lse + pieces * own.size + own_inner, row_lse, mask=exists)
        store_rows(partial, own_inner, D, exists, acc1, D, 0, D1)
        if D2 > 0:
            store_rows(partial, own_inner, D, exists, acc2, D, D1, D2)
    elif FINAL:
        out += (sample * num_queries * num_heads + head) * D
        tl.store(lse + row + tokens, row_lse, mask=exists)
        store_rows(out, tokens, num_heads * D, exists, acc1, D, 0, D1)
        if D2 > 0:
            store_rows(out, tokens, num_heads * D, exists, acc2, D, D1, D2)
    else:
        tl.store(state_lse + states + places, row_lse, mask=exists)
        store_rows(state + states * D, places, D, exists, acc1, D, 0, D1)
        if D2 > 0:
            store_rows(state + states * D, places, D, exists, acc2, D, D1, D2)
