"""The op: attention over a layout, as a torch custom op with a choice of engines."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_core import blockwise, kernels
from sparse_core.blocking import Blocks
from sparse_core.layout import BlockLayout, Lists, Part
from sparse_core.reference import coordinate_distance, reference_attention
from sparse_core.schedule import SPACINGS, Agenda, Launch, Schedule

Backend = Literal["auto", "blockwise", "reference", "triton"]
Precision = Literal["ieee", "tf32"]


def sparse_attention(
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk Hkv D"],
    v: Float[Tensor, "B Tk Hkv D"],
    layout: BlockLayout,
    *,
    scale: float | None = None,
    key_bias: Float[Tensor, "B Tk"] | None = None,
    alibi_slopes: Float[Tensor, "H"] | None = None,
    block_bias: Float[Tensor, "B Hkv N"] | None = None,
    backend: Backend = "auto",
    precision: Precision = "ieee",
    return_lse: bool = False,
) -> Float[Tensor, "B Tq H D"] | tuple[Float[Tensor, "B Tq H D"], Float[Tensor, "B H Tq"]]:
    """Attend from every query to the keys that the layout keeps, in one softmax.

    Scores are `scale * q.k + key_bias[key] - alibi_slopes[head] * distance(query, key)`, where the
    distance is that of the layout's coordinates (Euclidean) and `scale` is `D ** -0.5` if not
    given. Where a layout's pairs of blocks take numbers (see `with_block_biases`), `block_bias`
    holds `layout.num_biases` of them for each key head, and each is added to all scores of its
    pair of blocks. Several query heads may share a key head (H a multiple of Hkv). A query that may
    attend to nothing gives output 0, log-sum-exp -inf and gradient 0.

    `backend` names the engine; "auto" takes the fastest that can run here: "triton" on a GPU for
    float32, float16 and bfloat16 and head dimensions up to 256, else "blockwise". All engines are
    exact, and differentiable in q, k, v, the biases, the slopes and through the returned
    log-sum-exp. `precision="tf32"` lets the Triton engine round the factors of float32 products to
    10 bits; other engines and dtypes do not heed it. Attention dropout is not offered: drop in the
    residual stream instead.

    Raises ValueError for shapes, dtypes, devices that do not fit, and RuntimeError for a named
    engine that cannot run here.
    """
    layout = _for_batch(layout, q.shape[0])
    _validate(q, k, v, layout, key_bias, alibi_slopes, block_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if precision not in ("ieee", "tf32"):
        raise ValueError(f"precision is ieee or tf32; got {precision!r}")
    engine = choose_engine(backend, q)
    if engine == "reference":
        out, lse = _run_reference(q, k, v, layout, scale, key_bias, alibi_slopes, block_bias)
    elif torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        tensors, numbers = _flatten(layout)
        out, lse = torch.ops.gigasparse.attention(
            q, k, v, key_bias, alibi_slopes, block_bias, tensors, numbers, scale, engine, precision
        )
    else:
        q, k, v = _autocast(q, k, v)
        out, lse = _Attention.apply(
            q, k, v, key_bias, alibi_slopes, block_bias, layout, scale, engine, precision
        )
    return (out, lse) if return_lse else out


def choose_engine(backend: Backend, q: Tensor) -> str:
    """Name the engine that `backend` stands for with such queries.

    Raises RuntimeError if "triton" is named and cannot take them.
    """
    if backend in ("blockwise", "reference"):
        return backend
    if backend == "auto":
        on_gpu = q.device.type == "cuda"
        return "triton" if on_gpu and kernels.why_not(q) is None else "blockwise"
    if backend == "triton":
        reason = kernels.why_not(q)
        if reason is not None:
            raise RuntimeError(f"backend='triton' cannot run: {reason}; use 'auto' or 'blockwise'")
        return backend
    raise ValueError(f"backend is auto, blockwise, reference or triton; got {backend!r}")


_CALLS: Counter[str] = Counter()


def engines_used() -> dict[str, int]:
    """Count this process's calls, forward and backward, by the engine that served them."""
    return dict(_CALLS)


def reset_engines_used() -> None:
    """Begin counting anew."""
    _CALLS.clear()


def merge_attention(
    outs: list[Float[Tensor, "B T H D"]], lses: list[Float[Tensor, "B H T"]]
) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B H T"]]:
    """Join attention over disjoint sets of keys into attention over their union; exact.

    Differentiable, also through the log-sum-exps. Takes what `return_lse=True` gives; queries
    without keys anywhere stay 0 with log-sum-exp -inf.
    """
    stacked = torch.stack(lses)
    largest = stacked.detach().amax(0).clamp(min=torch.finfo(stacked.dtype).min)
    weights = (stacked - largest).exp()
    total = weights.sum(0)
    some = total > 0
    safe = torch.where(some, total, 1)
    shares = (weights / safe).transpose(-1, -2)[..., None]
    out = sum(share * part for share, part in zip(shares, outs, strict=True))
    lse = torch.where(some, safe.log() + largest, -torch.inf)
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), lse


