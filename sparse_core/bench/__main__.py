"""Time this machine: `python -m sparse_core.bench [--out DIR]`.

With a CUDA device: every case of a fixed list, checked in float64 and then timed beside compiled
FlexAttention and PyTorch's dense attention. Without: building layouts of 1,048,576 tokens, a window
beside dense attention, and memory, on the CPU. Run it on a quiet machine.

Exit codes: 0 all well, 2 wrong arguments, 3 some case failed or was wrong and is listed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_core.bench.ahead import compile_ahead, default_workers
from sparse_core.bench.cases import CASES, Case
from sparse_core.bench.contenders import contenders
from sparse_core.bench.encoder import run_encoder
from sparse_core.bench.host import host_lines, memory_of_one_call
from sparse_core.bench.layouts import measure_layouts
from sparse_core.bench.long_range import run_long_range
from sparse_core.bench.measure import is_alive, measure_case
from sparse_core.bench.record import Record, describe_machine, new_run, write_aside
from sparse_core.bench.tables import markdown, progress

LAYOUTS = "layouts"
"""What `--only` calls the table of layouts."""


@dataclass(frozen=True)
class Plan:
    """What to measure, and where results go."""

    cases: tuple[Case, ...]
    layouts: bool = False
    folder: Path | None = None
    flex: bool = True
    autotune: bool = False
    again: bool = False
    workers: int = 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and write the same text to a folder if asked."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.memory_only:
        print(memory_of_one_call())
        return 0
    if given.list:
        print("\n".join([*map(_case_line, CASES), LAYOUTS]))
        return 0
    names = [name for value in given.only for name in value.split(",") if name]
    unknown = set(names) - {case.name for case in CASES} - {LAYOUTS}
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; --list shows them all")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    if given.encoder or given.long_range:
        if not torch.cuda.is_available():
            parser.error("this is measured on a CUDA device, and there is none here")
        device = torch.device("cuda")
        measure = run_encoder if given.encoder else run_long_range
        return measure(describe_machine(device), given.out, device)
    if torch.cuda.is_available():
        plan = Plan(
            tuple(case for case in CASES if not names or case.name in names),
            not names or LAYOUTS in names,
            given.out, not given.no_flex, given.max_autotune, given.again, given.workers,
        )  # fmt: skip
        try:
            return run_plan(plan, torch.device("cuda"))
        except ValueError as error:
            parser.error(str(error))
    if names or given.no_flex or given.max_autotune or given.again:
        parser.error("cases are measured on a CUDA device, and there is none here")
    text = "\n".join(host_lines())
    print(text)
    if given.out is not None:
        write_aside(given.out / "bench_cpu.md", text + "\n")
    return 0


def run_plan(plan: Plan, device: torch.device) -> int:
    """Measure what the folder does not hold yet; write after every case."""
    record = _read(plan.folder)
    machine, run = describe_machine(device), new_run()
    record.runs[run] = machine
    if plan.layouts and (plan.again or not record.holds_layouts(machine)):
        record.layouts, record.layouts_run = list(measure_layouts(device)), run
        _write(plan.folder, record)
    names_of = {
        case: contenders(case, flex=plan.flex, autotune=plan.autotune) for case in plan.cases
    }
    missing = [
        case
        for case, names in names_of.items()
        if plan.again or not record.holds(case, names, machine)
    ]
    work = [(case, name) for case in missing for name in names_of[case]]
    compile_ahead(work, device, plan.workers)
    for number, case in enumerate(plan.cases, 1):
        start = time.perf_counter()
        before = case not in missing
        if not before:
            record.add(case, measure_case(case, run, names_of[case], device))
            _write(plan.folder, record)
        took = "measured before" if before else f"{time.perf_counter() - start:.0f} s"
        found = progress(record.figures[case.name])
        print(f"[{number}/{len(plan.cases)}] {case.name} ({took}): {found}", flush=True)
        if not is_alive(device):
            print("the device serves this process no more; call again for the rest", flush=True)
            break
    print("\n" + markdown(record, CASES), end="")
    return 3 if any(map(record.fails, plan.cases)) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_core.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="CASE",
        help=f"measure these cases (comma-separated, repeatable); {LAYOUTS!r} is one too",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="write bench.json and bench.md here after every case, and go on where they stop "
        "(on the CPU: bench_cpu.md)",
    )  # fmt: skip
    parser.add_argument(
        "--again", action="store_true", help="measure anew what DIR holds, failures too"
    )
    parser.add_argument(
        "--workers", type=int, default=default_workers(), metavar="N",
        help="processes that compile before anything is measured (default: %(default)s; 0: none)",
    )  # fmt: skip
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument(
        "--max-autotune", action="store_true", help="FlexAttention also as max-autotune compiles it"
    )
    parser.add_argument(
        "--encoder", action="store_true", help="training steps of a whole encoder instead"
    )
    parser.add_argument(
        "--long-range", action="store_true", help="routing and pooled cells instead"
    )
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    return parser


def _case_line(case: Case) -> str:
    shape = f"{case.tokens:,} x {case.heads} x {case.head_dim}"
    return f"{case.name:<24}{shape:<22}{repr(case.pattern)[:90]}"


def _read(folder: Path | None) -> Record:
    """Go on with what an earlier run wrote."""
    if folder is None or not (folder / "bench.json").exists():
        return Record()
    path = folder / "bench.json"
    try:
        return Record.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is {error}; move it away or name another folder") from None


def _write(folder: Path | None, record: Record) -> None:
    if folder is not None:
        write_aside(folder / "bench.json", record.to_json())
        write_aside(folder / "bench.md", markdown(record, CASES))


if __name__ == "__main__":
    sys.exit(main())
