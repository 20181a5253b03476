"""Patterns with a layout of their own kind, and what may join them."""

from dataclasses import dataclass
from typing import TypeVar

from sparse_core.patterns.base import Intersection, Pattern, Union
from sparse_core.patterns.causal import Causal
from sparse_core.patterns.global_tokens import GlobalTokens
from sparse_core.patterns.hierarchical import Hierarchical
from sparse_core.patterns.routed import Routed
from sparse_core.patterns.terms import Members

AnyPattern = TypeVar("AnyPattern", bound=Pattern)


@dataclass(frozen=True)
class Beside:
    """What joins such a pattern: global tokens, and whether what comes later is hidden."""

    members: Members
    causal: bool


def is_pooled(pattern: Pattern) -> bool:
    """Tell whether a pattern needs `build_pooled_layout`."""
    return _holds(pattern, Hierarchical)


def is_routed(pattern: Pattern) -> bool:
    """Tell whether a pattern needs `build_routed_layout`."""
    return _holds(pattern, Routed)


def take_apart(pattern: Pattern, kind: type[AnyPattern]) -> tuple[AnyPattern, Beside]:
    """Find the one pattern of a kind, and what joins it.

    Raises ValueError for what is not of the form `(kind | GlobalTokens(...)) & Causal()`.
    """
    parts = list(pattern.parts) if isinstance(pattern, Intersection) else [pattern]
    causal = Causal() in parts
    parts = [part for part in parts if part != Causal()]
    if len(parts) == 1 and isinstance(parts[0], Union):
        parts = list(parts[0].parts)
    found = [part for part in parts if isinstance(part, kind)]
    global_tokens = [part for part in parts if isinstance(part, GlobalTokens)]
    if len(found) != 1 or len(parts) != 1 + len(global_tokens) or len(global_tokens) > 1:
        raise ValueError(
            f"this layout is made from one {kind.__name__}, joined at most with "
            f"| GlobalTokens(...) and & Causal(); got {pattern!r}"
        )
    members = Members(0, ())
    if global_tokens:
        members = Members(global_tokens[0].first, global_tokens[0].positions)
    return found[0], Beside(members, causal)


def check_axes(pattern: Pattern, dims: int) -> None:
    """Raise ValueError if a pattern, of any kind, makes no layout with so many axes."""
    if is_pooled(pattern):
        causal = take_apart(pattern, Hierarchical)[1].causal
    elif is_routed(pattern):
        causal = take_apart(pattern, Routed)[1].causal
    else:
        pattern.terms(dims)
        return
    if causal and dims > 1:
        raise ValueError(f"{pattern!r}: what comes before is known in one dimension only")


def _holds(pattern: Pattern, kind: type[Pattern]) -> bool:
    parts = pattern.parts if isinstance(pattern, Union | Intersection) else ()
    return isinstance(pattern, kind) or any(_holds(part, kind) for part in parts)
