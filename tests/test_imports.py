"""Who may import whom (the arrows of the architecture), read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = [
    path for name in ("sparse_core", "pipelines") for path in sorted((ROOT / name).rglob("*.py"))
]

# (files below, must not import, but for these files)
FORBIDDEN = [
    ("pipelines/pathology", "pipelines.genomics", ()),
    ("pipelines/genomics", "pipelines.pathology", ()),
    ("pipelines/shared", "pipelines.pathology", ()),
    ("pipelines/shared", "pipelines.genomics", ()),
    *(("sparse_core", name, ()) for name in ("pipelines", "lightning", "hydra", "omegaconf")),
    ("sparse_core/kernels", "sparse_core.reference", ()),
    ("sparse_core/reference.py", "sparse_core.kernels", ()),
    *(("", name, ()) for name in ("tests", "conftest")),
    ("", "triton", ("sparse_core/kernels",)),
    ("", "hydra", ("pipelines/shared/cli.py", "pipelines/shared/fit.py")),
    ("", "omegaconf", ("pipelines/shared/cli.py", "pipelines/shared/fit.py")),
    ("", "openslide", ("pipelines/pathology",)),
    ("", "tifffile", ("pipelines/pathology",)),
    ("", "Bio", ("pipelines/genomics",)),
    ("", "pysam", ("pipelines/genomics",)),
]

# what makes `--help` wait
HEAVY = ("torch", "lightning", "hydra", "omegaconf", "numpy", "pandas", "zarr", "matplotlib")


@pytest.mark.parametrize(("below", "module", "allowed"), FORBIDDEN)
def test_forbidden_arrow_is_absent(below: str, module: str, allowed: tuple[str, ...]) -> None:
    found = [
        f"{_name(path)}:{line} imports {imported}"
        for path in FILES
        if _is_below(_name(path), below) and not any(_is_below(_name(path), a) for a in allowed)
        for line, imported in _imports(path)
        if imported == module or imported.startswith(f"{module}.")
    ]
    assert not found, "\n".join(found)


def test_command_lines_import_nothing_heavy_at_the_start() -> None:
    starts = [path for path in FILES if path.name == "__main__.py" and "pipelines" in _name(path)]
    light = [
        *starts,
        *(ROOT / "pipelines/shared" / n for n in ("cli.py", "conf_tree.py", "errors.py")),
    ]
    found = [
        f"{_name(path)} imports {imported}"
        for path in light
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        for _, imported in _named(path, node)
        if imported.split(".")[0] in HEAVY
    ]
    assert starts
    assert not found, "\n".join(found)


def test_the_walk_sees_relative_and_nested_imports(tmp_path: Path) -> None:
    file = tmp_path / "sample.py"
    file.write_text("def f():\n    import torch.nn\n    from lightning import Trainer\n")

    assert [name for _, name in _imports(file)] == ["torch.nn", "lightning", "lightning.Trainer"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _is_below(name: str, folder: str) -> bool:
    return not folder or name == folder or name.startswith(f"{folder}/")


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        yield from _named(path, node)


def _named(path: Path, node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield what an import statement may load: the module, and each name as a submodule."""
    if isinstance(node, ast.Import):
        yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        parents = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
        module = ".".join([*parents, *([node.module] if node.module else [])])
        yield node.lineno, module
        yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
