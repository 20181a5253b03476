"""Which tile sizes, warps and stages a kernel runs with.

A choice depends on the kernel, the dtype's class, the head dimension, the kind of the layout and
whether its lists are short or long, never on the number of tokens. Choices come from, in this
order: `forced` (tests, tuning), the file that `python -m sparse_core.tune` writes for this GPU and
these versions, and the table below, made on an H200 with Triton 3.6.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import triton
from torch import Tensor

from sparse_core.layout import BlockLayout
from sparse_core.schedule import Launch, Side

Kernel = Literal["forward", "query", "key"]
KERNELS: tuple[Kernel, ...] = ("forward", "query", "key")
SIDE_OF: dict[Kernel, Side] = {"forward": "queries", "query": "queries", "key": "keys"}
HEAD_DIMS = (32, 64, 128, 256)
"""Head dimensions are rounded up to one of these."""
LONG = 4096
"""Tokens of the other side from which on a list is long."""


@dataclass(frozen=True, slots=True)
class Config:
    """Rows of the own tile, columns of the others', and how Triton runs the loop.

    `max_registers` a thread lets more programs share a multiprocessor; 0 sets no limit.
    """

    block_own: int
    block_other: int
    num_warps: int
    num_stages: int
    max_registers: int = 0


@dataclass(frozen=True, slots=True)
class Key:
    """What a choice depends on.

    `dtype` is half, ieee or tf32; `kind` is "affine" (full blocks in runs), "listed" (blocks by
    index, or several parts), "grid" (coordinates of several axes, where most pairs of blocks need a
    mask), "small" (blocks of fewer than 64 tokens) or "bits" (masks as bits).
    """

    kernel: Kernel
    dtype: str
    head_dim: int
    kind: str
    length: str

    def __str__(self) -> str:
        return f"{self.kernel}/{self.dtype}/{self.head_dim}/{self.kind}/{self.length}"


def key_of(kernel: Kernel, q: Tensor, launch: Launch, layout: BlockLayout, precision: str) -> Key:
    """Describe a launch; asks the host only."""
    side = SIDE_OF[kernel]
    parts = [layout.parts[number] for number in launch.part_numbers]
    own = getattr(parts[0], side)
    tokens = 0
    for part in parts:
        other = part.keys if side == "queries" else part.queries
        tokens += part.num_blocks * other.size
    if own.size < 64:
        kind = "small"
    elif any(not part.program for part in parts):
        kind = "bits"
    elif layout.query_coords.shape[1] > 1:
        kind = "grid"
    else:
        kind = "affine" if launch.affine == (True,) else "listed"
    length = "long" if tokens >= LONG * max(len(own), 1) * layout.num_groups else "short"
    dtype = precision if q.dtype == torch.float32 else "half"
    head_dim = next(d for d in HEAD_DIMS if q.shape[-1] <= d)
    return Key(kernel, dtype, head_dim, kind, length)


def choose(key: Key, device: torch.device) -> Config:
    """Choose the configuration of a launch."""
    if key.kernel in _FORCED:
        return _FORCED[key.kernel]
    if device.type == "cuda":
        found = load(cache_path(device)).get(str(key))
        if found is not None:
            return found
    return default(key)


def default(key: Key) -> Config:
    """Read the shipped table: the entry of the key's kind and length, its kind, or any."""
    table = DEFAULTS[key.kernel, key.dtype, key.head_dim]
    names = (f"{key.kind}/{key.length}", key.kind, "any")
    return next(table[name] for name in names if name in table)


_FORCED: dict[Kernel, Config] = {}


@contextmanager
def forced(configs: dict[Kernel, Config]) -> Iterator[None]:
    """Run the named kernels with these configurations."""
    before = dict(_FORCED)
    _FORCED.update(configs)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


def state() -> tuple[object, ...]:
    """What choices depend on besides their arguments: changes when they may."""
    return _GENERATION[0], *_FORCED.items()


_GENERATION = [0]
"""Counts the files of choices written by this process."""


def cache_path(device: torch.device | None = None) -> Path:
    """File of the choices tuned on this GPU, in GIGASPARSE_CACHE or the user's cache folder."""
    folder = os.environ.get("GIGASPARSE_CACHE")
    if folder is None:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        folder = str(Path(base) / "gigasparse")
    name = torch.cuda.get_device_name(device).replace(" ", "_")
    return Path(folder) / f"tuning_{name}_triton{triton.__version__}.json"


@cache
def load(path: Path) -> dict[str, Config]:
    """Read tuned choices; none if there is no file."""
    if not path.exists():
        return {}
    read = json.loads(path.read_text(encoding="utf-8"))
    return {key: Config(**values) for key, values in read["choices"].items()}


def save(path: Path, choices: dict[str, Config]) -> None:
    """Write tuned choices beside those of earlier runs."""
    merged = {**load(path), **choices}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {
        "triton": triton.__version__,
        "ptxas": ptxas_version(),
        "choices": {key: asdict(config) for key, config in sorted(merged.items())},
    }
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    load.cache_clear()
    _GENERATION[0] += 1


def ptxas_version() -> str:
    """Version of the ptxas that Triton uses; some versions miscompile for sm_90."""
    path = os.environ.get("TRITON_PTXAS_PATH")
    if path is None:
        path = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas")
    found = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
    return next(word[1:] for word in found.stdout.split() if word.startswith("V"))


