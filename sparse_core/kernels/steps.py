"""One launch made ready: all that a kernel takes besides the tensors of a call.

Making steps ready costs more host time than a short kernel runs, so a layout remembers its own. One
whose last part is filled anew for each call, by choices, remembers those of its first filling, and
only the tensors that differ are exchanged.
"""

from dataclasses import dataclass, replace

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sparse_core.blocking import Blocks
from sparse_core.kernels import tuning
from sparse_core.kernels.arguments import (
    Other,
    Own,
    other_side,
    other_tensors,
    own_blocks,
    own_side,
    split_head_dim,
    takes_boxes,
    tile_of,
)
from sparse_core.layout import BlockLayout
from sparse_core.schedule import Agenda, Launch, Side

MAX_PROGRAMS = 2**16 - 1
"""CUDA's limit to a grid's second number."""


@dataclass(frozen=True)
class Step:
    """Launch `number` of an agenda: its kernel's configuration and arguments.

    `final` says that it writes results, `prior` that it goes on from a state. `numbers` are those
    of each part's masks, `tokens` coordinates and flags, `sizes` numbers of the layout, `constants`
    what is compiled. With `heads_together` all heads of a tile start together, since what they read
    lies side by side in memory. `box` are the rows of the other side's tiles if some of them are
    boxes in memory, else 0. `biased` says that entries of some part take numbers of `block_bias`.
    """

    number: int
    own: Own
    final: bool
    prior: bool
    num_programs: int
    heads_together: bool
    own_tiles: int
    num_slots: int
    num_states: int
    state_of: Tensor | None
    group_of: Tensor | None
    items: Tensor
    ranges: Tensor
    splits: Tensor
    parts: tuple[Other, ...]
    numbers: tuple[tuple[int, ...], ...]
    tokens: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    constants: dict[str, object]
    box: int
    biased: bool

    @property
    def description(self) -> tuple[object, ...]:
        """The tensors and numbers that describe the launch, in the order of kernels' arguments."""
        return (
            self.items, self.ranges, self.group_of, self.own, self.parts, self.numbers,
            *self.tokens,
        )  # fmt: skip

    def biases(self, block_bias: Tensor | None) -> Tensor | None:
        """Give `block_bias` to launches some of whose parts take its numbers."""
        return block_bias if self.biased else None

    def boxes(self, *tensors: Tensor) -> tuple[TensorDescriptor | None, ...]:
        """Describe tensors of the other side [B, T, H, D] as [B, H, T, D], tile by tile."""
        if not self.box:
            return (None,) * len(tensors)
        described = []
        for x in tensors:
            batch, tokens, heads, _ = x.shape
            # that of a dimension of one may be any number, but must be one that could be taken
            strides = [step if step > 0 and step % 8 == 0 else 8 for step in x.stride()[:3]]
            described.append(
                TensorDescriptor(
                    x,
                    [batch, heads, tokens, x.shape[3]],
                    [strides[0], strides[2], strides[1], 1],
                    [1, 1, self.box, x.shape[3]],
                )
            )
        return tuple(described)

    def grid(self, q: Tensor) -> tuple[int, int, int]:
        """Programs by items' tiles, heads, samples; those of the first number start together."""
        if self.heads_together:
            return q.shape[2], self.num_programs, q.shape[0]
        return self.num_programs, q.shape[2], q.shape[0]


def steps(
    kernel: tuning.Kernel,
    layout: BlockLayout,
    q: Tensor,
    k: Tensor,
    *,
    others: tuple[Tensor, Tensor],
    precision: str,
) -> tuple[Step, ...]:
    """Make the launches of a kernel ready, or find them as they were for such inputs before.

    `others` are the tensors of the other side that the kernel walks over.
    """
    strides = others[0].stride(1), others[1].stride(1)
    token_elements, alike = max(strides), strides[0] == strides[1]
    boxes = takes_boxes(q.shape[3], others)
    template = layout.__dict__.get("_filled", layout)
    known = template.__dict__.setdefault("_steps", {})
    inputs = (q.dtype, q.device, q.shape[2:], k.shape[2], token_elements, alike, boxes, precision)
    key = (kernel, inputs, tuning.state(), layout.num_groups, layout.num_biases)
    if key not in known:
        known[key] = _make(kernel, layout, q, k, token_elements, alike, boxes, precision)
    found: tuple[Step, ...] = known[key]
    if template is layout:
        return found
    return tuple(_refill(step, layout, tuning.SIDE_OF[kernel]) for step in found)


