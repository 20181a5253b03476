"""What was measured, by whom and with what: kept as JSON, merged, resumed."""

import hashlib
import importlib
import json
import os
import platform
import subprocess
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

import sparse_core
from sparse_core.bench.cases import Case, Per
from sparse_core.bench.layouts import LayoutFigure

OURS = "ours"
Direction = Literal["forward", "backward"]
Machine = dict[str, str]


@dataclass(frozen=True)
class Figure:
    """What one process found for one contender in one case; None is unknown or does not apply.

    `layout_ms` is the time of building the layout or block mask, `peak_bytes` the memory of forward
    and backward beyond inputs and layout, `errors` the largest relative errors of the checked rows.
    With a `failure` there are no times.
    """

    run: str
    engine: str = ""
    forward_ms: float | None = None
    backward_ms: float | None = None
    layout_ms: float | None = None
    layout_bytes: int | None = None
    peak_bytes: int | None = None
    visited_pairs: int | None = None
    kept_pairs: int | None = None
    errors: dict[str, float] | None = None
    failure: str | None = None

    def ms(self, direction: Direction) -> float | None:
        """Time of one direction."""
        return self.forward_ms if direction == "forward" else self.backward_ms


Figures = dict[str, Figure]
"""By contender."""


@dataclass
class Record:
    """All figures so far: runs by id, and by case its shape and its figures."""

    runs: dict[str, Machine] = field(default_factory=dict)
    shapes: dict[str, dict[str, str | int | None]] = field(default_factory=dict)
    figures: dict[str, Figures] = field(default_factory=dict)
    layouts: list[LayoutFigure] = field(default_factory=list)
    layouts_run: str = ""

    def add(self, case: Case, figures: Figures) -> None:
        """Put newer figures beside those of other contenders, unless the case has changed."""
        known = self.figures.get(case.name, {}) if self._knows(case) else {}
        self.shapes[case.name] = case.shape()
        self.figures[case.name] = {**known, **figures}

    def holds(self, case: Case, contenders: list[str], machine: Machine) -> bool:
        """Tell whether one process on such a machine measured all contenders, or failed at ours."""
        found = self.figures.get(case.name, {})
        ours = found.get(OURS)
        if ours is None or not self._knows(case) or self.runs.get(ours.run) != machine:
            return False
        complete = all(name in found and found[name].run == ours.run for name in contenders)
        return complete or ours.failure is not None

    def fails(self, case: Case) -> bool:
        """Tell whether our last figure of the case is a failure."""
        ours = self.figures.get(case.name, {}).get(OURS)
        return ours is not None and ours.failure is not None

    def holds_layouts(self, machine: Machine) -> bool:
        """Tell whether the layouts were measured on such a machine."""
        return self.runs.get(self.layouts_run) == machine

    def used_runs(self) -> dict[str, Machine]:
        """Runs that some figure comes from."""
        used = {figure.run for figures in self.figures.values() for figure in figures.values()}
        return {run: x for run, x in self.runs.items() if run in used | {self.layouts_run}}

    def _knows(self, case: Case) -> bool:
        return self.shapes.get(case.name) == case.shape()

    def to_json(self) -> str:
        """Write as text."""
        cases = {
            name: {
                "shape": self.shapes[name],
                "figures": {who: _without_none(figure) for who, figure in figures.items()},
            }
            for name, figures in self.figures.items()
        }
        layouts = {"run": self.layouts_run, "figures": [asdict(x) for x in self.layouts]}
        whole = {"runs": self.used_runs(), "cases": cases, "layouts": layouts}
        return json.dumps(whole, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read what `to_json` wrote; raises ValueError for other text."""
        try:
            whole = json.loads(text)
            return cls(
                runs=whole["runs"],
                shapes={name: case["shape"] for name, case in whole["cases"].items()},
                figures={
                    name: {who: Figure(**x) for who, x in case["figures"].items()}
                    for name, case in whole["cases"].items()
                },
                layouts=[LayoutFigure(**x) for x in whole["layouts"]["figures"]],
                layouts_run=whole["layouts"]["run"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a record of figures ({error!r})") from None


def speedup(ours: Figure | None, other: Figure | None, direction: Direction) -> float | None:
    """How many times as long `other` takes; None unless one process timed both."""
    return _quotient(_cost(other, direction, "call"), _cost(ours, direction, "call"), ours, other)


def relative_cost(
    ours: Figure | None, base: Figure | None, direction: Direction, per: Per
) -> float | None:
    """Our time per call or pair over that of another case; None unless one process timed both."""
    return _quotient(_cost(ours, direction, per), _cost(base, direction, per), ours, base)


def new_run() -> str:
    """Name this process's figures."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:6]}"


def describe_machine(device: torch.device) -> Machine:
    """Name the GPU and everything whose version decides the figures."""
    is_cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if is_cuda else platform.machine(),
        "driver": _driver_version() if is_cuda else "-",
        "cuda": torch.version.cuda or "-",
        "torch": torch.__version__,
        "triton": _package_version("triton"),
        "ptxas": _ptxas_version() if is_cuda else "-",
        "python": platform.python_version(),
        "gigasparse": f"{_package_version('gigasparse')} ({_source_digest()})",
    }


def write_aside(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _without_none(figure: Figure) -> dict[str, object]:
    return {name: value for name, value in asdict(figure).items() if value is not None}


def _cost(figure: Figure | None, direction: Direction, per: Per) -> float | None:
    ms = figure.ms(direction) if figure else None
    if figure is None or ms is None or per == "call":
        return ms
    pairs = figure.visited_pairs if per == "visited pair" else figure.kept_pairs
    return ms / pairs if pairs else None


def _quotient(
    above: float | None, below: float | None, one: Figure | None, two: Figure | None
) -> float | None:
    if above is None or not below or one is None or two is None or one.run != two.run:
        return None
    return above / below


def _package_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "-"
    return found.split()[0] if found.split() else "-"


def _ptxas_version() -> str:
    """Ask the kernels, which know the compiler in use."""
    try:
        tuning = importlib.import_module("sparse_core.kernels.tuning")
        return str(tuning.ptxas_version())
    except (ImportError, AttributeError, OSError, subprocess.CalledProcessError):
        return "-"


def _source_digest() -> str:
    """Digest the code that is measured: figures of other code are another machine's."""
    root = Path(sparse_core.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if not path.is_relative_to(root / "bench"):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:10]
