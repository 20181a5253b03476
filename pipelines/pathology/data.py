"""From stored tile features to examples."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from pipelines.pathology.store import SlideFeatures, read_slide, slide_folder
from pipelines.shared.batch import Example, Target
from pipelines.shared.errors import InputError

MEMORY_BYTES = 1 << 31
"""Features of so many bytes are kept in memory; those of more are read anew for each epoch."""

SLIDE_GAP = 1 << 20
"""Between the third coordinates of a patient's slides: more than any window reaches."""

MAX_SLIDES = 1 << 10
"""Of one patient: coordinates stay below 2**30."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What training changes of each slide, anew in each epoch; the tiles' features stay.

    `dihedral` turns and mirrors the grid (one of 8 ways), `translate` moves it by up to so many
    tiles on either axis, `drop_tiles` is the share of tiles that are left out at random.
    """

    dihedral: bool = False
    translate: int = 0
    drop_tiles: float = 0.0

    def __post_init__(self) -> None:
        if self.translate < 0:
            raise InputError(f"augment.translate must not be negative; got {self.translate}")
        if not 0 <= self.drop_tiles < 1:
            raise InputError(f"augment.drop_tiles must lie in [0, 1); got {self.drop_tiles}")

    def move(self, grid: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Turn, mirror and shift cells int64 [N, 2]; they count from 0 before the shift."""
        if self.dihedral:
            swap, *mirror = rng.integers(2, size=3)
            grid = (grid[:, ::-1] if swap else grid) * np.where(mirror, -1, 1)
        grid = grid - grid.min(0)
        return grid + rng.integers(self.translate + 1, size=2) if self.translate else grid

    def keep(self, count: int, rng: np.random.Generator) -> np.ndarray | None:
        """Choose the tiles that stay, bool [N], at least one; None for all."""
        if not self.drop_tiles:
            return None
        kept = rng.random(count) >= self.drop_tiles
        kept[rng.integers(count)] = True
        return kept


class SlideDataset(Dataset[Example]):
    """Slides, or patients with several of them, as examples: inputs are tile features.

    A case is a slide's id, or a tuple of the ids of a patient's slides. Coordinates are the tiles'
    (column, row), counted from the slide's first tissue column and row, so that moving the tissue
    on the glass changes nothing. With tuples there is a third: `SLIDE_GAP` times the slide's number
    among the patient's. An example's id is that of the slide, or all of them with `;` between.

    With `shuffle_positions` they are permuted among the tiles of a slide (an ablation: the tiles
    stay, their arrangement goes), by case and seed. `memory_bytes` bounds the features that are
    held, by default `MEMORY_BYTES`. `augment` needs `set_epoch` before each epoch. `encoder` (its
    name or fingerprint) says whose features, where slides have those of several.
    """

    def __init__(
        self,
        store: Path,
        cases: Sequence[str] | Sequence[tuple[str, ...]],
        targets: Sequence[Target] | None = None,
        groups: Sequence[str] | None = None,
        *,
        shuffle_positions: bool = False,
        augment: Augmentation | None = None,
        seed: int = 0,
        memory_bytes: int | None = None,
        encoder: str | None = None,
    ) -> None:
        self.store, self.targets, self.encoder = store, targets, encoder
        self.by_patient = bool(cases) and not isinstance(cases[0], str)
        self.cases = [(case,) if isinstance(case, str) else tuple(case) for case in cases]
        self.ids = [";".join(case) for case in self.cases]
        self.groups = list(groups or self.ids)
        self.shuffle_positions, self.augment, self.seed = shuffle_positions, augment, seed
        self.epoch = 0
        self.lengths: list[int] = []
        self._kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        size = 0
        for case in self.cases:
            if len(case) > MAX_SLIDES:
                raise InputError(f"a patient has {len(case)} slides ({case[0]}, ...), above 1,024")
            slides = [self._open(slide_id) for slide_id in case]
            self.lengths.append(sum(map(len, slides)))
            for slide in slides:
                size += len(slide) * slide.num_features * np.dtype(np.float32).itemsize
                if size <= (MEMORY_BYTES if memory_bytes is None else memory_bytes):
                    self._kept[slide.slide_id] = slide.grid, slide.features()

    def __len__(self) -> int:
        return len(self.cases)

    def plain(self) -> "SlideDataset":
        """Return the same slides as they are, without augmentation."""
        same = copy.copy(self)
        same.augment = None
        return same

    def set_epoch(self, epoch: int) -> None:
        """Choose what `augment` draws."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> Example:
        draw = (self.seed, index) if self.augment is None else (self.seed, index, self.epoch + 1)
        rng = np.random.default_rng(draw)
        parts = [self._load(slide_id, rng) for slide_id in self.cases[index]]
        coords = [coords for coords, _ in parts]
        if self.by_patient:
            coords = [
                np.pad(xy, [(0, 0), (0, 1)], constant_values=number * SLIDE_GAP)
                for number, xy in enumerate(coords)
            ]
        features = _join([features for _, features in parts])
        return Example(
            inputs=torch.from_numpy(features),
            coords=torch.from_numpy(np.concatenate(coords)),
            target=None if self.targets is None else self.targets[index],
            id=self.ids[index],
            group=self.groups[index],
            record=index,
        )

    def _load(self, slide_id: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        grid, features = self._kept.get(slide_id) or self._read(slide_id)
        coords = grid.astype(np.int64)
        if self.shuffle_positions:
            coords = rng.permutation(coords)
        if self.augment is None:
            return coords - coords.min(0), features
        kept = self.augment.keep(len(coords), rng)
        coords = self.augment.move(coords, rng)
        return (coords, features) if kept is None else (coords[kept], features[kept])

    def _read(self, slide_id: str) -> tuple[np.ndarray, np.ndarray]:
        slide = self._open(slide_id)
        return slide.grid, slide.features()

    def _open(self, slide_id: str) -> SlideFeatures:
        return read_slide(slide_folder(self.store, slide_id), self.encoder)


def _join(parts: list[np.ndarray]) -> np.ndarray:
    """Join rows without copying those of a single slide, which may be gigabytes."""
    if len(parts) == 1 and parts[0].flags.writeable:
        return np.ascontiguousarray(parts[0])
    return np.concatenate(parts)
