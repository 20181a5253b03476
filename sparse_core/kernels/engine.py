"""The launcher: allocates, and runs the kernels of a layout's schedule."""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_core.blockwise import Gradients
from sparse_core.kernels.arguments import tile_of
from sparse_core.kernels.backward import key_kernel, query_kernel
from sparse_core.kernels.combine import combine_kernel
from sparse_core.kernels.forward import forward_kernel
from sparse_core.kernels.steps import Step, steps
from sparse_core.layout import BlockLayout
from sparse_core.schedule import Agenda

LOG2_E = 1.4426950408889634


def forward(
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk Hkv D"],
    v: Float[Tensor, "B Tk Hkv D"],
    layout: BlockLayout,
    *,
    scale: float,
    key_bias: Float[Tensor, "B Tk"] | None,
    alibi_slopes: Float[Tensor, "H"] | None,
    block_bias: Float[Tensor, "B Hkv N"] | None,
    precision: str,
) -> tuple[Float[Tensor, "B Tq H D"], Float[Tensor, "B H Tq"]]:
    """Compute output and log-sum-exp."""
    q, k, v = _with_channels_inside(q, k, v)
    block_bias = _contiguous(block_bias)
    if scale <= 0:  # the kernel takes the maximum before it multiplies
        q, scale = -q, max(-scale, 1e-30)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = _numbers(q, q.shape[1])
    agenda = layout.schedule.queries
    state = _state(q, agenda, -torch.inf)
    ready = steps("forward", layout, q, k, others=(k, v), precision=precision)
    for step in ready:
        pieces = _Scratch.empty(q, step.num_slots * step.own.size)
        forward_kernel[step.grid(q)](
            q, k, v, *step.boxes(k, v), _contiguous(key_bias), _contiguous(alibi_slopes),
            step.biases(block_bias), out, lse, state.rows, state.vector, step.state_of,
            pieces.rows, pieces.vector, *step.description, scale * LOG2_E, *step.sizes,
            *_strides(q, k, v), **step.constants,
        )  # fmt: skip
        _combine(step, pieces, state, out, lse, weighted=True)
    if not agenda.complete:
        return _spread_out(state, agenda, out), _spread(state.vector, agenda, lse, -torch.inf)
    return out, lse


def backward(
    grad_out: Float[Tensor, "B Tq H D"],
    grad_lse: Float[Tensor, "B H Tq"] | None,
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk Hkv D"],
    v: Float[Tensor, "B Tk Hkv D"],
    out: Float[Tensor, "B Tq H D"],
    lse: Float[Tensor, "B H Tq"],
    layout: BlockLayout,
    *,
    scale: float,
    key_bias: Float[Tensor, "B Tk"] | None,
    alibi_slopes: Float[Tensor, "H"] | None,
    block_bias: Float[Tensor, "B Hkv N"] | None,
    precision: str,
) -> Gradients:
    """Compute all gradients."""
    q, k, v, grad_out = _with_channels_inside(q, k, v, grad_out)
    call = Backward(
        q=q,
        k=k,
        v=v,
        grad_out=grad_out,
        out=out.contiguous(),
        lse=lse.contiguous(),
        grad_lse=None if grad_lse is None else grad_lse.float().contiguous(),
        key_bias=_contiguous(key_bias),
        alibi_slopes=_contiguous(alibi_slopes),
        block_bias=_contiguous(block_bias),
        row_terms=_numbers(q, 2 * q.shape[1]),
        layout=layout,
        scale=scale,
        precision=precision,
    )
    grad_q, grad_slopes, grad_blocks = call.by_queries()
    grad_k, grad_v, grad_bias = call.by_keys()
    return Gradients(
        grad_q,
        grad_k,
        grad_v,
        None if key_bias is None or grad_bias is None else grad_bias.to(key_bias.dtype),
        None if alibi_slopes is None or grad_slopes is None else grad_slopes.to(alibi_slopes.dtype),
        None if block_bias is None or grad_blocks is None else grad_blocks.to(block_bias.dtype),
    )


