"""Choose the kernels' configurations on this GPU: `python -m sparse_core.tune`.

Compiles the candidates side by side in processes of their own, holds each to the float64 reference,
times those that pass, and writes the fastest where later calls find them. What was not tuned runs
with the shipped table.
"""

import argparse
import importlib.metadata
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache, partial
from multiprocessing import get_context

import torch
from torch import Tensor

from sparse_core.bench.cases import make_place
from sparse_core.building import build_layout
from sparse_core.layout import BlockLayout
from sparse_core.ops import Precision
from sparse_core.patterns import GlobalTokens, Pattern, RandomBlocks, SlidingWindow, Strided
from sparse_core.testing import (
    Engine,
    Inputs,
    assert_close,
    make_inputs,
    reference_results,
)

SMALL = 40 * 40
"""Tokens of the numeric check: enough that its kernels are those that are timed, compiled once."""

CASES: dict[str, tuple[Pattern, int]] = {
    "affine/short": (SlidingWindow(512), 65_536),
    "affine/long": (SlidingWindow(3072), 16_384),
    "listed/short": (
        SlidingWindow(96) | GlobalTokens(128) | RandomBlocks(3, block=64),
        65_536,
    ),
    "listed/long": (Strided(8, block=128) | SlidingWindow(128), 65_536),
    "grid/short": (SlidingWindow(12), 65_536),
    "small/short": (SlidingWindow(8), 65_536),
}
"""For each kind and length of lists a pattern that has it, and the tokens that it is timed at.

Those of grids stand on a square one.
"""

CLASSES: dict[str, tuple[torch.dtype, Precision]] = {
    "half": (torch.bfloat16, "ieee"),
    "ieee": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}


@dataclass(frozen=True)
class Trial:
    """One candidate of one kernel for one kind of layout."""

    kernel: str
    dtype: str
    head_dim: int
    case: str
    config: tuple[int, ...]


def main() -> int:
    """Tune, print the table, write the choices; 3 if some kind found no candidate that is right."""
    parser = argparse.ArgumentParser(prog="python -m sparse_core.tune", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=tuple(CLASSES), default=["half"])
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--case", nargs="+", choices=tuple(CASES), default=list(CASES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tuning needs a CUDA device", file=sys.stderr)
        return 2
    from sparse_core.kernels import tuning

    print(f"{torch.cuda.get_device_name()}, {_versions()}")
    start = time.perf_counter()
    trials = [
        trial
        for dtype in arguments.dtype
        for head_dim in arguments.head_dim
        for case in arguments.case
        for trial in _trials(dtype, head_dim, case)
    ]
    errors = _check_side_by_side(trials)
    print(f"{len(trials)} candidates compiled and checked, {time.perf_counter() - start:.0f} s")
    choices, missing = {}, []
    for names, group in _grouped(trials, "kernel", "dtype", "head_dim", "case").items():
        times = {t: _time(t) for t in group if errors[t] is None}
        for trial in group:
            print(_line(trial, times.get(trial), errors[trial]), flush=True)
        name = "/".join(map(str, names))
        if times:
            choices[name] = tuning.Config(*min(times, key=times.__getitem__).config)
        else:
            missing.append(name)
    path = tuning.cache_path()
    tuning.save(path, choices)
    print(f"{len(choices)} choices in {path}, {time.perf_counter() - start:.0f} s")
    for name in missing:
        print(f"{name}: no candidate is right", file=sys.stderr)
    return 3 if missing else 0


def _versions() -> str:
    from sparse_core.kernels import tuning

    triton = importlib.metadata.version("triton")
    return f"torch {torch.__version__}, triton {triton}, ptxas {tuning.ptxas_version()}"


def _trials(dtype: str, head_dim: int, case: str) -> list[Trial]:
    from sparse_core.kernels import tuning

    rounded = next(d for d in tuning.HEAD_DIMS if head_dim <= d)
    return [
        Trial(kernel, dtype, rounded, case, astuple(c))
        for kernel in tuning.KERNELS
        for c in tuning.candidates(kernel, dtype, rounded, case.split("/")[0])
    ]


def _grouped(trials: list[Trial], *names: str) -> dict[tuple[object, ...], list[Trial]]:
    """Put trials together that are equal in the named fields."""
    groups: dict[tuple[object, ...], list[Trial]] = {}
    for trial in trials:
        groups.setdefault(tuple(getattr(trial, name) for name in names), []).append(trial)
    return groups


def _check_side_by_side(trials: list[Trial]) -> dict[Trial, str | None]:
    """Compile and check every trial; what is wrong with it, or None.

    One trial of each case goes first: the others find its kernels compiled, but for their own.
    """
    first = [group[0] for group in _grouped(trials, "dtype", "head_dim", "case").values()]
    rest = [trial for trial in trials if trial not in first]
    workers = min(os.cpu_count() or 1, len(trials))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return {
            trial: error
            for some in (first, rest)
            for trial, error in zip(some, pool.map(check, some), strict=True)
        }