Table = dict[tuple[str, str, int], dict[str, Config]]


def _any(*values: int) -> dict[str, Config]:
    return {"any": Config(*values)}


_SMALL = Config(64, 32, 4, 3, 128)
_SMALL_128 = Config(64, 32, 4, 3)

DEFAULTS: Table = {
    ("forward", "half", 32): _any(64, 64, 4, 2, 128),
    ("forward", "half", 64): {"small": _SMALL, "any": Config(64, 64, 4, 2, 128)},
    ("forward", "half", 128): {"small": Config(64, 64, 4, 2), "any": Config(64, 64, 4, 3)},
    ("forward", "half", 256): _any(64, 32, 4, 2),
    ("query", "half", 32): _any(64, 32, 4, 3, 128),
    ("query", "half", 64): {
        "affine": Config(64, 64, 4, 3, 168),
        "small": _SMALL,
        "any": Config(64, 64, 4, 2, 168),
    },
    ("query", "half", 128): {"small": _SMALL_128, "any": Config(64, 64, 4, 2)},
    ("query", "half", 256): _any(64, 32, 4, 1),
    ("key", "half", 32): _any(64, 32, 4, 3, 128),
    ("key", "half", 64): {
        "grid": Config(64, 64, 4, 2),
        "small": _SMALL,
        "any": Config(64, 64, 4, 3, 168),
    },
    ("key", "half", 128): {"small": _SMALL_128, "any": Config(64, 64, 4, 2)},
    ("key", "half", 256): _any(64, 32, 8, 1),
    ("forward", "ieee", 32): _any(32, 32, 4, 2),
    ("forward", "ieee", 64): _any(32, 32, 4, 2),
    ("forward", "ieee", 128): _any(32, 32, 4, 1),
    ("forward", "ieee", 256): _any(32, 16, 4, 1),
    ("query", "ieee", 32): _any(32, 32, 4, 1),
    ("query", "ieee", 64): _any(32, 32, 4, 1),
    ("query", "ieee", 128): _any(32, 16, 4, 1),
    ("query", "ieee", 256): _any(16, 16, 4, 1),
    ("key", "ieee", 32): _any(32, 32, 4, 1),
    ("key", "ieee", 64): _any(32, 32, 4, 1),
    ("key", "ieee", 128): _any(32, 16, 4, 1),
    ("key", "ieee", 256): _any(16, 16, 4, 1),
    ("forward", "tf32", 32): _any(64, 32, 4, 2),
    ("forward", "tf32", 64): _any(64, 32, 4, 2),
    ("forward", "tf32", 128): _any(64, 32, 4, 1),
    ("forward", "tf32", 256): _any(32, 32, 4, 1),
    ("query", "tf32", 32): _any(64, 32, 4, 1),
    ("query", "tf32", 64): _any(64, 32, 4, 1),
    ("query", "tf32", 128): _any(32, 32, 4, 1),
    ("query", "tf32", 256): _any(32, 16, 4, 1),
    ("key", "tf32", 32): _any(64, 32, 4, 1),
    ("key", "tf32", 64): _any(64, 32, 4, 1),
    ("key", "tf32", 128): _any(32, 32, 4, 1),
    ("key", "tf32", 256): _any(32, 16, 4, 1),
}
"""Choices by (kernel, dtype, head dimension), then by "kind/length", kind, or "any"."""

_HALF: dict[Kernel, tuple[Config, ...]] = {
    "forward": (Config(64, 64, 4, 2, 128), Config(64, 64, 4, 3, 128)),
    "query": (Config(64, 64, 4, 2, 168), Config(64, 64, 4, 3, 168)),
    "key": (Config(64, 64, 4, 3, 168), Config(64, 64, 4, 2)),
}
_HALF_128: dict[Kernel, tuple[Config, ...]] = {
    "forward": (Config(64, 64, 4, 2), Config(64, 64, 4, 3)),
    "query": (Config(64, 64, 4, 2),),
    "key": (Config(64, 64, 4, 2),),
}
_HALF_256: dict[Kernel, tuple[Config, ...]] = {
    "forward": (Config(64, 32, 4, 2), Config(64, 64, 8, 2)),
    "query": (Config(64, 32, 4, 1), Config(64, 32, 8, 2)),
    "key": (Config(64, 32, 8, 1), Config(64, 16, 8, 2)),
}
_SINGLE: tuple[Config, ...] = (Config(32, 32, 4, 1), Config(32, 16, 4, 1))
_SINGLE_256: tuple[Config, ...] = (Config(16, 16, 4, 1), Config(32, 16, 8, 1))


def candidates(
    kernel: Kernel, dtype: str, head_dim: int, kind: str | None = None
) -> tuple[Config, ...]:
    """List what may be chosen for a kind, or for any: the shipped choices and others worth a trial.

    Few, since compiling them is most of tuning's time; what else was tried stands in the README.
    """
    shipped = DEFAULTS[kernel, dtype, head_dim]
    if kind is not None:
        shipped = {name: c for name, c in shipped.items() if name.split("/")[0] in (kind, "any")}
    more: tuple[Config, ...]
    if kind == "small" and kind in shipped:
        more = ()
    elif dtype == "half":
        more = {128: _HALF_128, 256: _HALF_256}.get(head_dim, _HALF)[kernel]
    else:
        more = _SINGLE if head_dim < 256 else _SINGLE_256
    return tuple(dict.fromkeys([*shipped.values(), *more]))
