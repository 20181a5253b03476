"""Classes of vertebrates by windows of their mitochondrial genomes: what length is worth.

    python -m tests.benchmarks.vertebrate_windows POOL.fasta.gz LABELS.tsv.gz --out DIR
        [--lengths 512 ... 0] [--seeds 0 1 2] [--windows 8] [--bases 150e6] [--jobs 1]
        [OVERRIDE ...]

POOL and LABELS are those of MLDSP (Randhawa et al., BMC Genomics 2019); of its task `Vertebrates`,
records are split once (`split`, stratified, 10 % validate, 20 % test). For each length, a window at
a random place is cut from every held-out record, `--windows` of them from every training record;
0 stands for whole genomes. On these, `train experiment=vertebrates` trains the network, once with
each seed, for as many epochs as hold about `--bases` bases, and 4-mer logistic regression, once, on
the same windows. So many `--jobs` run side by side. OVERRIDE are further settings of `train`, such
as trainer=cpu or pretrained=FILE. Runs that are finished are not run again.
"""

import argparse
import gzip
import itertools
import json
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from pipelines.genomics.alphabet import decode
from pipelines.genomics.genome import read_records
from tests.benchmarks.processes import run_verb

LENGTHS = (512, 1_024, 2_048, 4_096, 8_192, 0)
LONGEST = 32_768
TOKENS, FEWEST = 65_536, 8
"""Bases of a step, and the least number of windows."""
COLUMNS = ["record_id", "task", "class", "split", "group", "length"]


def main() -> int:
    """Cut, train, print a table; 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pool", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bases", type=float, default=150e6)
    parser.add_argument("--jobs", type=int, default=1)
    given, overrides = parser.parse_known_args()
    if given.jobs < 1:
        parser.error(f"--jobs is 1 or more; got {given.jobs}")
    split = _split(given.pool, given.labels, given.out / "split")
    folders = {length: given.out / str(length or "whole") for length in given.lengths}
    for length, folder in folders.items():
        if not (folder / "windows.tsv").exists():
            _cut(given.pool, split, length, given.windows, folder)
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {}
        for seed, (length, folder) in itertools.product(given.seeds, folders.items()):
            # the regression has no seed: one run has it
            own = [] if seed == given.seeds[0] else ["baselines=[]"]
            runs[length, seed] = pool.submit(
                _train, folder, length, seed, given.bases, [*overrides, *own]
            )
        print("| bases | ours | balanced | 4-mer regression | balanced |\n|--:|--:|--:|--:|--:|")
        for length in given.lengths:
            found = [runs[length, seed].result() for seed in given.seeds]
            print(_line(length, [scores for scores in found if scores is not None]), flush=True)
    return int(any(run.result() is None for run in runs.values()))


def _split(pool: Path, labels: Path, out: Path) -> pd.DataFrame:
    """Split the records of the task: id, label, split."""
    if not (out / "splits.tsv").exists():
        columns = ["columns.id=record_id", "columns.label=class", "where.task=Vertebrates"]
        shares = ["by=record", "val_fraction=0.1", "test_fraction=0.2", "seed=0"]
        given = f"sequences={pool}", f"labels={labels}", f"out={out}"
        if run_verb("split", *given, *columns, *shares):
            raise SystemExit("without a split of the records nothing is trained")
    return pd.read_csv(out / "splits.tsv", sep="\t").set_index("id")


def _cut(pool: Path, split: pd.DataFrame, length: int, windows: int, folder: Path) -> None:
    """Write windows.fa.gz, a store of them, and windows.tsv; the table last: it stands for all."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    with gzip.open(folder / "windows.fa.gz", "wt", compresslevel=1) as file:
        for name, text in _windows(pool, split, length, windows):
            record = name.rsplit(".", 1)[0]
            known = split.loc[record]
            rows.append((name, "Vertebrates", known["label"], known["split"], record, len(text)))
            file.write(f">{name}\n{text}\n")
    if run_verb("ingest", f"sequences={folder / 'windows.fa.gz'}", f"store={folder / 'store'}"):
        raise SystemExit("without a store of the windows nothing is trained")
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(folder / "windows.tsv", sep="\t", index=False)


def _windows(
    pool: Path, split: pd.DataFrame, length: int, windows: int
) -> Iterator[tuple[str, str]]:
    places = {name: row for row, name in enumerate(split.index)}
    for record in read_records(pool):
        if record.id not in places:
            continue
        tokens = record.tokens
        size = min(length or tokens.size, tokens.size)
        count = windows if length and split.loc[record.id, "split"] == "train" else 1
        generator = np.random.default_rng((places[record.id], length))
        for number, first in enumerate(generator.integers(0, tokens.size - size + 1, count)):
            yield f"{record.id}.{number}", decode(tokens[first : first + size])


def _train(folder: Path, length: int, seed: int, bases: float, overrides: list[str]) -> dict | None:
    """Train with one seed; the scores of both models, None if it failed."""
    out = folder / f"seed_{seed}"
    if not (out / "metrics.json").exists():
        context = length or LONGEST
        table = pd.read_csv(folder / "windows.tsv", sep="\t")
        epochs = max(1, round(bases / table["length"][table["split"] == "train"].sum()))
        settings = [
            "experiment=vertebrates",
            f"sequences={folder / 'windows.fa.gz'}", f"labels={folder / 'windows.tsv'}",
            f"store={folder / 'store'}", f"context={context}", "overlap=allow", "leaks=false",
            f"batch_size={max(FEWEST, TOKENS // context)}", f"epochs={epochs}",
            f"seed={seed}", f"out={out}",
        ]  # fmt: skip
        if run_verb("train", *settings, *overrides):
            return None
    scores: dict = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["scores"]
    return scores


def _line(length: int, found: list[dict]) -> str:
    cells = [f"{length:,}" if length else "whole"]
    for model in ("model", "kmer"):
        for score in ("accuracy", "balanced_accuracy"):
            values = [scores[model][score]["value"] for scores in found if model in scores]
            spread = f" +- {statistics.stdev(values):.3f}" if len(set(values)) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
