"""Folders of sequences, as benchmarks hand them out: a file for each split, or one for each text.

train.csv dev.csv test.csv         tables (GUE), in any format that a file of sequences may have
train.fna test.fna                 FASTA (Nucleotide Transformer): the label ends each header
train/CLASS/*.txt test/CLASS/*.txt one sequence a file (Genomic Benchmarks)
"""

from dataclasses import dataclass
from pathlib import Path

from pipelines.genomics.sequence_tables import SPLIT_NAMES, normal_split
from pipelines.shared.errors import InputError


@dataclass(frozen=True, slots=True)
class Part:
    """One file of a folder, and what its place says of its records."""

    path: Path
    split: str | None = None
    label: str | None = None
    """Of texts that are one sequence each."""
    id: str | None = None


def list_parts(folder: Path) -> list[Part]:
    """List the files of a folder, train before val before test, and by name within.

    Raises InputError for a folder in none of the layouts, and for a split that stands twice.
    """
    if (folder / "zarr.json").exists():
        raise InputError(f"{folder} is a store, not sequences; give it as store={folder}")
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    splits = {entry: normal_split(entry.name.split(".", 1)[0]) for entry in entries}
    named = sorted((e for e in entries if splits[e]), key=lambda e: _ORDER.index(str(splits[e])))
    folders = [entry for entry in named if entry.is_dir()]
    files = [entry for entry in named if entry.is_file()]
    if bool(folders) == bool(files):
        shown = ", ".join(entry.name for entry in entries[:8]) or "nothing"
        raise InputError(
            f"{folder} holds {shown}; a folder of sequences holds a file for each split "
            f"({', '.join(SPLIT_NAMES)}), or folders train/CLASS/*.txt; else give one file"
        )
    found = [splits[entry] for entry in named]
    if twice := [split for split in found if found.count(split) > 1]:
        names = [entry.name for entry in named if splits[entry] == twice[0]]
        raise InputError(f"{folder} holds the split {twice[0]} twice: {' and '.join(names)}")
    if files:
        return [Part(file, splits[file]) for file in files]
    return [part for entry in folders for part in _texts(entry, str(splits[entry]))]


def _texts(folder: Path, split: str) -> list[Part]:
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    parts = [
        Part(text, split, group.name, f"{split}/{group.name}/{text.stem}")
        for group in classes
        for text in sorted(group.glob("*.txt"))
    ]
    if not parts:
        raise InputError(f"{folder} holds no CLASS/*.txt: a folder for each class, a text for each "
                         "sequence in it")  # fmt: skip
    return parts


_ORDER = ("train", "val", "test")
