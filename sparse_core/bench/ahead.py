"""Compile before measuring: worker processes fill the caches on disk, several cases at a time.

What is measured stays one process; it then finds compiled code where it would have waited for the
compilers, most of a run's time. A worker calls each contender of a case once, forward and backward,
with the shapes that are measured, since FlexAttention compiles for a shape.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch

from sparse_core.bench.cases import Case, make_problem
from sparse_core.bench.contenders import SDPA, Call, prepare_ours, prepare_peer
from sparse_core.bench.record import OURS

Work = tuple[Case, str]
"""A case and one of its contenders."""


def compile_ahead(work: Sequence[Work], device: torch.device, workers: int) -> None:
    """Run every piece of work once in `workers` processes, and say how far that is.

    What fails here is not reported: it fails again, and is recorded, where it is measured.
    """
    compiled = [piece for piece in work if piece[1] not in SDPA]
    if workers < 1 or len(compiled) < 2:
        return
    start = time.perf_counter()
    count = min(workers, len(compiled))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(call_once, case, name, device.type) for case, name in compiled]
        for done, job in enumerate(as_completed(jobs), 1):
            if isinstance(job.exception(), BrokenProcessPool):
                return
            seconds = time.perf_counter() - start
            print(f"compiling {done}/{len(compiled)}, {seconds:.0f} s", flush=True)


def call_once(case: Case, name: str, device: str) -> bool:
    """Compile a contender by calling it; whether that went well."""
    torch.set_num_threads(1)
    try:
        problem = make_problem(case, device)
        call = prepare_ours(problem) if name == OURS else prepare_peer(name, problem)
        _forward_backward(call)
    except Exception:
        return False
    finally:
        if device == "cuda":
            torch.cuda.empty_cache()
    return True


def default_workers() -> int:
    """One for each core but the one that watches, and no more than a GPU's memory bears."""
    return min((os.cpu_count() or 1) - 1, 12)


def _forward_backward(call: Call) -> None:
    found = call.attend(*call.inputs)
    out = found[0] if isinstance(found, tuple) else found
    torch.autograd.grad(out, call.inputs, call.grad_out)
