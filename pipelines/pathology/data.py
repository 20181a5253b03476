"""From stored tile features to examples."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from pipelines.pathology.store import SlideFeatures, read_slide, slide_folder
from pipelines.shared.batch import Example

MEMORY_BYTES = 1 << 31
"""Features of so many bytes are kept in memory; those of more are read anew for each epoch."""


class SlideDataset(Dataset[Example]):
    """Slides as examples: inputs are tile features, coordinates the tiles' (column, row).

    Coordinates count from the slide's first tissue column and row, so that moving the tissue on the
    glass changes nothing. With `shuffle_positions` they are permuted among the tiles (an ablation:
    the tiles stay, their arrangement goes), by slide and seed.
    """

    def __init__(
        self,
        store: Path,
        slide_ids: Sequence[str],
        targets: Sequence[int] | None = None,
        groups: Sequence[str] | None = None,
        *,
        shuffle_positions: bool = False,
        seed: int = 0,
    ) -> None:
        self.store, self.slide_ids, self.targets = store, list(slide_ids), targets
        self.groups = list(groups or slide_ids)
        self.shuffle_positions, self.seed = shuffle_positions, seed
        self.lengths: list[int] = []
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        size = 0
        for index in range(len(self.slide_ids)):
            slide = self._open(index)
            self.lengths.append(len(slide))
            size += len(slide) * slide.num_features * np.dtype(np.float32).itemsize
            if size <= MEMORY_BYTES:
                self._kept[index] = slide.grid, slide.features()

    def __len__(self) -> int:
        return len(self.slide_ids)

    def __getitem__(self, index: int) -> Example:
        grid, features = self._kept.get(index) or self._read(index)
        coords = grid.astype(np.int64)
        coords -= coords.min(0)
        if self.shuffle_positions:
            coords = np.random.default_rng((self.seed, index)).permutation(coords)
        return Example(
            inputs=torch.from_numpy(np.ascontiguousarray(features, dtype=np.float32)),
            coords=torch.from_numpy(coords),
            target=None if self.targets is None else self.targets[index],
            id=self.slide_ids[index],
            group=self.groups[index],
            record=index,
        )

    def _read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        slide = self._open(index)
        return slide.grid, slide.features()

    def _open(self, index: int) -> SlideFeatures:
        return read_slide(slide_folder(self.store, self.slide_ids[index]))