class _Attention(torch.autograd.Function):
    """The op without its schema: what a call costs besides its kernels is several times less."""

    @staticmethod
    def forward(ctx, q, k, v, key_bias, alibi_slopes, block_bias, *rest):  # type: ignore[no-untyped-def]
        """Run the engine."""
        ctx.set_materialize_grads(False)
        out, lse = _forward(q, k, v, key_bias, alibi_slopes, block_bias, *rest)
        ctx.save_for_backward(q, k, v, out, lse, key_bias, alibi_slopes, block_bias)
        ctx.rest = rest
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
        """Run the engine's backward."""
        saved = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(saved[3])
        grads = _backward(grad_out, grad_lse, *saved, *ctx.rest)
        return *grads, None, None, None, None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, take q, k and v in its dtype."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    block_bias: Tensor | None,
    layout: BlockLayout,
    scale: float,
    engine: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    _CALLS[engine] += 1
    biases = {"key_bias": key_bias, "alibi_slopes": alibi_slopes, "block_bias": block_bias}
    with torch.amp.autocast(q.device.type, enabled=False):
        if engine == "triton":
            from sparse_core.kernels import engine as triton_engine

            return triton_engine.forward(
                q, k, v, layout, scale=scale, **biases, precision=precision
            )
        return blockwise.forward(q, k, v, layout, scale=scale, **biases)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    block_bias: Tensor | None,
    layout: BlockLayout,
    scale: float,
    engine: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    _CALLS[engine] += 1
    inputs = grad_out, grad_lse, q, k, v, out, lse, layout
    with torch.amp.autocast(q.device.type, enabled=False):
        if engine == "triton":
            from sparse_core.kernels import engine as triton_engine

            grads = triton_engine.backward(
                *inputs, scale=scale, key_bias=key_bias, alibi_slopes=alibi_slopes,
                block_bias=block_bias, precision=precision,
            )  # fmt: skip
        else:
            grads = blockwise.backward(
                *inputs, scale=scale, key_bias=key_bias, alibi_slopes=alibi_slopes,
                block_bias=block_bias,
            )  # fmt: skip
    return grads.q, grads.k, grads.v, grads.key_bias, grads.alibi_slopes, grads.block_bias


@torch.library.custom_op("gigasparse::attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    block_bias: Tensor | None,
    layout_tensors: list[Tensor],
    layout_numbers: list[int],
    scale: float,
    engine: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    layout = _unflatten(layout_tensors, layout_numbers)
    return _forward(q, k, v, key_bias, alibi_slopes, block_bias, layout, scale, engine, precision)


@_attention.register_fake
def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    block_bias: Tensor | None,
    layout_tensors: list[Tensor],
    layout_numbers: list[int],
    scale: float,
    engine: str,
    precision: str,
) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty((batch, heads, queries), dtype=dtype)