def check(trial: Trial) -> str | None:
    """Hold one candidate to the reference, forward and gradients; say what is wrong."""
    torch.set_num_threads(1)
    dtype, precision = CLASSES[trial.dtype]
    pattern = CASES[trial.case][0]
    where = _where(trial.case, SMALL)
    layout = build_layout(pattern, where)
    host = make_inputs(SMALL, heads=2, head_dim=trial.head_dim, dtype=dtype)
    try:
        engine = Engine("triton", "cuda", precision)
        with _forcing(trial):
            found = engine.run(layout, host, plain=True)
            _call(trial)()  # compiles what only long lists need: joining their pieces
        plain = _without_bias(found)
        mask = pattern.mask(where)
        none = torch.zeros(SMALL, SMALL, dtype=torch.float64)
        exact = _without_bias(reference_results(_no_bias(host), mask, none))
        if precision == "tf32":
            return _far(plain, exact, 5e-3)
        assert_close(plain, exact, host)
    except Exception as error:  # a candidate may fail in any way, and is then out
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    return None


def _no_bias(inputs: Inputs) -> Inputs:
    zero = torch.zeros_like
    return Inputs(
        inputs.q, inputs.k, inputs.v, zero(inputs.key_bias), zero(inputs.alibi_slopes),
        inputs.grad_out, inputs.grad_lse,
    )  # fmt: skip


def _without_bias(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x for name, x in results.items() if not name.startswith(("dkey", "dal"))}


def _far(found: dict[str, Tensor], exact: dict[str, Tensor], limit: float) -> str | None:
    for name, wanted in exact.items():
        error = float((found[name].double() - wanted).norm() / wanted.norm())
        if not error <= limit:
            return f"{name}: relative error {error:.1e}"
    return None


def _forcing(trial: Trial):  # type: ignore[no-untyped-def]
    from sparse_core.kernels import tuning

    return tuning.forced({trial.kernel: tuning.Config(*trial.config)})  # type: ignore[dict-item]


def _call(trial: Trial) -> Callable[[], object]:
    """Prepare the launch that is timed; to be called while its candidate is forced."""
    from sparse_core.kernels import engine

    dtype, precision = CLASSES[trial.dtype]
    tokens = CASES[trial.case][1]
    layout = _layout(trial.case, tokens if trial.dtype == "half" else tokens // 4)
    heads = max(1, 768 // trial.head_dim)
    shape = (1, layout.num_queries, heads, trial.head_dim)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(4))
    scale = trial.head_dim**-0.5
    forward = partial(
        engine.forward, q, k, v, layout,
        scale=scale, key_bias=None, alibi_slopes=None, block_bias=None, precision=precision,
    )  # fmt: skip
    if trial.kernel == "forward":
        return forward
    out, lse = forward()
    call = engine.Backward(
        q=q, k=k, v=v, grad_out=grad, out=out, lse=lse, grad_lse=None, key_bias=None,
        alibi_slopes=None, block_bias=None, row_terms=lse.new_zeros((*lse.shape, 2)),
        layout=layout, scale=scale, precision=precision,
    )  # fmt: skip
    return call.by_queries if trial.kernel == "query" else call.by_keys


def _time(trial: Trial) -> float:
    """Milliseconds of the kernel alone, replayed as a CUDA graph."""
    with _forcing(trial):
        return _median(_call(trial))


@cache
def _layout(case: str, tokens: int) -> BlockLayout:
    return build_layout(CASES[case][0], _where(case, tokens), device="cuda")


def _where(case: str, tokens: int) -> Tensor | int:
    """Coordinates along a Hilbert curve where the case wants a grid."""
    return make_place("grid", tokens).coords if case.startswith("grid") else tokens


def _median(run: Callable[[], object], repeats: int = 9, inner: int = 3) -> float:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            run()
    milliseconds = []
    for _ in range(repeats + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds.append(begin.elapsed_time(end) / inner)
    return statistics.median(milliseconds[1:])


def _line(trial: Trial, milliseconds: float | None, error: str | None) -> str:
    own, other, warps, stages, registers = trial.config
    name = f"{trial.kernel}/{trial.dtype}/{trial.head_dim}/{trial.case}"
    what = f"{milliseconds:8.3f} ms" if milliseconds is not None else f"out: {error}"
    how = f"{warps} warps, {stages} stages, {registers or 255:3} registers"
    return f"{name:38} {own:4} x {other:3}, {how}  {what}"


if __name__ == "__main__":
    sys.exit(main())
