"""`python -m pipelines.shared.doctor`: can this machine do the work, and are stores sound?

A pipeline adds its own findings through `HEALTH = "package.module"` in its `__main__`: a module
with `parts()`, which yields findings on its libraries, and `STORES`, which maps the family of a
store's `schema` attribute to a function that raises InputError where such a store is damaged.
"""

import importlib
import json
import os
import pkgutil
import platform
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Literal

from packaging.requirements import Requirement

import pipelines
from pipelines.shared.asides import is_aside
from pipelines.shared.errors import InputError

USAGE = """python -m pipelines.shared.doctor [store=FOLDER ...]

Say what is installed, what can run here and why not, and how much room there is. Of each store
(tile features, sequences; folders of them too) every array is read and held to its digest.

Exit codes: 0 all is well; 2 a wrong argument, or something that is needed is missing or does not
work; 3 a store is damaged or holds what an interrupted run left."""

_LITTLE_DISK, _LITTLE_MEMORY = 5e9, 4e9

Level = Literal["ok", "note", "missing", "damaged"]
Engine = Literal["reference", "blockwise", "triton"]
StoreCheck = Callable[[Path], None]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    `level`: ok; note (it works without); missing (it does not); damaged (a store).
    """

    level: Level
    part: str
    text: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if any(argument in ("-h", "--help", "help") for argument in given):
        print(USAGE)
        return 0
    try:
        stores = [_store_path(argument) for argument in given]
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    levels = set()
    for finding in examine(stores):
        levels.add(finding.level)
        print(f"{finding.level.ljust(8)} {finding.part}: {finding.text}", flush=True)
    if "missing" in levels:
        print("\nsomething that is needed is missing: see above")
        return 2
    print("\na store needs you: see above" if "damaged" in levels else "\nall is well")
    return 3 if "damaged" in levels else 0


def examine(stores: Sequence[Path] = ()) -> Iterator[Finding]:
    """Yield what is found of this machine, then of each store."""
    health = _health_modules()
    yield Finding("ok", "Python", f"{platform.python_version()}, {platform.platform()}")
    yield from check_requirements(_requirements())
    yield from check_engines()
    for module in health:
        yield from module.parts()
    yield from check_room(Path.cwd())
    checks: dict[str, StoreCheck] = {}
    for module in health:
        checks |= module.STORES
    for store in stores:
        yield from check_store(store, checks)


def check_requirements(lines: Iterable[tuple[str, str]]) -> Iterator[Finding]:
    """Compare requirements, each with its extra ("" for what is always needed), with this place."""
    extras: dict[str, list[str]] = {}
    found: list[str] = []
    for line, extra in lines:
        wanted = Requirement(line)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        problem, version = _problem(wanted)
        if problem and extra:
            extras.setdefault(extra, []).append(problem)
        elif problem:
            yield Finding("missing", "package", f"{problem}: pip install '{wanted}'")
        elif extra:
            extras.setdefault(extra, [])
        else:
            found.append(f"{wanted.name} {version}")
    yield Finding("ok", "packages", ", ".join(found))
    for extra, problems in extras.items():
        if problems:
            text = f"{', '.join(problems)}: pip install -e '.[{extra}]'"
            yield Finding("note", f"extra {extra}", text)
        else:
            yield Finding("ok", f"extra {extra}", "installed")


def check_engines() -> Iterator[Finding]:
    """Say which GPU there is, and let each engine of attention compute a little."""
    import torch

    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if names:
        gpus = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in names)
        yield Finding("ok", "GPU", f"{gpus}; torch is built for CUDA {torch.version.cuda}")
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without"
        yield Finding("note", "GPU", f"none is found, torch is {built}: everything runs on the CPU")
    engines: tuple[Engine, ...] = ("reference", "blockwise", "triton")
    for engine in engines:
        reason = _try_engine(engine)
        level: Level = "note" if engine == "triton" and not names else "missing"
        yield (
            Finding("ok", f"engine {engine}", "computes what it should")
            if reason is None
            else Finding(level, f"engine {engine}", reason)
        )


def check_room(folder: Path) -> Iterator[Finding]:
    """Say how many cores there are, how much memory, and how much room where runs are written."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cores", f"{cores}")
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        level: Level = "note" if memory < _LITTLE_MEMORY else "ok"
        yield Finding(level, "memory", f"{memory / 1e9:.0f} GB")
    yield _room(folder)


def check_store(folder: Path, checks: dict[str, StoreCheck]) -> Iterator[Finding]:
    """Yield the damage of a store, or of the stores in a folder, and what lies between them.

    What is `NAME/VERSION` in the attribute `schema` of a Zarr group is held to its digest by the
    check for NAME; of a store without one every array is read.
    """
    groups, leftovers = _walk(folder)
    yield _room(folder)
    for path in leftovers:
        text = f"{path} was left by an interrupted run; the same command removes it"
        yield Finding("damaged", "store", text)
    if not groups:
        yield Finding("damaged", "store", f"{folder} holds no store")
    sound = 0
    for path, schema in groups:
        try:
            checks.get(schema.split("/")[0], read_everything)(path)
        except Exception as error:  # whatever a damaged file makes a library raise
            yield Finding("damaged", "store", _one_line(path, error))
        else:
            sound += 1
    if sound:
        kinds = ", ".join(sorted({schema for _, schema in groups}))
        yield Finding("ok", "store", f"{folder}: {sound:,} of {len(groups):,} sound ({kinds})")


