"""The record of a run: its configuration, versions and metrics, and whether it may go on."""

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from pipelines.shared.asides import aside_of, clean
from pipelines.shared.errors import InputError

# what may change between two starts of one run: where it is, how it is shown and read
VOLATILE = ("out", "logger", "trainer.progress", "num_workers", "callbacks.save_seconds")

_PACKAGES = (
    "gigasparse", "torch", "triton", "lightning", "hydra-core", "numpy", "zarr", "pandas",
    "scikit-learn", "scipy", "openslide-python", "openslide-bin", "biopython", "timm",
)  # fmt: skip


class RunState(Enum):
    """What `open_run` found in the output folder."""

    NEW = "new"
    RESUMED = "resumed"
    FINISHED = "finished"


def open_run(
    out: Path, config: Mapping[str, object], *, volatile: Sequence[str] = VOLATILE
) -> RunState:
    """Begin or go on with the run in `out`; write `config.yaml` and `versions.json`.

    Raises InputError when `out` is or passes through a file, cannot be written, or holds a run with
    another configuration; keys in `volatile` (and below them) may differ.
    """
    make_folder(out)
    try:
        clean(out)
        state = _compare(out, config, volatile)
        if state is not RunState.FINISHED and is_main_process():
            _write(out / "versions.json", json.dumps(_versions(), indent=2))
            _write(out / "config.yaml", _to_yaml(config))
    except OSError as error:
        raise _cannot_write(out, error) from error
    return state


def make_folder(out: Path) -> None:
    """Make the output folder; raises InputError where there cannot be one."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"out={out} is a file, or lies in one; give a folder") from error
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(out: Path, error: OSError) -> InputError:
    return InputError(f"out={out} cannot be written ({error.strerror}); give another folder")


def finish_run(out: Path, metrics: Mapping[str, object]) -> None:
    """Write `metrics.json`, which marks the run as finished; undefined numbers become null."""
    if is_main_process():
        _write(out / "metrics.json", json.dumps(_without_nan(metrics), indent=2, allow_nan=False))


def read_metrics(out: Path) -> dict[str, object]:
    """Return the metrics of a finished run."""
    metrics: dict[str, object] = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return metrics


def is_main_process() -> bool:
    """Tell whether this is the process that writes: the first of a distributed run, or the only."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) == 0


def _compare(out: Path, config: Mapping[str, object], volatile: Sequence[str]) -> RunState:
    stored = out / "config.yaml"
    if not stored.exists():
        return RunState.NEW
    before = dict(_flatten(_from_yaml(stored)))
    now = dict(_flatten(config))
    if before.get("verb") != now.get("verb"):
        raise InputError(
            f"{out} holds a run of {before.get('verb')}, not of {now.get('verb')}; "
            "give another out="
        )
    differing = [
        f"  {key}: {_shown(before, key)} -> {_shown(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if _shown(before, key) != _shown(now, key) and not _is_below(key, volatile)
    ]
    if differing:
        raise InputError(
            f"{out} holds a run with another configuration (there -> now):\n"
            + "\n".join(differing)
            + "\ngive these values to go on with it, another out=, or delete the folder"
        )
    return RunState.FINISHED if (out / "metrics.json").exists() else RunState.RESUMED


def _from_yaml(path: Path) -> Mapping[str, object]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged; delete the folder or give another out=") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no configuration of a run; give another out=")
    return content


def _to_yaml(config: Mapping[str, object]) -> str:
    text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return text


def _flatten(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(config: Mapping[str, object], key: str) -> str:
    return json.dumps(config[key], ensure_ascii=False) if key in config else "(absent)"


def _is_below(key: str, roots: Sequence[str]) -> bool:
    return any(key == root or key.startswith(f"{root}.") for root in roots)


def _write(path: Path, text: str) -> None:
    aside = aside_of(path)
    aside.write_text(text.rstrip() + "\n", encoding="utf-8")
    os.replace(aside, path)


def _without_nan(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _versions() -> dict[str, object]:
    return {
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name)) is not None},
        "git": _git_revision(Path(__file__).resolve().parents[2]),
        "platform": platform.platform(),
        "device": _gpus() or platform.processor() or platform.machine(),
    }


def _gpus() -> list[str]:
    """Names of the GPUs; none for a run that did without torch, which takes seconds to import."""
    torch = sys.modules.get("torch")
    if torch is None:
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision(folder: Path) -> dict[str, object] | None:
    """Return revision and whether files differ from it; None outside a checkout or without git."""
    if not (folder / ".git").exists():
        return None
    revision = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    if revision is None or status is None:
        return None
    return {"revision": revision, "dirty": bool(status)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