def _refill(step: Step, layout: BlockLayout, side: Side) -> Step:
    """Exchange the tensors of a launch whose last part is that of a layout just filled."""
    launch: Launch = getattr(layout.schedule, side).launches[step.number]
    last = len(layout.parts) - 1
    if last not in launch.part_numbers:
        return step
    changed = other_tensors(layout, layout.parts[last], side)
    return replace(
        step,
        items=launch.items,
        ranges=launch.ranges,
        splits=launch.splits,
        group_of=layout.group_of if step.group_of is not None else None,
        parts=tuple(
            changed if number == last else part
            for number, part in zip(launch.part_numbers, step.parts, strict=True)
        ),
    )


def _make(
    kernel: tuning.Kernel,
    layout: BlockLayout,
    q: Tensor,
    k: Tensor,
    token_elements: int,
    alike: bool,
    boxes: bool,
    precision: str,
) -> tuple[Step, ...]:
    side = tuning.SIDE_OF[kernel]
    agenda: Agenda = getattr(layout.schedule, side)
    last = len(agenda.launches) - 1
    found = []
    for number, launch in enumerate(agenda.launches):
        if not launch.items.shape[1]:
            continue
        final = agenda.complete and number == last
        prior = agenda.num_states > 0 and not (number == 0 and agenda.fresh)
        key = tuning.key_of(kernel, q, launch, layout, precision)
        config = tuning.choose(key, q.device)
        blocks = own_blocks(layout, launch, side)
        own = own_side(blocks)
        parts, numbers, meta = other_side(
            layout, launch, side, config.block_other, token_elements, boxes
        )
        tile = tile_of(own.size, config.block_own)
        own_tiles = -(-own.size // tile)
        num_programs = launch.items.shape[1] * own_tiles
        constants = _constants(blocks, q, config, tile) | {
            "META": meta,
            "ALIKE": alike,
            "NUM_PARTS": len(parts),
            "P": layout.query_coords.shape[1],
            "FINAL": final,
            "PRIOR": prior,
            "PRECISION": precision,
        }
        heads_together = (
            launch.items.shape[0] == 1
            and key.length == "short"
            and all(part.affine for part in meta)
            and num_programs <= MAX_PROGRAMS
        )
        group_of = layout.group_of if launch.items.shape[0] > 1 else None
        found.append(
            Step(
                number=number,
                own=own,
                final=final,
                prior=prior,
                num_programs=num_programs,
                heads_together=heads_together,
                own_tiles=own_tiles,
                num_slots=launch.num_slots,
                num_states=agenda.num_states,
                state_of=agenda.state_of if agenda.state_of.numel() else None,
                group_of=group_of,
                items=launch.items,
                ranges=launch.ranges,
                splits=launch.splits,
                parts=parts,
                numbers=numbers,
                tokens=(
                    layout.query_coords,
                    layout.key_coords,
                    layout.query_flags,
                    layout.key_flags,
                ),
                sizes=(
                    layout.num_queries,
                    layout.num_keys,
                    launch.items.shape[1],
                    agenda.num_states,
                    launch.num_slots,
                    own_tiles,
                    layout.num_biases,
                    int(heads_together),
                    q.shape[2] // k.shape[2],
                ),
                constants=constants,
                box=config.block_other if any(part.boxed for part in meta) else 0,
                biased=any(part.biased for part in meta),
            )
        )
    return tuple(found)


def _constants(blocks: Blocks, q: Tensor, config: tuning.Config, tile: int) -> dict[str, object]:
    first, second = split_head_dim(q.shape[3])
    return {
        "OWN_INDEXED": blocks.order.numel() > 0,
        "OWN_REGULAR": blocks.regular,
        "D": q.shape[3],
        "D1": first,
        "D2": second,
        "BLOCK_OWN": tile,
        "BLOCK_OTHER": config.block_other,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "maxnreg": config.max_registers or None,
    }
