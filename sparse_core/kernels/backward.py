"""Gradients in two passes without atomics: dQ by query blocks, then dK and dV by key blocks.

Probabilities come again from the log-sum-exp (Dao et al. 2022, algorithm 4). The first pass leaves
two numbers of each query side by side for the second: shift, the log-sum-exp in base 2, +inf where
there are no keys, and delta, the sum of out * grad_out less the log-sum-exp's gradient. The second
works on transposed tiles (keys by queries), so that no dot's result is ever transposed.
"""

import triton
import triton.language as tl

from sparse_core.kernels.tiles import (
    GO_ON,
    LOG2_E,
    MASKED_STAGES,
    affine,
    biased,
    distance,
    guarded,
    is_empty,
    keep_pairs,
    load_coords,
    load_rows,
    load_tile,
    next_bias,
    next_block,
    num_tiles,
    other_axes,
    other_tokens,
    own_axes,
    own_tokens,
    part_range,
    program_place,
    ragged,
    spread_bias,
    store_bias_grad,
    store_rows,
    takes_key_bias,
)


@triton.jit
def query_steps(
    dq1,
    dq2,
    by_distance,
    q1,
    q2,
    do1,
    do2,
    row_shift,
    delta,
    k,
    v,
    k_box,
    v_box,
    sample,
    kv_head,
    key_bias,
    slope,
    block_bias,
    grad_bias,
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
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the list entries first to last - 1 of one part give to dQ."""
    KEY_BIASED: tl.constexpr = key_bias is not None and takes_key_bias(META, S)
    BIASED: tl.constexpr = block_bias is not None and biased(META, S)
    AFFINE: tl.constexpr = affine(META, S) and not MASKED
    CHECK: tl.constexpr = MASKED or ragged(META, S)
    STAGES: tl.constexpr = MASKED_STAGES if MASKED else None
    count = num_tiles(part, META, S, first, last, AFFINE, BLOCK)
    if BIASED:
        by_entry = tl.full((), 0.0, tl.float32)
        ahead, next_place = next_bias(block_bias, part, META, S, first, last, 0, BLOCK)
    for tile in tl.range(0, count, num_stages=STAGES):
        origin, rows, lanes, exists, end, entry, inner = other_tokens(
            part, num_others, META, S, first, last, block, tile, AFFINE, CHECK, BLOCK
        )
        here = block
        if not AFFINE:
            block = next_block(part, META, S, first, last, tile + 1, BLOCK)
        if BIASED:
            added, place = spread_bias(ahead, META, S), next_place
            ahead, next_place = next_bias(block_bias, part, META, S, first, last, tile + 1, BLOCK)
        tokens = origin + rows
        k1 = load_tile(
            k, k_box, sample, kv_head, origin, rows, stride_k, exists, D, 0, D1,
            META, S, MASKED, CHECK,
        )  # fmt: skip
        v1 = load_tile(
            v, v_box, sample, kv_head, origin, rows, stride_v, exists, D, 0, D1,
            META, S, MASKED, CHECK,
        )  # fmt: skip
        scores = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
        slopes = tl.dot(do1, tl.trans(v1), input_precision=PRECISION)
        k2 = k1
        if D2 > 0:
            k2 = load_tile(
                k, k_box, sample, kv_head, origin, rows, stride_k, exists, D, D1, D2,
                META, S, MASKED, CHECK,
            )  # fmt: skip
            v2 = load_tile(
                v, v_box, sample, kv_head, origin, rows, stride_v, exists, D, D1, D2,
                META, S, MASKED, CHECK,
            )  # fmt: skip
            scores = tl.dot(q2, tl.trans(k2), scores, input_precision=PRECISION)
            slopes = tl.dot(do2, tl.trans(v2), slopes, input_precision=PRECISION)
        scale = scale_log2
        if KEY_BIASED or slope is not None:
            scores = scores * scale_log2
            scale = 1.0
        my_coords = own_axes(own_coords, my_tokens, origin, META, S)
        other_coords = other_axes(key_coords, tokens, lanes, exists, META, S, P)
        if KEY_BIASED:
            bias = tl.load(key_bias + tokens, mask=exists, other=0.0).to(tl.float32)
            scores += (bias * LOG2_E)[None, :]
        if slope is not None:
            scores -= (slope * LOG2_E) * distance(my_coords, other_coords, P)
        shift = row_shift[:, None]
        if BIASED:
            shift -= added
        weights = tl.math.exp2(scores * scale - shift)
        if MASKED:
            weights = keep_pairs(
                weights, part, numbers, META, S, my_coords, other_coords, own_flags,
                key_flags + tokens, own_inner, here, exists, end, entry, inner, True, 0.0,
            )  # fmt: skip
        elif CHECK:
            weights = tl.where(exists[None, :], weights, 0.0)
        slopes = weights * (slopes - delta[:, None])
        if slope is not None:
            by_distance += tl.sum(slopes * distance(my_coords, other_coords, P), 1)
        if BIASED:
            by_entry = store_bias_grad(
                grad_bias, by_entry, slopes, part, META, S, first, last, tile, place, BLOCK
            )
        slopes = slopes.to(k1.dtype)
        dq1 = tl.dot(slopes, k1, dq1, input_precision=PRECISION)
        if D2 > 0:
            dq2 = tl.dot(slopes, k2, dq2, input_precision=PRECISION)
    return dq1, dq2, by_distance


@triton.jit(
    do_not_specialize=[
        "numbers", "num_queries", "num_keys", "num_items", "num_states", "num_slots", "own_tiles",
        "num_biases", "heads_together", "shared",
    ]
)  # fmt: skip
def query_kernel(
    q,
    k,
    v,
    k_box,
    v_box,
    out,
    grad_out,
    lse,
    grad_lse,
    row_terms,
    key_bias,
    slopes,
    block_bias,
    grad_q,
    grad_slopes,
    grad_block_bias,
    state,
    state_of,
    partial,
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
    scale,
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
    stride_gb: tl.int64,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_gt,
    stride_qh,
    stride_kh,
    stride_vh,
    stride_gh,
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
    """Compute dQ of one tile of queries over one work item, and its share of the biases'."""
    if ALIKE:
        stride_vt = stride_kt
    number, head, sample, num_programs, num_heads = program_place(heads_together)
    kv_head = head // shared
    item, tile = number // own_tiles, number % own_tiles
    group = 0
    if group_of is not None:
        group = tl.load(group_of + sample * (num_heads // shared) + kv_head)
    item += group * num_items
    block = tl.load(items + item * 4)
    first = tl.load(items + item * 4 + 1)
    slot = tl.load(items + item * 4 + 3)
    if block < 0:
        return
    if PRIOR and not FINAL:
        if (slot == GO_ON) & is_empty(ranges, item, NUM_PARTS):
            return  # the state stays as it is
    tokens, exists, own_inner = own_tokens(
        own, block, tile, num_queries, OWN_INDEXED, OWN_REGULAR, BLOCK_OWN
    )
    line = sample * num_heads + head
    q += sample * stride_qb + head.to(tl.int64) * stride_qh
    k += sample * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += sample * stride_vb + kv_head.to(tl.int64) * stride_vh
    grad_out += sample * stride_gb + head.to(tl.int64) * stride_gh
    out += (sample * num_queries * num_heads + head) * D
    if key_bias is not None:
        key_bias += sample * num_keys
    if block_bias is not None:
        block_bias += (sample * (num_heads // shared) + kv_head) * num_biases
        grad_block_bias += (line * own_tiles + tile) * num_biases
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32)
    q1 = load_rows(q, 0, tokens, stride_qt, exists, D, 0, D1, True)
    do1 = load_rows(grad_out, 0, tokens, stride_gt, exists, D, 0, D1, True)
    o1 = load_rows(out, 0, tokens, num_heads * D, exists, D, 0, D1, True)
    row_delta = tl.sum(o1.to(tl.float32) * do1.to(tl.float32), 1)
    q2, do2 = q1, do1
    dq1 = tl.zeros((BLOCK_OWN, D1), tl.float32)
    dq2 = dq1
    if D2 > 0:
        q2 = load_rows(q, 0, tokens, stride_qt, exists, D, D1, D2, True)
        do2 = load_rows(grad_out, 0, tokens, stride_gt, exists, D, D1, D2, True)
        o2 = load_rows(out, 0, tokens, num_heads * D, exists, D, D1, D2, True)
        row_delta += tl.sum(o2.to(tl.float32) * do2.to(tl.float32), 1)
        dq2 = tl.zeros((BLOCK_OWN, D2), tl.float32)
    rows = line * num_queries + tokens
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + rows, mask=exists, other=0.0)
    row_lse = tl.load(lse + rows, mask=exists, other=-float("inf"))
    # a row without keys has weights of 0, whatever its scores
    row_shift = tl.where(row_lse == -float("inf"), float("inf"), row_lse * LOG2_E)
    if slot < 0 or first == 0:
        tl.store(row_terms + rows * 2, row_shift, mask=exists)
        tl.store(row_terms + rows * 2 + 1, row_delta, mask=exists)
    places, known = tokens, exists
    if PRIOR or not FINAL:
        if state_of is not None:
            places = tl.load(state_of + tokens, mask=exists, other=-1)
            known = places >= 0
    states = line * num_states * D
    own_coords = load_coords(query_coords, tokens, exists, P)
    own_flags = tl.load(query_flags + tokens, mask=exists, other=0)
    by_distance = tl.zeros((BLOCK_OWN,), tl.float32)
    for s in tl.static_range(NUM_PARTS):
        begin, middle, end, partial_block, full_block = part_range(ranges, item, s, NUM_PARTS)
        dq1, dq2, by_distance = query_steps(
            dq1, dq2, by_distance, q1, q2, do1, do2, row_shift, row_delta, k, v, k_box, v_box,
            sample, kv_head, key_bias, slope, block_bias, grad_block_bias, parts[s], num_keys,
            numbers[s], key_coords, key_flags, tokens, own_coords, own_flags, own_inner,
            begin, middle, partial_block, stride_kt, stride_vt, scale_log2,
            META, s, True, D, D1, D2, P, BLOCK_OTHER, PRECISION,
        )  # fmt: skip
        dq1, dq2, by_distance = query_steps(
            dq1, dq2, by_distance, q1, q2, do1, do2, row_shift, row_delta, k, v, k_box, v_box,
            sample, kv_head, key_bias, slope, block_bias, grad_block_bias, parts[s], num_keys,
            numbers[s], key_coords, key_flags, tokens, own_coords, own_flags, own_inner,
            middle, end, full_block, stride_kt, stride_vt, scale_log2,
            META, s, False, D, D1, D2, P, BLOCK_OTHER, PRECISION,
        )  # fmt: skip
    if slope is not None:
        tl.store(grad_slopes + line * num_programs + number, -tl.sum(by_distance))
    dq1, dq2 = dq1 * scale, dq2 * scale
    if slot >= 0:
        partial += (line * num_slots + slot) * (own.size * D)
        store_rows(partial, own_inner, D, exists, dq1, D, 0, D1)
        if D2 > 0:
            store_rows(partial, own_inner, D, exists, dq2, D, D1, D2)
        return
    if PRIOR:
        if slot == GO_ON:
            dq1 += load_rows(state + states, 0, places, D, known, D, 0, D1, True)
            if D2 > 0:
                dq2 += load_rows(state + states, 0, places, D, known, D, D1, D2, True)
    if FINAL:
        grad_q += (sample * num_queries * num_heads + head) * D
        store_rows(grad_q, tokens, num_heads * D, exists, dq1, D, 0, D1)
        if D2 > 0:
            store_rows(grad_q, tokens, num_heads * D, exists, dq2, D, D1, D2)
    else:
        store_rows(state + states, places, D, exists, dq1, D, 0, D1)
        if D2 > 0:
            store_rows(state + states, places, D, exists, dq2, D, D1, D2)


@triton.jit
def key_steps(
    dk1,
    dk2,
    dv1,
    dv2,
    dbias,
    k1,
    k2,
    v1,
    v2,
    own_bias,
    q,
    grad_out,
    q_box,
    grad_box,
    sample,
    head,
    row_terms,
    slope,
    block_bias,
    part,
    num_others,
    numbers,
    query_coords,
    query_flags,
    my_tokens,
    own_coords,
    own_flags,
    own_inner,
    first,
    last,
    block,
    stride_q,
    stride_g,
    scale_log2,
    META: tl.constexpr,
    S: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add what the list entries first to last - 1 of one part give to dK and dV."""
    KEY_BIASED: tl.constexpr = own_bias is not None and takes_key_bias(META, S)
    BIASED: tl.constexpr = block_bias is not None and biased(META, S)
    AFFINE: tl.constexpr = affine(META, S) and not MASKED
    CHECK: tl.constexpr = MASKED or ragged(META, S)
    GUARD: tl.constexpr = CHECK and guarded(META, S)
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
            added = ahead
            ahead, _ = next_bias(block_bias, part, META, S, first, last, tile + 1, BLOCK)
        tokens = origin + rows
        q1 = load_tile(
            q, q_box, sample, head, origin, rows, stride_q, exists, D, 0, D1,
            META, S, MASKED, CHECK,
        )  # fmt: skip
        do1 = load_tile(
            grad_out, grad_box, sample, head, origin, rows, stride_g, exists, D, 0, D1,
            META, S, MASKED, CHECK,
        )  # fmt: skip
        scores = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)
        slopes = tl.dot(v1, tl.trans(do1), input_precision=PRECISION)
        q2, do2 = q1, do1
        if D2 > 0:
            q2 = load_tile(
                q, q_box, sample, head, origin, rows, stride_q, exists, D, D1, D2,
                META, S, MASKED, CHECK,
            )  # fmt: skip
            do2 = load_tile(
                grad_out, grad_box, sample, head, origin, rows, stride_g, exists, D, D1, D2,
                META, S, MASKED, CHECK,
            )  # fmt: skip
            scores = tl.dot(k2, tl.trans(q2), scores, input_precision=PRECISION)
            slopes = tl.dot(v2, tl.trans(do2), slopes, input_precision=PRECISION)
        scale = scale_log2
        if KEY_BIASED or slope is not None:
            scores = scores * scale_log2
            scale = 1.0
        my_coords = own_axes(own_coords, my_tokens, origin, META, S)
        other_coords = other_axes(query_coords, tokens, lanes, exists, META, S, P)
        if KEY_BIASED:
            scores += own_bias[:, None]
        if slope is not None:
            scores -= (slope * LOG2_E) * distance(my_coords, other_coords, P)
        pairs = row_terms + (tokens[:, None] * 2 + tl.arange(0, 2)[None, :])
        if GUARD:
            row_shift, row_delta = tl.split(tl.load(pairs, mask=exists[:, None], other=0.0))
        else:
            row_shift, row_delta = tl.split(tl.load(pairs))
        if CHECK and not MASKED:
            row_shift = tl.where(exists, row_shift, float("inf"))
        if BIASED:
            row_shift -= added
        weights = tl.math.exp2(scores * scale - row_shift[None, :])
        if MASKED:
            weights = keep_pairs(
                weights, part, numbers, META, S, my_coords, other_coords, own_flags,
                query_flags + tokens, own_inner, here, exists, end, entry, inner, False, 0.0,
            )  # fmt: skip
        slopes = weights * (slopes - row_delta[None, :])
        if KEY_BIASED:
            dbias += tl.sum(slopes, 1)
        weights, slopes = weights.to(do1.dtype), slopes.to(q1.dtype)
        dv1 = tl.dot(weights, do1, dv1, input_precision=PRECISION)
        dk1 = tl.dot(slopes, q1, dk1, input_precision=PRECISION)
        if D2 > 0:
            dv2 = tl.dot(weights, do2, dv2, input_precision=PRECISION)
            dk2 = tl.dot(slopes, q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv1, dv2, dbias


@triton.jit(
    do_not_specialize=[
        "numbers", "num_queries", "num_keys", "num_items", "num_states", "num_slots", "own_tiles",
        "num_biases", "heads_together", "shared",
    ]
)  # fmt: skip
def key_kernel(
    q,
    k,
    v,
    grad_out,
    q_box,
    grad_box,
    row_terms,
    key_bias,
    slopes,
    block_bias,
    grad_k,
    grad_v,
    grad_bias,
    state_k,
    state_v,
    state_bias,
    state_of,
    partial_k,
    partial_v,
    partial_bias,
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
    scale,
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
    stride_gb: tl.int64,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_gt,
    stride_qh,
    stride_kh,
    stride_vh,
    stride_gh,
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
    """Compute one query head's dK, dV and key-bias gradient of one tile of keys.

    `grad_k` and `grad_v` are [B, Tk, H, D], one for each query head.
    """
    if ALIKE:
        stride_gt = stride_qt
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
        own, block, tile, num_keys, OWN_INDEXED, OWN_REGULAR, BLOCK_OWN
    )
    line = sample * num_heads + head
    q += sample * stride_qb + head.to(tl.int64) * stride_qh
    k += sample * stride_kb + kv_head.to(tl.int64) * stride_kh
    v += sample * stride_vb + kv_head.to(tl.int64) * stride_vh
    grad_out += sample * stride_gb + head.to(tl.int64) * stride_gh
    own_bias = None
    if key_bias is not None:
        own_bias = tl.load(key_bias + sample * num_keys + tokens, mask=exists, other=0.0)
        own_bias = own_bias.to(tl.float32) * LOG2_E
    if block_bias is not None:
        block_bias += (sample * (num_heads // shared) + kv_head) * num_biases
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32)
    k1 = load_rows(k, 0, tokens, stride_kt, exists, D, 0, D1, True)
    v1 = load_rows(v, 0, tokens, stride_vt, exists, D, 0, D1, True)
    k2, v2 = k1, v1
    dk1 = tl.zeros((BLOCK_OWN, D1), tl.float32)
    dv1 = tl.zeros((BLOCK_OWN, D1), tl.float32)
    dk2, dv2 = dk1, dv1
    if D2 > 0:
        k2 = load_rows(k, 0, tokens, stride_kt, exists, D, D1, D2, True)
        v2 = load_rows(v, 0, tokens, stride_vt, exists, D, D1, D2, True)
        dk2 = tl.zeros((BLOCK_OWN, D2), tl.float32)
        dv2 = tl.zeros((BLOCK_OWN, D2), tl.float32)
    places, known = tokens, exists
    if PRIOR or not FINAL:
        if state_of is not None:
            places = tl.load(state_of + tokens, mask=exists, other=-1)
            known = places >= 0
    own_coords = load_coords(key_coords, tokens, exists, P)
    own_flags = tl.load(key_flags + tokens, mask=exists, other=0)
    dbias = tl.zeros((BLOCK_OWN,), tl.float32)
    for s in tl.static_range(NUM_PARTS):
        begin, middle, end, partial_block, full_block = part_range(ranges, item, s, NUM_PARTS)
        dk1, dk2, dv1, dv2, dbias = key_steps(
            dk1, dk2, dv1, dv2, dbias, k1, k2, v1, v2, own_bias, q, grad_out,
            q_box, grad_box, sample, head, row_terms + line * num_queries * 2, slope, block_bias,
            parts[s], num_queries, numbers[s], query_coords, query_flags, tokens, own_coords,
            own_flags, own_inner, begin, middle, partial_block,
            stride_qt, stride_gt, scale_log2,
            META, s, True, D, D1, D2, P, BLOCK_OTHER, PRECISION,
        )  # fmt: skip
        dk1, dk2, dv1, dv2, dbias = key_steps(
            dk1, dk2, dv1, dv2, dbias, k1, k2, v1, v2, own_bias, q, grad_out,
            q_box, grad_box, sample, head, row_terms + line * num_queries * 2, slope, block_bias,
            parts[s], num_queries, numbers[s], query_coords, query_flags, tokens, own_coords,
            own_flags, own_inner, middle, end, full_block,
            stride_qt, stride_gt, scale_log2,
            META, s, False, D, D1, D2, P, BLOCK_OTHER, PRECISION,
        )  # fmt: skip
    dk1, dk2 = dk1 * scale, dk2 * scale
    if slot >= 0:
        rows = (line * num_slots + slot) * own.size
        store_rows(partial_k + rows * D, own_inner, D, exists, dk1, D, 0, D1)
        store_rows(partial_v + rows * D, own_inner, D, exists, dv1, D, 0, D1)
        if D2 > 0:
            store_rows(partial_k + rows * D, own_inner, D, exists, dk2, D, D1, D2)
            store_rows(partial_v + rows * D, own_inner, D, exists, dv2, D, D1, D2)
        if own_bias is not None:
            tl.store(partial_bias + rows + own_inner, dbias, mask=exists)
        return
    states = line * num_states
    if PRIOR:
        if slot == GO_ON:
            dk1 += load_rows(state_k + states * D, 0, places, D, known, D, 0, D1, True)
            dv1 += load_rows(state_v + states * D, 0, places, D, known, D, 0, D1, True)
            if D2 > 0:
                dk2 += load_rows(state_k + states * D, 0, places, D, known, D, D1, D2, True)
                dv2 += load_rows(state_v + states * D, 0, places, D, known, D, D1, D2, True)
            if own_bias is not None:
                dbias += tl.load(state_bias + states + places, mask=known, other=0.0)
    if FINAL:
        lines = (sample * num_keys * num_heads + head) * D
        store_rows(grad_k + lines, tokens, num_heads * D, exists, dk1, D, 0, D1)
        store_rows(grad_v + lines, tokens, num_heads * D, exists, dv1, D, 0, D1)
        if D2 > 0:
            store_rows(grad_k + lines, tokens, num_heads * D, exists, dk2, D, D1, D2)
            store_rows(grad_v + lines, tokens, num_heads * D, exists, dv2, D, D1, D2)
        if own_bias is not None:
            tl.store(grad_bias + line * num_keys + tokens, dbias, mask=exists)
    else:
        store_rows(state_k + states * D, places, D, exists, dk1, D, 0, D1)
        store_rows(state_v + states * D, places, D, exists, dv1, D, 0, D1)
        if D2 > 0:
            store_rows(state_k + states * D, places, D, exists, dk2, D, D1, D2)
            store_rows(state_v + states * D, places, D, exists, dv2, D, D1, D2)
        if own_bias is not None:
            tl.store(state_bias + states + places, dbias, mask=exists)
