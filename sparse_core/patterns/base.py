"""The Pattern value, its algebra, and its text form."""

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sparse_core.patterns.terms import Boxes, Clause, Tokens, simplify


class Pattern:
    """Says which query may attend to which key, as a frozen value.

    Patterns compare, hash and print (`Pattern.parse(str(p)) == p`) and compose: `a | b` allows what
    either allows, `a & b` what both allow; `a + b` too allows what either does, and counts a pair
    that both allow twice. They speak of coordinates, so that one pattern serves
    bases (one axis) and tiles of a slide (two). Pairs in different sequences are never allowed.

    A subclass is a frozen dataclass that defines `terms`, or, if no terms express it, `allows` and
    (to avoid visiting all pairs of blocks) `may_touch`.
    """

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Lower to alternatives of terms for coordinates with `dims` axes."""
        return ((Opaque(self),),)

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Tell for each pair of tokens whether it is allowed; exact."""
        if type(self).terms is Pattern.terms:
            raise NotImplementedError(f"{type(self).__name__} defines neither terms nor allows")
        shape = torch.broadcast_shapes(query.index.shape, key.index.shape)
        allowed = torch.zeros(shape, dtype=torch.bool, device=query.index.device)
        for clause in self.terms(query.coords.shape[-1]):
            allowed |= clause_allows(clause, query, key)
        return allowed

    def of_head(self, head: int) -> "Pattern":
        """What one key head sees, where heads differ."""
        return self

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Tell for each pair of boxes whether some pair in them may be allowed: a superset."""
        return torch.ones_like(query.index_low * key.index_low, dtype=torch.bool)

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Tell for each pair of boxes whether all pairs in them are surely allowed."""
        return torch.zeros_like(query.index_low * key.index_low, dtype=torch.bool)

    def mask(
        self,
        query_coords: Int[Tensor, "Tq P"] | int,
        key_coords: Int[Tensor, "Tk P"] | int | None = None,
        *,
        segments: Int[Tensor, "S"] | list[int] | None = None,
        key_segments: Int[Tensor, "S"] | list[int] | None = None,
    ) -> Bool[Tensor, "Tq Tk"]:
        """Write out every pair: the definition that layouts and engines are tested against.

        Arguments are those of `build_layout`. Memory is Tq x Tk.
        """
        from sparse_core.blocking import sequence_tokens

        query, query_segment = sequence_tokens(query_coords, segments)
        if key_coords is None:
            key, key_segment = query, query_segment
        else:
            lengths = segments if key_segments is None else key_segments
            key, key_segment = sequence_tokens(key_coords, lengths)
        same = query_segment[:, None] == key_segment[None, :]
        return self.allows(query.as_rows(), key.as_columns()) & same

    def counts(
        self,
        query_coords: Int[Tensor, "Tq P"] | int,
        key_coords: Int[Tensor, "Tk P"] | int | None = None,
        *,
        segments: Int[Tensor, "S"] | list[int] | None = None,
        key_segments: Int[Tensor, "S"] | list[int] | None = None,
        head: int = 0,
    ) -> Int[Tensor, "Tq Tk"]:
        """Write out how often each pair counts for a key head: once, unless in a sum."""
        one = self.of_head(head)
        parts = one.parts if isinstance(one, Sum) else (one,)
        where = {"segments": segments, "key_segments": key_segments}
        masks = [part.mask(query_coords, key_coords, **where).int() for part in parts]
        return torch.stack(masks).sum(0)

    def __or__(self, other: "Pattern") -> "Pattern":
        return _compose(Union, self, other) if isinstance(other, Pattern) else NotImplemented

    def __and__(self, other: "Pattern") -> "Pattern":
        if isinstance(self, Sum):
            return Sum(tuple(part & other for part in self.parts))
        if isinstance(other, Sum):
            return Sum(tuple(self & part for part in other.parts))
        return _compose(Intersection, self, other) if isinstance(other, Pattern) else NotImplemented

    def __add__(self, other: "Pattern") -> "Pattern":
        if not isinstance(other, Pattern):
            return NotImplemented
        left, right = (p.parts if isinstance(p, Sum) else (p,) for p in (self, other))
        return Sum(left + right)

    def __repr__(self) -> str:
        values = ((f.name, getattr(self, f.name), f.default) for f in fields(self))  # type: ignore[arg-type]
        shown = ", ".join(
            f"{name}={value!r}" for name, value, default in values if value != default
        )
        return f"{type(self).__name__}({shown})"

    @staticmethod
    def parse(text: str) -> "Pattern":
        """Read a pattern from text such as `SlidingWindow(radius=256) | GlobalTokens(first=4)`.

        Only the names of patterns, plain numbers and tuples, `|`, `&`, `+` and brackets are
        understood; nothing is executed. `+` binds more tightly than `&`, and that than `|`. Raises
        ValueError that names the part it could not read.
        """
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except SyntaxError as error:
            raise ValueError(f"not a pattern: {text!r} ({error.msg})") from None
        return _read(tree.body, text)


