"""One case: our result checked, then ours and its peers timed."""

import gc
import statistics
from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from sparse_core.bench.cases import Case, Problem, make_problem
from sparse_core.bench.check import (
    Results,
    Rows,
    choose_rows,
    complaint,
    count_kept_pairs,
    exact_rows,
    row_errors,
)
from sparse_core.bench.contenders import Call, prepare_ours, prepare_peer
from sparse_core.bench.layouts import median_seconds
from sparse_core.bench.record import OURS, Figure, Figures

WARM_UP_MS, TIMED_MS = 50.0, 300.0
CACHE_BYTES = 2**28
"""More than any GPU's second-level cache holds."""


def measure_case(case: Case, run: str, names: list[str], device: torch.device) -> Figures:
    """Measure the named contenders, ours first.

    Where ours raises or is wrong, its failure is the only figure. What a peer raises stands in that
    peer's figure.
    """
    try:
        _release_memory(device)
        problem = make_problem(case, device)
        ours, rows, expected = _measure_ours(problem, run)
    except Exception as error:
        return {OURS: Figure(run, failure=_describe(error))}
    figures = {OURS: ours}
    if ours.failure is None:
        for name in names[1:]:
            figures[name] = _measure_peer(name, problem, run, rows, expected)
    return figures


def is_alive(device: torch.device) -> bool:
    """Tell whether the device still serves this process: after some errors it does not."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Time on the device itself, with its cache cleared before each call."""
    if device.type != "cuda":
        return 1e3 * median_seconds(run, device)
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device=device)
    run()
    estimate = statistics.median(_event_times(run, cache, 3))
    for _ in range(int(WARM_UP_MS / estimate)):
        run()
    repeats = min(max(int(TIMED_MS / estimate), 5), 200)
    return statistics.median(_event_times(run, cache, repeats))


def _measure_ours(problem: Problem, run: str) -> tuple[Figure, Rows, Results]:
    call = prepare_ours(problem)
    rows = choose_rows(problem)
    out, lse = _forward(call)
    assert lse is not None
    found = _found_rows(call, rows, out, lse)
    expected = exact_rows(problem, rows, out.detach(), lse.detach())
    errors = row_errors(found, expected)
    wrong = complaint(errors, problem.q.dtype)
    if wrong is not None:
        return _figure(call, run, errors, failure=wrong), rows, expected
    del out, lse, found
    kept_pairs = count_kept_pairs(problem)
    _release_memory(problem.device)
    return _timed(call, run, errors, kept_pairs), rows, expected


def _measure_peer(name: str, problem: Problem, run: str, rows: Rows, expected: Results) -> Figure:
    try:
        _release_memory(problem.device)
        call = prepare_peer(name, problem)
        out, _ = _forward(call)
        errors = row_errors(_found_rows(call, rows, out, None), expected)
        del out
        if not all(map(isfinite, errors.values())):
            return _figure(call, run, errors, failure="its result is not finite")
        return _timed(call, run, errors, None)
    except Exception as error:
        return Figure(run, name, failure=_describe(error))


def _timed(call: Call, run: str, errors: dict[str, float], kept_pairs: int | None) -> Figure:
    device = call.grad_out.device
    peak_bytes = _peak_bytes(call) if device.type == "cuda" else None
    forward_ms = median_ms(lambda: _forward(call), device)
    out, _ = _forward(call)
    backward_ms = median_ms(lambda: _backward(call, out), device)
    return _figure(
        call, run, errors,
        forward_ms=forward_ms, backward_ms=backward_ms,
        peak_bytes=peak_bytes, kept_pairs=kept_pairs,
    )  # fmt: skip


def _figure(
    call: Call,
    run: str,
    errors: dict[str, float],
    *,
    forward_ms: float | None = None,
    backward_ms: float | None = None,
    peak_bytes: int | None = None,
    kept_pairs: int | None = None,
    failure: str | None = None,
) -> Figure:
    return Figure(
        run,
        call.engine,
        forward_ms=forward_ms,
        backward_ms=backward_ms,
        layout_ms=call.layout_ms,
        layout_bytes=call.layout_bytes,
        peak_bytes=peak_bytes,
        visited_pairs=call.visited_pairs,
        kept_pairs=kept_pairs,
        errors={name: error for name, error in errors.items() if isfinite(error)},
        failure=failure,
    )


def _forward(call: Call) -> tuple[Tensor, Tensor | None]:
    found = call.attend(*call.inputs)
    return found if isinstance(found, tuple) else (found, None)


def _backward(call: Call, out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, call.inputs, call.grad_out, retain_graph=True)


def _found_rows(call: Call, rows: Rows, out: Tensor, lse: Tensor | None) -> Results:
    dq, dk, dv = map(call.back, _backward(call, out))
    lse = None if lse is None else lse[0].detach()
    return rows.of(call.back(out.detach()), lse, dq, dk, dv)


def _release_memory(device: torch.device) -> None:
    """Give back what the last contender held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _peak_bytes(call: Call) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, _ = _forward(call)
    _backward(call, out)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _event_times(run: Callable[[], object], cache: Tensor, repeats: int) -> list[float]:
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(repeats)
    ]
    for start, end in events:
        cache.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _describe(error: Exception) -> str:
    """One line that fits a table's footnote."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