@torch.library.custom_op("gigasparse::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    block_bias: Tensor | None,
    layout_tensors: list[Tensor],
    layout_numbers: list[int],
    scale: float,
    engine: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    layout = _unflatten(layout_tensors, layout_numbers)
    dq, dk, dv, *others = _backward(
        grad_out, grad_lse, q, k, v, out, lse, key_bias, alibi_slopes, block_bias, layout, scale,
        engine, precision,
    )  # fmt: skip
    dbias, dslopes, dblocks = (q.new_empty(0) if x is None else x for x in others)
    return dq, dk, dv, dbias, dslopes, dblocks


@_attention_backward.register_fake
def _attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    block_bias: Tensor | None,
    layout_tensors: list[Tensor],
    layout_numbers: list[int],
    scale: float,
    engine: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    dbias, dslopes, dblocks = (
        q.new_empty(0) if x is None else torch.empty_like(x)
        for x in (key_bias, alibi_slopes, block_bias)
    )
    return dq, dk, dv, dbias, dslopes, dblocks


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *given, tensors, numbers, scale, engine, precision = inputs
    ctx.save_for_backward(*given[:3], *output, *given[3:], *tensors)
    ctx.numbers, ctx.scale, ctx.engine, ctx.precision = numbers, scale, engine, precision
    ctx.set_materialize_grads(True)


def _differentiate(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    given, tensors = ctx.saved_tensors[:8], list(ctx.saved_tensors[8:])
    dq, dk, dv, *others = torch.ops.gigasparse.attention_backward(
        grad_out, grad_lse, *given, tensors, ctx.numbers, ctx.scale, ctx.engine, ctx.precision
    )
    others = (None if x is None else grad for x, grad in zip(given[5:], others, strict=True))
    return dq, dk, dv, *others, [None] * len(tensors), None, None, None, None


torch.library.register_autograd("gigasparse::attention", _differentiate, setup_context=_save)


def _register_autocast(library: torch.library.Library, device_type: str, key: str) -> None:
    """Under autocast, take q, k and v in its dtype; the engines themselves run without it."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, ...]:
        cast = _autocast(q, k, v)
        with torch.amp.autocast(device_type, enabled=False):
            result: tuple[Tensor, ...] = torch.ops.gigasparse.attention(*cast, *rest)
        return result

    def attention_backward(*inputs: object) -> tuple[Tensor, ...]:
        with torch.amp.autocast(device_type, enabled=False):
            result: tuple[Tensor, ...] = torch.ops.gigasparse.attention_backward(*inputs)
        return result

    library.impl("attention", attention, key)
    library.impl("attention_backward", attention_backward, key)


_LIBRARY = torch.library.Library("gigasparse", "FRAGMENT")  # dropped kernels would unregister
_register_autocast(_LIBRARY, "cpu", "AutocastCPU")
_register_autocast(_LIBRARY, "cuda", "AutocastCUDA")


def _flatten(layout: BlockLayout) -> tuple[list[Tensor], list[int]]:
    """Split a layout into tensors and numbers; only the shapes of tensors depend on lengths."""
    tensors: list[Tensor] = [
        layout.query_coords, layout.key_coords, layout.query_flags, layout.key_flags,
        layout.group_of,
    ]  # fmt: skip
    numbers = [len(layout.parts)]
    for part in layout.parts:
        for blocks in (part.queries, part.keys):
            tensors += [blocks.start, blocks.count, blocks.order]
            numbers += [blocks.stride, blocks.size, blocks.num_tokens, blocks.regular]
        for lists in (part.rows, part.columns):
            tensors += [lists.ptr, lists.full, lists.index, lists.tile]
            if part.num_biases and lists.bias is not None:
                tensors.append(lists.bias)
        tensors.append(part.tiles)
        numbers += [part.num_biases, part.takes_key_bias, len(part.program), *part.program]
    for agenda in (layout.schedule.queries, layout.schedule.keys):
        tensors.append(agenda.state_of)
        numbers += [len(agenda.launches), agenda.num_states, agenda.complete, agenda.fresh]
        for launch in agenda.launches:
            tensors += [launch.items, launch.ranges, launch.splits]
            numbers += [launch.num_slots, len(launch.part_numbers)]
            numbers += [*launch.part_numbers, *launch.affine]
    numbers.append(SPACINGS.index(layout.schedule.spacing))
    return tensors, [int(n) for n in numbers]


def _unflatten(tensors: list[Tensor], numbers: list[int]) -> BlockLayout:
    """Undo `_flatten`; lengths and the pattern's text are not needed by engines."""
    flat, rest = iter(tensors), iter(numbers)
    query_coords, key_coords, query_flags, key_flags, group_of = (next(flat) for _ in range(5))
    parts = []
    for _ in range(next(rest)):
        sides, lists = [], []
        for _ in range(2):
            start, count, order = next(flat), next(flat), next(flat)
            stride, size, num_tokens, regular = (next(rest) for _ in range(4))
            sides.append(Blocks(start, count, order, stride, size, num_tokens, bool(regular)))
        num_biases, takes_key_bias = next(rest), bool(next(rest))
        for _ in range(2):
            ptr, full, index, tile = (next(flat) for _ in range(4))
            lists.append(Lists(ptr, full, index, tile, next(flat) if num_biases else None))
        program = tuple(next(rest) for _ in range(next(rest)))
        (queries, keys), (rows, columns), tiles = sides, lists, next(flat)
        parts.append(Part(queries, keys, rows, columns, tiles, program, num_biases, takes_key_bias))
    agendas = _unflatten_agenda(flat, rest), _unflatten_agenda(flat, rest)
    schedule = Schedule(*agendas, SPACINGS[next(rest)])
    none = query_coords.new_empty(0)
    return BlockLayout(
        tuple(parts), schedule, query_coords, key_coords, query_flags, key_flags, none, none,
        group_of, "",
    )  # fmt: skip


def _unflatten_agenda(flat: Iterator[Tensor], rest: Iterator[int]) -> Agenda:
    state_of = next(flat)
    num_launches, num_states, complete, fresh = (next(rest) for _ in range(4))
    launches = []
    for _ in range(num_launches):
        items, ranges, splits = next(flat), next(flat), next(flat)
        num_slots, num_parts = next(rest), next(rest)
        part_numbers = tuple(next(rest) for _ in range(num_parts))
        affine = tuple(bool(next(rest)) for _ in range(num_parts))
        launches.append(Launch(items, ranges, splits, part_numbers, affine, num_slots))
    return Agenda(tuple(launches), state_of, num_states, bool(complete), bool(fresh))


def _run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    scale: float,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    block_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    shared = q.shape[2] // k.shape[2]
    if block_bias is not None or not all(part.takes_key_bias for part in layout.parts):
        counts = _weights(layout, q, k, key_bias, block_bias).repeat_interleave(shared, dim=1)
        key_bias = None
    else:
        counts = torch.stack([layout.counts(group) for group in range(layout.num_groups)])
        if layout.group_of.numel():
            counts = counts[layout.group_of.long()].repeat_interleave(shared, dim=1)
    alibi = None
    if alibi_slopes is not None:
        distance = coordinate_distance(layout.query_coords, layout.key_coords, q.dtype)
        alibi = -alibi_slopes[:, None, None] * distance
    return reference_attention(q, k, v, counts, scale=scale, key_bias=key_bias, alibi=alibi)


def _weights(
    layout: BlockLayout,
    q: Tensor,
    k: Tensor,
    key_bias: Tensor | None,
    block_bias: Tensor | None,
) -> Float[Tensor, "B Hkv Tq Tk"]:
    """How much each pair weighs: exp(bias), summed over the parts that keep it."""
    found = []
    for sample, head in product(range(k.shape[0]), range(k.shape[2])):
        group = int(layout.group_of[sample, head]) if layout.group_of.numel() else 0
        total = q.new_zeros(layout.num_queries, layout.num_keys)
        for part in layout.parts:
            counts = torch.zeros_like(total)
            place = torch.full_like(total, -1, dtype=torch.int64)
            for query, key, entry, kept in layout.kept(part, group):
                counts[query[:, None], key] += kept.to(counts.dtype)
                if part.rows.bias is not None:
                    place[query[:, None], key] = part.rows.bias[entry].long()
            bias = torch.zeros_like(total)
            if block_bias is not None:
                bias = torch.where(place < 0, 0, block_bias[sample, head][place].to(bias.dtype))
            if key_bias is not None and part.takes_key_bias:
                bias = bias + key_bias[sample]
            total = total + counts * bias.exp()
        found.append(total)
    return torch.stack(found).unflatten(0, (k.shape[0], k.shape[2]))


def _for_batch(layout: BlockLayout, batch: int) -> BlockLayout:
    """Let all samples use the groups of one; remembered with the layout."""
    if batch == 1 or layout.group_of.shape[0] != 1:
        return layout
    if torch.compiler.is_compiling():
        return replace(layout, group_of=layout.group_of.repeat(batch, 1))
    known: dict[int, BlockLayout] = layout.__dict__.setdefault("_batches", {})
    if batch not in known:
        known[batch] = replace(layout, group_of=layout.group_of.repeat(batch, 1))
    return known[batch]


def _validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    key_bias: Tensor | None,
    alibi_slopes: Tensor | None,
    block_bias: Tensor | None,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.shape != k.shape:
        raise ValueError(f"q is [B, Tq, H, D], k and v are [B, Tk, Hkv, D]; got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q and k need equal B and D, and H a multiple of Hkv; got {shapes}")
    if q.shape[1] != layout.num_queries or k.shape[1] != layout.num_keys:
        raise ValueError(
            f"the layout is for {layout.num_queries} x {layout.num_keys} tokens; got {shapes}"
        )
    if not q.is_floating_point() or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"q, k and v need one floating dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.device != layout.device or k.device != layout.device or v.device != layout.device:
        raise ValueError(
            f"q, k, v are on {q.device}, {k.device}, {v.device}, the layout on {layout.device}; "
            "move it with layout.to(device)"
        )
    if key_bias is not None and key_bias.shape != k.shape[:2]:
        raise ValueError(f"key_bias is [B, Tk] = {tuple(k.shape[:2])}; got {tuple(key_bias.shape)}")
    if alibi_slopes is not None and alibi_slopes.shape != q.shape[2:3]:
        raise ValueError(f"alibi_slopes is [H] = [{q.shape[2]}]; got {tuple(alibi_slopes.shape)}")
    wanted = (k.shape[0], k.shape[2], layout.num_biases)
    if block_bias is not None and tuple(block_bias.shape) != wanted:
        raise ValueError(
            f"block_bias is [B, Hkv, layout.num_biases] = {wanted}; got {tuple(block_bias.shape)}"
        )
    for name, x in (
        ("key_bias", key_bias), ("alibi_slopes", alibi_slopes), ("block_bias", block_bias),
    ):  # fmt: skip
        if x is not None and x.device != layout.device:
            raise ValueError(f"{name} is on {x.device}, the layout on {layout.device}")
    if layout.group_of.numel() and tuple(layout.group_of.shape) != (k.shape[0], k.shape[2]):
        raise ValueError(
            f"group_of is [B, Hkv] = {(k.shape[0], k.shape[2])}; got {tuple(layout.group_of.shape)}"
        )
