"""Is a result right? A few of its rows against a direct computation in float64.

256 queries and 256 keys are looked at: the first, the last, those at the edges of blocks and of
packed sequences, global ones, and the rest at random. The pattern's own test of token pairs says
who sees whom; no layout is involved.

Rows of queries (out, lse, dq) are computed from nothing but the inputs. A key's gradients sum over
all queries that see it, and need the log-sum-exp and the output of each: those of the engine are
taken, of which the first half has just held a sample to float64. What that cannot show is a wrong
row of the forward pass that no sample meets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_core.bench.cases import Place, Problem
from sparse_core.blocking import sequence_tokens
from sparse_core.patterns import GlobalTokens, Intersection, Pattern, Union
from sparse_core.patterns.terms import Tokens
from sparse_core.testing import TOLERANCE

ROWS = 256
GROUP = 16
"""Rows whose error is taken together: their norms are alike, unlike those of all rows."""
PAIRS_AT_ONCE = 2**26

Results = dict[str, Tensor]
"""out, lse, dq of some queries, dk and dv of some keys: [R, H, D], of lse [R, H]."""


@dataclass(frozen=True)
class Rows:
    """The queries and keys that are looked at, ascending."""

    queries: Int[Tensor, "R"]
    keys: Int[Tensor, "R"]

    def of(self, out: Tensor, lse: Tensor | None, dq: Tensor, dk: Tensor, dv: Tensor) -> Results:
        """Pick them from results [T, H, D] and, if there is one, a log-sum-exp [H, T]."""
        found = {"out": out[self.queries], "dq": dq[self.queries]}
        found |= {"dk": dk[self.keys], "dv": dv[self.keys]}
        if lse is not None:
            found["lse"] = lse[:, self.queries].T
        return found


def choose_rows(problem: Problem) -> Rows:
    """Take the rows where mistakes like to sit, and others at random; all if there are few."""
    named = _named_rows(problem.place, problem.case.pattern)
    tokens = problem.place.num_tokens

    def fill(seed: int) -> Int[Tensor, "R"]:
        anywhere = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
        chosen = list(dict.fromkeys(named + anywhere[: 2 * ROWS].tolist()))[:ROWS]
        return torch.tensor(sorted(chosen), device=problem.device)

    return Rows(fill(1), fill(2))


def exact_rows(
    problem: Problem, rows: Rows, out: Float[Tensor, "1 T H D"], lse: Float[Tensor, "1 H T"]
) -> Results:
    """Compute what is right at the rows, in float64; `out` and `lse` are the engine's."""
    tokens, sequence = sequence_tokens(problem.place.coords, problem.place.segments, problem.device)
    pairs = _Pairs(problem.case.pattern, tokens, sequence)
    seen_keys, seeing_queries = pairs.keys_of(rows.queries), pairs.queries_of(rows.keys)
    heads, kv_heads = problem.q.shape[2], problem.k.shape[2]
    by_query, by_key = [], []
    for head in range(heads):
        one = _Head.of(problem, head, head * kv_heads // heads)
        by_query.append(_query_rows(one, rows.queries, seen_keys))
        delta = (one.grad_out * out[0, :, head].double()).sum(-1)
        by_key.append(_key_rows(one, rows.keys, seeing_queries, lse[0, head].double(), delta))
    found_out, found_lse, dq = (torch.stack(x, 1) for x in zip(*by_query, strict=True))
    dk, dv = (
        torch.stack(x, 1).unflatten(1, (kv_heads, -1)).sum(2) for x in zip(*by_key, strict=True)
    )
    return {"out": found_out, "lse": found_lse, "dq": dq, "dk": dk, "dv": dv}


def row_errors(found: Results, expected: Results) -> dict[str, float]:
    """Measure each result's error.

    It is |found - expected| / |expected| over 16 rows at a time, and the largest of those; of the
    log-sum-exp the largest difference of single ones, relative where they exceed 1.
    """
    return {
        name: _difference(got.double(), expected[name])
        if name == "lse"
        else max(map(_relative, got.double().split(GROUP), expected[name].split(GROUP)))
        for name, got in found.items()
    }


def complaint(errors: dict[str, float], dtype: torch.dtype) -> str | None:
    """Say which results are off by more than half the dtype's tolerance; None if all are right."""
    allowed = TOLERANCE[dtype] / 2
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= allowed]
    return f"wrong: {', '.join(wrong)} ({allowed:.0e} is allowed)" if wrong else None


def count_kept_pairs(problem: Problem, *, most: int = 2**37) -> int | None:
    """Count the pairs that the pattern keeps; None where more than `most` would be asked for."""
    place = problem.place
    tokens, sequence = sequence_tokens(place.coords, place.segments, problem.device)
    lengths = tokens.length.long()
    first = torch.arange(place.num_tokens, device=problem.device) - tokens.index
    longest = int(lengths.max())
    step = 4096
    while step > 1 and step * min(place.num_tokens, step + 2 * longest) > PAIRS_AT_ONCE:
        step //= 2
    if place.num_tokens * min(place.num_tokens, step + 2 * longest) > most:
        return None
    pairs = _Pairs(problem.case.pattern, tokens, sequence)
    starts = torch.arange(0, place.num_tokens, step, device=problem.device)
    ends = (starts + step).clamp(max=place.num_tokens)
    low, high = first[starts].tolist(), (first + lengths)[ends - 1].tolist()
    total = torch.zeros((), dtype=torch.int64, device=problem.device)
    for start, end, lowest, highest in zip(starts.tolist(), ends.tolist(), low, high, strict=True):
        total += pairs.among(slice(start, end), slice(lowest, highest)).sum()
    return int(total)


