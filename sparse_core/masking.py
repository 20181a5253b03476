"""Which pairs of a partial block are kept: a short program of terms, or bits.

A program is a flat tuple of integers, so that it passes through a custom op's schema and, in a
kernel, is a constant that unrolls::

    num_own, num_earlier, then for each clause: num_terms, then for each term: code, a, b, c

A pair is kept if one of the own clauses holds and none of the earlier ones.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from sparse_core.patterns.base import clause_allows
from sparse_core.patterns.terms import (
    Clause,
    Congruent,
    Interval,
    KeyIn,
    Members,
    QueryIn,
    Term,
    Tokens,
)

Program = tuple[int, ...]
INTERVAL, CONGRUENT, QUERY_FLAG, KEY_FLAG = range(4)

KEEP_ALL: Program = (1, 0, 0)


def encode(own: list[Clause], earlier: list[Clause], member_sets: list[Members]) -> Program | None:
    """Write clauses as a program; None if some term has no code."""
    numbers: list[int] = [len(own), len(earlier)]
    for clause in own + earlier:
        numbers.append(len(clause))
        for term in clause:
            code = _encode_term(term, member_sets)
            if code is None:
                return None
            numbers.extend(code)
    return tuple(numbers)


def decode(program: Program) -> tuple[list[list[Program]], list[list[Program]]]:
    """Read a program back as (own clauses, earlier clauses), each a list of 4-number terms."""
    clauses: list[list[Program]] = []
    at = 2
    for _ in range(program[0] + program[1]):
        end = at + 1 + 4 * program[at]
        clauses.append([program[i : i + 4] for i in range(at + 1, end, 4)])
        at = end
    return clauses[: program[0]], clauses[program[0] :]


def evaluate(
    program: Program,
    query_coords: Int[Tensor, "*S M P"],
    key_coords: Int[Tensor, "*S N P"],
    query_flags: Int[Tensor, "*S M"],
    key_flags: Int[Tensor, "*S N"],
) -> Bool[Tensor, "*S M N"]:
    """Run a program on every pair of a block's tokens."""
    own, earlier = decode(program)

    def holds(clause: list[Program]) -> Tensor:
        kept = torch.ones((), dtype=torch.bool, device=query_coords.device)
        for code, a, b, c in clause:
            if code == INTERVAL:
                difference = query_coords[..., :, None, a] - key_coords[..., None, :, a]
                kept = kept & (difference >= b) & (difference <= c)
            elif code == CONGRUENT:
                residue = query_coords[..., a] // b % c, key_coords[..., a] // b % c
                kept = kept & (residue[0][..., :, None] == residue[1][..., None, :])
            elif code == QUERY_FLAG:
                kept = kept & ((query_flags >> a) & 1).bool()[..., :, None]
            else:
                kept = kept & ((key_flags >> a) & 1).bool()[..., None, :]
        return kept

    kept = torch.zeros((), dtype=torch.bool, device=query_coords.device)
    for clause in own:
        kept = kept | holds(clause)
    for clause in earlier:
        kept = kept & ~holds(clause)
    return kept.expand(*query_coords.shape[:-1], key_coords.shape[-2])


def member_flags(index: Int[Tensor, "T"], member_sets: list[Members]) -> Int[Tensor, "T"]:
    """Give each token one bit for each set of members that it belongs to."""
    flags = torch.zeros_like(index, dtype=torch.int32)
    for bit, members in enumerate(member_sets):
        flags |= members.contains(index).to(torch.int32) << bit
    return flags


def clauses_keep(own: list[Clause], earlier: list[Clause]) -> Callable[[Tokens, Tokens], Tensor]:
    """Make the exact test of token pairs that the bits are drawn from."""

    def keep(query: Tokens, key: Tokens) -> Tensor:
        kept = torch.stack([clause_allows(clause, query, key) for clause in own]).any(0)
        for clause in earlier:
            kept &= ~clause_allows(clause, query, key)
        return kept

    return keep


def pack_bits(mask: Bool[Tensor, "Z M N"]) -> UInt8[Tensor, "Z M W"]:
    """Eight keys to a byte, the first in the lowest bit."""
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 8))
    weights = 2 ** torch.arange(8, device=mask.device, dtype=torch.uint8)
    bits = padded.unflatten(-1, (-1, 8)).to(torch.uint8)
    return (bits * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(tiles: UInt8[Tensor, "Z M W"], size: int) -> Bool[Tensor, "Z M N"]:
    """Undo `pack_bits`."""
    shifts = torch.arange(8, device=tiles.device, dtype=torch.uint8)
    bits = (tiles[..., None] >> shifts) & 1
    return bits.flatten(-2)[..., :size].bool()


def _encode_term(term: Term, member_sets: list[Members]) -> Program | None:
    if isinstance(term, Interval):
        return (INTERVAL, term.axis, term.low, term.high)
    if isinstance(term, Congruent):
        return (CONGRUENT, term.axis, term.block, term.stride)
    if isinstance(term, QueryIn):
        return (QUERY_FLAG, member_sets.index(term.members), 0, 0)
    if isinstance(term, KeyIn):
        return (KEY_FLAG, member_sets.index(term.members), 0, 0)
    return None