@dataclass(frozen=True)
class Backward:
    """The contiguous inputs of one backward call; the first pass fills `row_terms`."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    out: Tensor
    lse: Tensor
    grad_lse: Tensor | None
    key_bias: Tensor | None
    alibi_slopes: Tensor | None
    block_bias: Tensor | None
    row_terms: Tensor
    layout: BlockLayout
    scale: float
    precision: str

    def by_queries(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute dQ and the gradients of the slopes and block biases; leave the row terms."""
        q, agenda = self.q, self.layout.schedule.queries
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_slopes = None if self.alibi_slopes is None else q.new_zeros(q.shape[2]).float()
        grad_blocks = None
        state = _state(q, agenda, 0.0)
        ready = steps(
            "query", self.layout, q, self.k,
            others=(self.k, self.v), precision=self.precision,
        )  # fmt: skip
        for step in ready:
            pieces = _Scratch.empty(q, step.num_slots * step.own.size)
            shares = None
            if grad_slopes is not None:
                shares = _numbers(q, step.num_programs).zero_()
            block_bias, entries = step.biases(self.block_bias), None
            if block_bias is not None:  # a place for each tile of queries: none is written twice
                entries = _numbers(q, step.own_tiles * block_bias.shape[2]).zero_()
            query_kernel[step.grid(q)](
                q, self.k, self.v, *step.boxes(self.k, self.v), self.out, self.grad_out, self.lse,
                self.grad_lse, self.row_terms, self.key_bias, self.alibi_slopes, block_bias, grad_q,
                shares, entries, state.rows, step.state_of, pieces.rows, *step.description,
                self.scale, self.scale * LOG2_E, *step.sizes,
                *_strides(q, self.k, self.v, self.grad_out), **step.constants,
            )  # fmt: skip
            _combine(step, pieces, state, grad_q, None, weighted=False)
            if grad_slopes is not None and shares is not None:
                grad_slopes += shares.sum((0, 2))
            if block_bias is not None and entries is not None:
                shape = (*block_bias.shape[:2], -1, block_bias.shape[2])
                found = entries.view(shape).sum(2)
                grad_blocks = found if grad_blocks is None else grad_blocks + found
        if not agenda.complete:
            grad_q = _spread_out(state, agenda, grad_q)
        return grad_q, grad_slopes, grad_blocks

    def by_keys(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Compute dK, dV and the gradient of the key bias."""
        q, k, agenda = self.q, self.k, self.layout.schedule.keys
        batch, keys, kv_heads, head_dim = k.shape
        shared = q.shape[2] // kv_heads
        shape = (batch, keys, q.shape[2], head_dim)
        dtype = q.dtype if shared == 1 else torch.float32
        grad_k = torch.empty(shape, dtype=dtype, device=q.device)
        grad_v = torch.empty(shape, dtype=dtype, device=q.device)
        bias = None if self.key_bias is None else _numbers(q, keys)
        state_k, state_v = _state(q, agenda, 0.0), _state(q, agenda, 0.0)
        ready = steps(
            "key", self.layout, q, k,
            others=(q, self.grad_out), precision=self.precision,
        )  # fmt: skip
        for step in ready:
            room = step.num_slots * step.own.size
            pieces_k, pieces_v = _Scratch.empty(q, room), _Scratch.empty(q, room)
            key_kernel[step.grid(q)](
                q, k, self.v, self.grad_out, *step.boxes(q, self.grad_out), self.row_terms,
                self.key_bias, self.alibi_slopes, step.biases(self.block_bias), grad_k, grad_v,
                bias, state_k.rows, state_v.rows, state_k.vector, step.state_of,
                pieces_k.rows, pieces_v.rows, pieces_k.vector, *step.description,
                self.scale, self.scale * LOG2_E, *step.sizes,
                *_strides(q, k, self.v, self.grad_out), **step.constants,
            )  # fmt: skip
            _combine(step, pieces_k, state_k, grad_k, bias, weighted=False)
            _combine(step, pieces_v, state_v, grad_v, None, weighted=False)
        if not agenda.complete:
            grad_k = _spread_out(state_k, agenda, grad_k)
            grad_v = _spread_out(state_v, agenda, grad_v)
            bias = None if bias is None else _spread(state_k.vector, agenda, bias, 0.0)
        if shared > 1:
            grad_k, grad_v = (
                x.unflatten(2, (kv_heads, shared)).sum(3).to(q.dtype) for x in (grad_k, grad_v)
            )
        return grad_k, grad_v, None if bias is None else bias.sum(1)


@dataclass(frozen=True)
class _Scratch:
    """Float32 rows [B, H, N, D] with one number each: a state, or the pieces of a launch."""

    rows: Tensor
    vector: Tensor

    @classmethod
    def empty(cls, q: Tensor, tokens: int) -> "_Scratch":
        if not tokens:
            return _no_scratch(q.device)
        batch, _, heads, head_dim = q.shape
        rows = torch.empty((batch, heads, tokens, head_dim), dtype=torch.float32, device=q.device)
        return cls(rows, _numbers(q, tokens))


@cache
def _no_scratch(device: torch.device) -> _Scratch:
    """What kernels take where they have none: an address that they never look at."""
    nothing = torch.empty(1, dtype=torch.float32, device=device)
    return _Scratch(nothing, nothing)


def _state(q: Tensor, agenda: Agenda, empty: float) -> _Scratch:
    """Make the state that launches pass on; filled where the first does not write all of it."""
    state = _Scratch.empty(q, agenda.num_states)
    if agenda.num_states and not agenda.fresh:
        state.rows.zero_()
        state.vector.fill_(empty)
    return state


def _combine(
    step: Step,
    pieces: _Scratch,
    state: _Scratch,
    out: Tensor,
    vector: Tensor | None,
    *,
    weighted: bool,
) -> None:
    """Join the pieces of split blocks, if there are any."""
    num_splits = step.splits.shape[1]
    if not num_splits:
        return
    batch, tokens, heads, _ = out.shape
    tile = tile_of(step.own.size, 32)
    own_tiles = -(-step.own.size // tile)
    names = ("OWN_INDEXED", "OWN_REGULAR", "FINAL", "PRIOR", "D", "D1", "D2")
    combine_kernel[(num_splits * own_tiles, heads, batch)](
        pieces.rows, pieces.vector, state.rows, state.vector, step.state_of, out, vector,
        step.splits, step.group_of, step.own, tokens, step.num_states, step.num_slots, num_splits,
        own_tiles, step.sizes[-1], *out.stride()[:3],
        WEIGHTED=weighted, BLOCK=tile, **{name: step.constants[name] for name in names},
    )  # fmt: skip


def _spread_out(state: _Scratch, agenda: Agenda, like: Tensor) -> Tensor:
    """Turn the state into a result [B, T, H, D], where no launch reaches every token."""
    spread = _spread(state.rows, agenda, like.transpose(1, 2), 0.0)
    return spread.transpose(1, 2).to(like.dtype).contiguous()


def _spread(rows: Tensor, agenda: Agenda, like: Tensor, empty: float) -> Tensor:
    """Give each token its row of the state [B, H, N, ...], or `empty`."""
    if not agenda.launches:
        return torch.full_like(like, empty)
    place = agenda.state_of.long()
    found = rows.index_select(2, place.clamp(min=0))
    absent = (place < 0).view(-1, *[1] * (rows.ndim - 3))
    return found.masked_fill(absent, empty)


def _numbers(q: Tensor, tokens: int) -> Float[Tensor, "B H N"]:
    shape = (q.shape[0], q.shape[2], tokens)
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _with_channels_inside(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors whose channels are not next to one another."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for axis in (0, 1, 2) for x in tensors]