@dataclass(frozen=True)
class _Pairs:
    """The pattern's own test of token pairs, over packed sequences."""

    pattern: Pattern
    tokens: Tokens
    sequence: Int[Tensor, "T"]

    def among(
        self, queries: Int[Tensor, "R"] | slice, keys: Int[Tensor, "N"] | slice
    ) -> Bool[Tensor, "R N"]:
        """Tell for every pair whether it is kept."""
        same = self.sequence[queries][:, None] == self.sequence[keys][None, :]
        query, key = self.tokens[queries].as_rows(), self.tokens[keys].as_columns()
        return self.pattern.allows(query, key) & same

    def keys_of(self, queries: Int[Tensor, "R"]) -> Bool[Tensor, "R T"]:
        """Mark the keys that each query sees."""
        everything = slice(None)
        return torch.cat([self.among(queries[at], everything) for at in self._steps(queries)])

    def queries_of(self, keys: Int[Tensor, "R"]) -> Bool[Tensor, "R T"]:
        """Mark the queries that see each key."""
        everything = slice(None)
        return torch.cat([self.among(everything, keys[at]).T for at in self._steps(keys)])

    def _steps(self, rows: Tensor) -> Iterator[slice]:
        return _steps(rows.shape[0], self.sequence.shape[0])


@dataclass(frozen=True)
class _Head:
    """One head's tensors in float64, [T, D], with the key head that it uses."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    scale: float

    @classmethod
    def of(cls, problem: Problem, head: int, kv_head: int) -> "_Head":
        return cls(
            problem.q[0, :, head].double(),
            problem.k[0, :, kv_head].double(),
            problem.v[0, :, kv_head].double(),
            problem.grad_out[0, :, head].double(),
            problem.q.shape[-1] ** -0.5,
        )


def _query_rows(
    one: _Head, queries: Int[Tensor, "R"], kept: Bool[Tensor, "R T"]
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute out, lse and dq of some queries."""
    results = []
    for at in _steps(*kept.shape):
        q, grad_out = one.q[queries[at]], one.grad_out[queries[at]]
        scores = (q @ one.k.T * one.scale).masked_fill(~kept[at], -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.where(kept[at], (scores - lse[:, None]).exp(), 0)
        out = weights @ one.v
        delta = (grad_out * out).sum(-1)
        dscores = weights * (grad_out @ one.v.T - delta[:, None])
        results.append((out, lse, one.scale * dscores @ one.k))
    out, lse, dq = (torch.cat(pieces) for pieces in zip(*results, strict=True))
    return out, lse, dq


def _key_rows(
    one: _Head,
    keys: Int[Tensor, "R"],
    kept: Bool[Tensor, "R T"],
    lse: Float[Tensor, "T"],
    delta: Float[Tensor, "T"],
) -> tuple[Tensor, Tensor]:
    """Compute one query head's share of dk and dv of some keys."""
    results = []
    for at in _steps(*kept.shape):
        scores = one.k[keys[at]] @ one.q.T * one.scale
        weights = torch.where(kept[at], (scores - lse).exp(), 0)
        dscores = weights * (one.v[keys[at]] @ one.grad_out.T - delta)
        results.append((one.scale * dscores @ one.q, weights @ one.grad_out))
    dk, dv = (torch.cat(pieces) for pieces in zip(*results, strict=True))
    return dk, dv


def _steps(rows: int, width: int) -> Iterator[slice]:
    """Cut rows so that a table of them stays small."""
    step = max(1, PAIRS_AT_ONCE // width)
    return (slice(start, start + step) for start in range(0, rows, step))


def _named_rows(place: Place, pattern: Pattern) -> list[int]:
    tokens = place.num_tokens
    last_block = tokens // 128 * 128
    rows = [0, 1, tokens - 2, tokens - 1, last_block - 1, last_block]
    rows += [edge + step for edge in (64, 128) for step in (-2, -1, 0, 1)]
    if place.segments is not None:
        ends = place.segments.cumsum(0).tolist()
        rows += [end + step for end in (*ends[:8], *ends[-8:]) for step in (-1, 0)]
    rows += _global_rows(pattern)
    return [row for row in dict.fromkeys(rows) if 0 <= row < tokens]


def _global_rows(pattern: Pattern) -> list[int]:
    if isinstance(pattern, Union | Intersection):
        return [row for part in pattern.parts for row in _global_rows(part)]
    if not isinstance(pattern, GlobalTokens):
        return []
    first = [*range(0, pattern.first, max(1, pattern.first // 8)), pattern.first - 1, pattern.first]
    return [*first, *pattern.positions[:16], *pattern.positions[-16:]]


def _relative(found: Tensor, expected: Tensor) -> float:
    size = float(expected.norm())
    error = float((found - expected).norm())
    # a NaN would lose against every number in a maximum
    return (error / size if size else error) if isfinite(error) else inf


def _difference(found: Tensor, expected: Tensor) -> float:
    finite = torch.isfinite(expected)
    if not torch.equal(torch.isfinite(found), finite):
        return inf
    error = (found - expected).abs() / expected.abs().clamp(min=1)
    return float(error[finite].max()) if bool(finite.any()) else 0.0
