"""Records in memory that answer as a sequence store does, for tests that read many small ones."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.genomics.alphabet import encode


class MemoryStore:
    """Records as text; lower case is soft-masked."""

    def __init__(self, records: dict[str, str], *, circular: tuple[str, ...] = ()) -> None:
        self.path = Path("memory")
        self.ids = tuple(records)
        self.descriptions = ("",) * len(records)
        self.lengths = np.array([len(text) for text in records.values()], dtype=np.int64)
        self.circular = np.array([name in circular for name in records])
        self._text = list(records.values())
        self._bases = [encode(text) for text in self._text]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, record: int, start: int = 0, end: int | None = None) -> np.ndarray:
        end = len(self._bases[record]) if end is None else end
        assert 0 <= start <= end <= len(self._bases[record])
        return self._bases[record][start:end].copy()

    def mask(self, record: int, start: int = 0, end: int | None = None) -> np.ndarray:
        return np.array([sign.islower() for sign in self._text[record][start:end]], dtype=bool)


@pytest.fixture(scope="session")
def memory_store() -> Callable[..., MemoryStore]:
    """Make a store of records in memory: `memory_store({"chr1": "ACGT"}, circular=("chr1",))`."""
    return MemoryStore
