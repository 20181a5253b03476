"""The launcher: allocates, chooses configurations, runs the kernels of a layout's schedule."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_core.blockwise import Gradients
from sparse_core.kernels import tuning
from sparse_core.kernels.arguments import (
    Own,
    other_side,
    own_side,
    split_head_dim,
    tile_of,
)
from sparse_core.kernels.backward import key_kernel, query_kernel
from sparse_core.kernels.combine import combine_kernel
from sparse_core.kernels.forward import forward_kernel
from sparse_core.layout import BlockLayout
from sparse_core.schedule import Agenda, Launch, Side

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class _Scratch:
    """Float32 rows [B, H, N, D] with one number each: a state, or the pieces of a launch."""

    rows: Float[Tensor, "B H N D"]
    vector: Float[Tensor, "B H N"]

    @classmethod
    def empty(cls, q: Tensor, tokens: int) -> "_Scratch":
        batch, _, heads, head_dim = q.shape
        rows = q.new_empty((batch, heads, tokens, head_dim), dtype=torch.float32)
        return cls(rows, q.new_empty((batch, heads, tokens), dtype=torch.float32))


def forward(
    q: Float[Tensor, "B Tq H D"],
    k: Float[Tensor, "B Tk Hkv D"],
    v: Float[Tensor, "B Tk Hkv D"],
    layout: BlockLayout,
    *,
    scale: float,
    key_bias: Float[Tensor, "B Tk"] | None,
    alibi_slopes: Float[Tensor, "H"] | None,
    precision: str,
) -> tuple[Float[Tensor, "B Tq H D"], Float[Tensor, "B H Tq"]]:
    """Compute output and log-sum-exp."""
    q, k, v = _with_channels_inside(q, k, v)
    if scale <= 0:  # the kernel takes the maximum before it multiplies
        q, scale = -q, max(-scale, 1e-30)
    batch, queries, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty((batch, heads, queries), dtype=torch.float32)
    agenda = layout.schedule.queries
    state = _Scratch.empty(q, agenda.num_states)
    for step in _steps(layout, agenda, "queries", state):
        config = tuning.choose("forward", q, step.launch, layout, precision)
        pieces = _Scratch.empty(q, step.launch.num_slots * step.own.size)
        tile = tile_of(step.own.size, config.block_own)
        parts, numbers, meta = other_side(
            layout, step.launch, "queries", config.block_other, _apart(k, v)
        )
        forward_kernel[step.grid(tile, q)](
            q, k, v, _contiguous(key_bias), _contiguous(alibi_slopes), out, lse,
            state.rows, state.vector, step.state_of, pieces.rows, pieces.vector,
            step.launch.items, step.group_of, step.own, parts, numbers,
            layout.query_coords, layout.key_coords, layout.query_flags, layout.key_flags,
            scale * LOG2_E, queries, k.shape[1], step.launch.items.shape[1], agenda.num_states,
            step.launch.num_slots, len(step.own.start), step.own_tiles(tile),
            heads // k.shape[2], *_strides(q, k, v),
            META=meta, NUM_PARTS=len(parts), **step.constants(q, tile, config, precision),
        )  # fmt: skip
        step.combine(pieces, state, out, lse, weighted=True)
    if not agenda.complete:
        return _spread_out(state, agenda, out), _spread(state.vector, agenda, -torch.inf)
    return out, lse


def backward(
    grad_out: Float[Tensor, "B Tq H D"],
    grad_lse: Float[Tensor, "B H Tq"],
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
        grad_lse=grad_lse.float().contiguous(),
        key_bias=_contiguous(key_bias),
        alibi_slopes=_contiguous(alibi_slopes),
        delta=torch.empty_like(lse, memory_format=torch.contiguous_format),
        shift=torch.empty_like(lse, memory_format=torch.contiguous_format),
        layout=layout,
        scale=scale,
        precision=precision,
    )
    grad_q, grad_slopes = call.by_queries()
    grad_k, grad_v, grad_bias = call.by_keys()
    return Gradients(
        grad_q,
        grad_k,
        grad_v,
        None if key_bias is None else grad_bias.to(key_bias.dtype),
        None if alibi_slopes is None else grad_slopes.to(alibi_slopes.dtype),
    )


@dataclass(frozen=True)
class Backward:
    """The contiguous inputs of one backward call; the first pass fills `delta` and `shift`."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    out: Tensor
    lse: Tensor
    grad_lse: Tensor
    key_bias: Tensor | None
    alibi_slopes: Tensor | None
    delta: Tensor
    shift: Tensor
    layout: BlockLayout
    scale: float
    precision: str

    def by_queries(self) -> tuple[Tensor, Tensor]:
        """Compute dQ and the gradient of the slopes, and leave delta."""
        q, layout, agenda = self.q, self.layout, self.layout.schedule.queries
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        grad_slopes = q.new_zeros(q.shape[2], dtype=torch.float32)
        state = _Scratch.empty(q, agenda.num_states)
        for step in _steps(layout, agenda, "queries", state):
            config = tuning.choose("query", q, step.launch, layout, self.precision)
            pieces = _Scratch.empty(q, step.launch.num_slots * step.own.size)
            tile = tile_of(step.own.size, config.block_own)
            parts, numbers, meta = other_side(
                layout, step.launch, "queries", config.block_other, _apart(self.k, self.v)
            )
            grid = step.grid(tile, q)
            slopes = q.new_zeros((q.shape[0], q.shape[2], grid[0]), dtype=torch.float32)
            query_kernel[grid](
                q, self.k, self.v, self.out, self.grad_out, self.lse, self.grad_lse, self.delta,
                self.shift,
                self.key_bias, self.alibi_slopes, grad_q, slopes, state.rows, step.state_of,
                pieces.rows, step.launch.items, step.group_of, step.own, parts, numbers,
                *self._numbers(step, tile),
                META=meta, NUM_PARTS=len(parts), **step.constants(q, tile, config, self.precision),
            )  # fmt: skip
            step.combine(pieces, state, grad_q, None, weighted=False)
            if self.alibi_slopes is not None:
                grad_slopes += slopes.sum((0, 2))
        if not agenda.complete:
            grad_q = _spread_out(state, agenda, grad_q)
        return grad_q, grad_slopes

    def by_keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Compute dK, dV and the gradient of the key bias."""
        q, k, layout, agenda = self.q, self.k, self.layout, self.layout.schedule.keys
        batch, keys, kv_heads, head_dim = k.shape
        shared = q.shape[2] // kv_heads
        shape = (batch, keys, q.shape[2], head_dim)
        dtype = q.dtype if shared == 1 else torch.float32
        grad_k = torch.empty(shape, dtype=dtype, device=q.device)
        grad_v = torch.empty(shape, dtype=dtype, device=q.device)
        bias = q.new_empty((batch, q.shape[2], keys), dtype=torch.float32)
        state_k, state_v = (_Scratch.empty(q, agenda.num_states) for _ in range(2))
        for step in _steps(layout, agenda, "keys", state_k):
            config = tuning.choose("key", q, step.launch, layout, self.precision)
            room = step.launch.num_slots * step.own.size
            pieces_k, pieces_v = (_Scratch.empty(q, room) for _ in range(2))
            tile = tile_of(step.own.size, config.block_own)
            parts, numbers, meta = other_side(
                layout, step.launch, "keys", config.block_other, _apart(q, self.grad_out)
            )
            key_kernel[step.grid(tile, q)](
                q, k, self.v, self.grad_out, self.delta, self.shift, self.key_bias,
                self.alibi_slopes, grad_k, grad_v, bias, state_k.rows, state_v.rows,
                state_k.vector, step.state_of, pieces_k.rows, pieces_v.rows, pieces_k.vector,
                step.launch.items, step.group_of, step.own, parts, numbers,
                *self._numbers(step, tile),
                META=meta, NUM_PARTS=len(parts), **step.constants(q, tile, config, self.precision),
            )  # fmt: skip
            vector = None if self.key_bias is None else bias
            step.combine(pieces_k, state_k, grad_k, vector, weighted=False)
            step.combine(pieces_v, state_v, grad_v, None, weighted=False)
        if not agenda.complete:
            grad_k = _spread_out(state_k, agenda, grad_k)
            grad_v = _spread_out(state_v, agenda, grad_v)
            bias = _spread(state_k.vector, agenda)
        if shared > 1:
            grad_k, grad_v = (
                x.unflatten(2, (kv_heads, shared)).sum(3).to(q.dtype) for x in (grad_k, grad_v)
            )
        return grad_k, grad_v, bias.sum(1) if self.key_bias is not None else bias

    def _numbers(self, step: "_Step", tile: int) -> tuple[object, ...]:
        """What both kernels take behind their part's description."""
        q, k, layout = self.q, self.k, self.layout
        return (
            layout.query_coords, layout.key_coords, layout.query_flags, layout.key_flags,
            self.scale, self.scale * LOG2_E, q.shape[1], k.shape[1], step.launch.items.shape[1],
            step.agenda.num_states, step.launch.num_slots, len(step.own.start),
            step.own_tiles(tile), q.shape[2] // k.shape[2], *_strides(q, k, self.v, self.grad_out),
        )  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """One launch of an agenda, and what it does with the state."""

    layout: BlockLayout
    agenda: Agenda
    launch: Launch
    own: Own
    final: bool
    prior: bool

    @property
    def state_of(self) -> Tensor | None:
        return self.agenda.state_of if self.agenda.state_of.numel() else None

    @property
    def group_of(self) -> Tensor | None:
        return self.layout.group_of if self.layout.group_of.numel() else None

    def own_tiles(self, tile: int) -> int:
        return -(-self.own.size // tile)

    def grid(self, tile: int, q: Tensor) -> tuple[int, int, int]:
        return self.launch.items.shape[1] * self.own_tiles(tile), q.shape[2], q.shape[0]

    def constants(
        self, q: Tensor, tile: int, config: "tuning.Config", precision: str
    ) -> dict[str, object]:
        """What is compiled into every main kernel."""
        first, second = split_head_dim(q.shape[3])
        return {
            "OWN_INDEXED": self.own.order.numel() > 0,
            "OWN_REGULAR": self.launch.own_regular,
            "FINAL": self.final,
            "PRIOR": self.prior,
            "D": q.shape[3],
            "D1": first,
            "D2": second,
            "P": self.layout.query_coords.shape[1],
            "BLOCK_OWN": tile,
            "BLOCK_OTHER": config.block_other,
            "PRECISION": precision,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": config.max_registers or None,
        }

    def combine(
        self,
        pieces: _Scratch,
        state: _Scratch,
        out: Tensor,
        vector: Tensor | None,
        *,
        weighted: bool,
    ) -> None:
        """Join the pieces of split blocks, if there are any."""
        splits = self.launch.splits
        if not splits.shape[1]:
            return
        batch, tokens, heads, head_dim = out.shape
        first, second = split_head_dim(head_dim)
        tile = tile_of(self.own.size, 32)
        groups = self.layout.group_of.shape
        combine_kernel[(splits.shape[1] * self.own_tiles(tile), heads, batch)](
            pieces.rows, pieces.vector, state.rows, state.vector, self.state_of, out, vector,
            splits, self.group_of, self.own, tokens, self.agenda.num_states,
            self.launch.num_slots, splits.shape[1], self.own_tiles(tile),
            heads // groups[1] if groups[1] else 1, out.stride(0), out.stride(1), out.stride(2),
            WEIGHTED=weighted, OWN_INDEXED=self.own.order.numel() > 0,
            OWN_REGULAR=self.launch.own_regular, FINAL=self.final,
            PRIOR=self.prior, D=head_dim, D1=first, D2=second, BLOCK=tile,
        )  # fmt: skip


def _steps(layout: BlockLayout, agenda: Agenda, side: Side, state: _Scratch) -> list[_Step]:
    """Pair each launch with its place in the agenda; make the state ready."""
    if agenda.num_states and not agenda.fresh:
        state.rows.zero_()
        state.vector.fill_(-torch.inf if side == "queries" else 0.0)
    last = len(agenda.launches) - 1
    return [
        _Step(
            layout,
            agenda,
            launch,
            own_side(layout, launch, side),
            final=agenda.complete and number == last,
            prior=agenda.num_states > 0 and not (number == 0 and agenda.fresh),
        )
        for number, launch in enumerate(agenda.launches)
        if launch.items.shape[1]
    ]


def _spread_out(state: _Scratch, agenda: Agenda, like: Tensor) -> Tensor:
    """Turn the state into a result [B, T, H, D], where no launch reaches every token."""
    if not agenda.launches:
        return torch.zeros_like(like)
    return _spread(state.rows, agenda).transpose(1, 2).to(like.dtype).contiguous()


def _spread(rows: Tensor, agenda: Agenda, empty: float = 0.0) -> Tensor:
    """Give each token its row of the state [B, H, N, ...], or `empty`."""
    if not agenda.launches:
        tokens = agenda.state_of.shape[0]
        return rows.new_full((*rows.shape[:2], tokens, *rows.shape[3:]), empty)
    place = agenda.state_of.long()
    found = rows.index_select(2, place.clamp(min=0))
    absent = (place < 0).view(-1, *[1] * (rows.ndim - 3))
    return found.masked_fill(absent, empty)


def _with_channels_inside(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copy tensors whose channels are not next to one another."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _apart(*tensors: Tensor) -> int:
    """How many elements lie between tokens, at most."""
    return max(x.stride(1) for x in tensors)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(axis) for axis in (0, 1, 2) for x in tensors]