def read_everything(path: Path) -> None:
    """Read every array of a Zarr group; raises InputError that names the one that is damaged."""
    import zarr

    for file in sorted(path.rglob("zarr.json")):
        if json.loads(file.read_text(encoding="utf-8")).get("node_type") != "array":
            continue
        try:
            array = zarr.open_array(file.parent, mode="r")
            rows = array.chunks[0] if array.ndim else 1
            for start in range(0, array.shape[0] if array.ndim else 0, rows):
                array[start : start + rows]
        except Exception as error:  # whatever the damage makes a codec raise
            raise InputError(f"{file.parent}: {' '.join(str(error).split())}") from error


def _store_path(argument: str) -> Path:
    key, sign, value = argument.partition("=")
    if key != "store" or not sign or not value:
        raise InputError(f"{argument!r}: the only setting is store=FOLDER; see --help")
    path = Path(value).expanduser()
    if not path.is_dir():
        raise InputError(f"store={value}: there is no such folder")
    return path


def _health_modules() -> list[ModuleType]:
    """Modules that the pipelines' command lines name by `HEALTH`."""
    found = []
    for package in sorted(p.name for p in pkgutil.iter_modules(pipelines.__path__) if p.ispkg):
        try:
            command = importlib.import_module(f"pipelines.{package}.__main__")
        except ModuleNotFoundError:
            continue
        if hasattr(command, "HEALTH"):
            found.append(importlib.import_module(command.HEALTH))
    return found


def _requirements() -> list[tuple[str, str]]:
    """Requirements with their extra: of the checkout, else of the installed package."""
    project = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if project.is_file():
        stated = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        lines = [(line, "") for line in stated["dependencies"]]
        optional = stated["optional-dependencies"]
        return lines + [(line, extra) for extra in optional for line in optional[extra]]
    installed = metadata.metadata("gigasparse")
    extras = ["", *(installed.get_all("Provides-Extra") or [])]
    required = [Requirement(line) for line in metadata.requires("gigasparse") or []]
    return [
        (str(line), extra)
        for line in required
        for extra in extras
        if (extra != "") == ("extra" in str(line.marker))
    ]


def _problem(wanted: Requirement) -> tuple[str | None, str | None]:
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"{wanted.name} is not installed", None
    if not wanted.specifier.contains(version, prereleases=True):
        return f"{wanted.name} {version} is not {wanted.specifier}", version
    return None, version


def _try_engine(engine: Engine) -> str | None:
    """Compute attention on an engine beside the definition; the reason if it does not."""
    import torch

    from sparse_core import build_layout, sparse_attention
    from sparse_core.kernels import why_not
    from sparse_core.patterns import SlidingWindow

    device = "cuda" if engine == "triton" and torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 100, 2, 32, generator=generator).to(device) for _ in range(3))
    reason = why_not(q) if engine == "triton" else None
    if reason is not None:
        return reason
    layout = build_layout(SlidingWindow(9), 100, device=device)
    try:
        found = sparse_attention(q, k, v, layout, backend=engine)
        right = sparse_attention(q.cpu(), k.cpu(), v.cpu(), layout.to("cpu"), backend="reference")
        assert isinstance(found, torch.Tensor)
        assert isinstance(right, torch.Tensor)
    except Exception as error:  # a driver, a compiler: whatever it is, it is the finding
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    apart = float((found.cpu() - right).abs().max())
    return None if apart < 1e-3 else f"its results are {apart:.2g} from the definition"


def _room(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        return Finding("note", "disk", f"{folder} cannot be written; {free / 1e9:.0f} GB free")
    level: Level = "note" if free < _LITTLE_DISK else "ok"
    return Finding(level, "disk", f"{free / 1e9:.0f} GB free at {folder}")


def _walk(root: Path) -> tuple[list[tuple[Path, str]], list[Path]]:
    """Zarr groups with a schema, not looked into further, and what was left aside."""
    groups: list[tuple[Path, str]] = []
    leftovers: list[Path] = []
    for name, folders, files in os.walk(root):
        here = Path(name)
        leftovers += [here / entry for entry in (*folders, *files) if is_aside(here / entry)]
        folders[:] = sorted(entry for entry in folders if not is_aside(here / entry))
        if here.suffix == ".zarr" or "zarr.json" in files:
            groups.append((here, _schema(here)))
            folders.clear()
    return groups, sorted(leftovers)


def _schema(group: Path) -> str:
    try:
        content = json.loads((group / "zarr.json").read_text(encoding="utf-8"))
        return str(content["attributes"]["schema"])
    except (OSError, ValueError, KeyError, TypeError):
        return "no schema"


def _one_line(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return text if str(path) in text else f"{path}: {text}"


if __name__ == "__main__":
    raise SystemExit(main())