@dataclass(frozen=True, repr=False)
class Union(Pattern):
    """What any of the parts allows; written `a | b`."""

    parts: tuple[Pattern, ...]

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Put the alternatives of all parts side by side."""
        return tuple(clause for part in self.parts for clause in part.terms(dims))

    def of_head(self, head: int) -> Pattern:
        """Ask each part."""
        return Union(tuple(part.of_head(head) for part in self.parts))

    def __repr__(self) -> str:
        return " | ".join(repr(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Intersection(Pattern):
    """What all of the parts allow; written `a & b`."""

    parts: tuple[Pattern, ...]

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Join each alternative of one part with each of the next."""
        clauses: tuple[Clause, ...] = ((),)
        for part in self.parts:
            joined = (simplify(a + b) for a in clauses for b in part.terms(dims))
            clauses = tuple(clause for clause in joined if clause is not None)
        return clauses

    def of_head(self, head: int) -> Pattern:
        """Ask each part."""
        return Intersection(tuple(part.of_head(head) for part in self.parts))

    def __repr__(self) -> str:
        return " & ".join(f"({p!r})" if isinstance(p, Union) else repr(p) for p in self.parts)


@dataclass(frozen=True, repr=False)
class Sum(Pattern):
    """Each of the parts under one softmax, where a pair counts once for each part that allows it.

    Written `a + b`; a mixture of attentions by their denominators (LongNet, Ding et al. 2023) is
    the same. As a mask it is the union.
    """

    parts: tuple[Pattern, ...]

    def terms(self, dims: int) -> tuple[Clause, ...]:
        """Put the alternatives of all parts side by side."""
        return tuple(clause for part in self.parts for clause in part.terms(dims))

    def of_head(self, head: int) -> Pattern:
        """Ask each part."""
        return Sum(tuple(part.of_head(head) for part in self.parts))

    def __repr__(self) -> str:
        joined = (Union, Intersection)
        return " + ".join(f"({p!r})" if isinstance(p, joined) else repr(p) for p in self.parts)


def _compose(kind: "type[Union | Intersection]", *given: Pattern) -> Pattern:
    """Join without brackets inside brackets, and without repeats."""
    if any(isinstance(pattern, Sum) for pattern in given):
        raise ValueError("a sum counts pairs and is no part of a union of sets; write a + (b | c)")
    flat: list[Pattern] = []
    for pattern in given:
        flat.extend(pattern.parts if isinstance(pattern, kind) else [pattern])
    parts = tuple(dict.fromkeys(flat))
    return parts[0] if len(parts) == 1 else kind(parts)


@dataclass(frozen=True, slots=True)
class Opaque:
    """A pattern that no terms express: the layout turns it into bit tiles."""

    pattern: Pattern

    def allows(self, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
        """Ask the pattern."""
        return self.pattern.allows(query, key)

    def may_touch(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Ask the pattern."""
        return self.pattern.may_touch(query, key)

    def covers(self, query: Boxes, key: Boxes) -> Bool[Tensor, "..."]:
        """Ask the pattern."""
        return self.pattern.covers(query, key)


def clause_allows(clause: Clause, query: Tokens, key: Tokens) -> Bool[Tensor, "..."]:
    """Tell for each pair of tokens whether all terms hold."""
    shape = torch.broadcast_shapes(query.index.shape, key.index.shape)
    allowed = torch.ones(shape, dtype=torch.bool, device=query.index.device)
    for term in clause:
        allowed &= term.allows(query, key)
    return allowed


_OPERATORS: dict[type, Callable[[Pattern, Pattern], Pattern]] = {
    ast.BitOr: operator.or_,
    ast.BitAnd: operator.and_,
    ast.Add: operator.add,
}


def _read(node: ast.expr, text: str) -> Pattern:
    from sparse_core import patterns

    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_read(node.left, text), _read(node.right, text))
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"not a pattern: {ast.unparse(node)!r} in {text!r}")
    name = node.func.id
    if name not in patterns.PATTERNS:
        known = ", ".join(patterns.PATTERNS)
        raise ValueError(f"unknown pattern {name!r} in {text!r}; known patterns: {known}")
    try:
        positional = [ast.literal_eval(argument) for argument in node.args]
        named = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
        return patterns.PATTERNS[name](*positional, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot read {ast.unparse(node)!r}: {error}") from None
