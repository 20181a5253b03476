"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests compute on small tensors: threads would only wait for each other


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real slides and genomes; skips where it is absent."""
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("GIGASPARSE_REAL_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set GIGASPARSE_REAL_DATA")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest in one piece, so that no process waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")
