"""The classic multiple-instance sets, five times in ten folds: attention pooling and our encoder.

    python -m tests.benchmarks.mil_sets --data FOLDER [--sets musk1 ...] [--models abmil ...]

FOLDER holds musk1.csv and elephant.csv (label, bag, features) and the folders musk2_original and
fox_original (X.mat, Bag2.mat: the bag of each row, BagI.mat: the label of each bag). Protocol of
Ilse et al. (ICML 2018, section 4.1): folds drawn anew in each repeat, features standardised by the
training bags, a fixed number of epochs of which the last counts, threshold 0.5. No setting was
chosen on these folds: pooling models take what was published for these sets (`PUBLISHED_OPTIM`),
our encoder the defaults of `conf/optim/adamw.yaml`, 40 epochs, eight bags a step. Networks train
through `pipelines.shared.fit`. Results go to OUT line by line, and a second call goes on there.
"""

import argparse
import json
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.io import loadmat
from sklearn.model_selection import StratifiedKFold
from torch import nn

from pipelines.pathology.model import SlideClassifier
from pipelines.pathology.pooling import PoolingClassifier
from pipelines.shared.batch import Example, ExampleList
from pipelines.shared.fit import FitSettings, fit, seed_everything
from pipelines.shared.inference import predict
from pipelines.shared.objective import Classification
from pipelines.shared.optim import OptimSettings

PUBLISHED = {"musk1": (0.892, 0.040), "musk2": (0.858, 0.048), "fox": (0.615, 0.043),
             "elephant": (0.868, 0.022)}  # fmt: skip
"""Accuracy of attention pooling and its standard error (Ilse et al. 2018, table 1)."""

PUBLISHED_OPTIM = {"musk1": (5e-4, 0.005), "musk2": (5e-4, 0.03), "fox": (1e-4, 0.01),
                   "elephant": (1e-4, 0.005)}  # fmt: skip
"""Learning rate and weight decay of SGD with Nesterov's momentum 0.9, one bag a step, 50 epochs.

As Wang et al. (Pattern Recognition 2018) published them with their code, for networks of the same
layers; Ilse et al. follow their protocol. Weights begin as there (Glorot and Bengio 2010).
"""

MODELS = ("abmil", "gated_abmil", "mean", "encoder")
FOLDS = 10


def read_bags(folder: Path, name: str) -> list[tuple[np.ndarray, int]]:
    """Features [N, F] and label of each bag."""
    if (folder / f"{name}.csv").exists():
        table = pd.read_csv(folder / f"{name}.csv", header=None)
        label, bag, features = table[0], table[1], table.iloc[:, 2:].to_numpy(np.float32)
    else:
        files = {part: loadmat(folder / f"{name}_original" / f"{part}.mat") for part in
                 ("X", "Bag2", "BagI")}  # fmt: skip
        bag = pd.Series(files["Bag2"]["Bag2"].ravel().astype(int))
        labels = files["BagI"]["bagI"].ravel() == 1
        label, features = bag.map(lambda number: int(labels[number - 1])), files["X"]["X"]
    features = np.asarray(features, np.float32)
    keys = bag.to_numpy()
    return [(features[keys == key], int(label[keys == key].max())) for key in np.unique(keys)]


def build(model: str, num_features: int) -> nn.Module:
    """Attention pooling as of the paper's appendix (256, 128, 64), or two layers of ours."""
    if model == "encoder":
        return SlideClassifier(
            num_features=num_features, dim=64, depth=2, num_heads=4, pattern="Dense()",
            dropout=0.2, num_classes=2,
        )  # fmt: skip
    network = PoolingClassifier(
        kind=model, num_features=num_features, num_classes=2, hidden=[256, 128, 64],
        attention_dim=64, dropout=0.5,
    )  # fmt: skip
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return network


def examples(bags: list[tuple[np.ndarray, int]]) -> ExampleList:
    """Bags as examples, all tiles at one place: no positions."""
    return ExampleList(
        [
            Example(
                torch.from_numpy(x), torch.zeros(len(x), 2, dtype=torch.int64), y, f"b{i}",
                f"b{i}", i,
            )
            for i, (x, y) in enumerate(bags)
        ]
    )  # fmt: skip


def settings_of(name: str, model: str, seed: int) -> FitSettings:
    """How a network of this set is trained."""
    if model == "encoder":
        epochs, batch, clip = 40, 8, 1.0
        optim = OptimSettings(lr=2e-3, weight_decay=0.01)
    else:
        epochs, batch, clip = 50, 1, None
        lr, decay = PUBLISHED_OPTIM[name]
        optim = OptimSettings(
            name="sgd", lr=lr, weight_decay=decay, momentum=0.9, warmup=0.0, final_lr=1.0
        )
    return FitSettings(
        epochs=epochs, max_tokens=100_000, batch_size=batch, seed=seed, select="last",
        save_last=False, progress=False, gradient_clip=clip, optim=optim,
    )  # fmt: skip


def run_repeat(folder: Path, name: str, model: str, repeat: int) -> dict:
    """Accuracy of each fold of one repeat."""
    torch.set_num_threads(1)
    bags = read_bags(folder, name)
    labels = np.array([label for _, label in bags])
    splitter = StratifiedKFold(FOLDS, shuffle=True, random_state=repeat)
    accuracies = []
    for fold, (train, test) in enumerate(splitter.split(labels, labels)):
        settings = settings_of(name, model, 100 * repeat + fold)
        seed_everything(settings.seed)
        network = build(model, bags[0][0].shape[1])
        given = examples([bags[index] for index in train])
        network.stem.standardise(torch.cat([example.inputs for example in given]))
        # validation decides nothing (the last epoch counts): one training bag stands for it
        fit(network, given, given[:1], objective=Classification(("0", "1")), out=Path("unused"),
            settings=settings)  # fmt: skip
        tested = examples([bags[index] for index in test])
        found = predict(network, tested, max_tokens=100_000)
        hits = [int(p.probabilities[1] >= 0.5) == e.target
                for p, e in zip(found, tested, strict=True)]  # fmt: skip
        accuracies.append(float(np.mean(hits)))
    return {"set": name, "model": model, "repeat": repeat, "accuracies": accuracies}


def jobs_of(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """What has no line in OUT yet; every set has a repeat before any has another."""
    done = {(row["set"], row["model"], row["repeat"]) for row in read_rows(arguments.out)}
    for model in arguments.models:
        for repeat in range(arguments.repeats):
            for name in arguments.sets:
                if (name, model, repeat) not in done:
                    yield name, model, repeat


def read_rows(path: Path) -> list[dict]:
    """Lines of results."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def table(rows: list[dict]) -> str:
    """Mean accuracy, its standard error over repeats, spread over folds, beside the paper's."""
    lines = [
        "| set | model | accuracy | standard error | repeats | folds' spread | published, ABMIL |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    found = pd.DataFrame(rows)
    for (name, model), group in found.groupby(["set", "model"]):
        means = group["accuracies"].map(np.mean)
        error = f"{means.std() / np.sqrt(len(means)):.3f}" if len(means) > 1 else "-"
        spread = np.std(np.concatenate(group["accuracies"].tolist()))
        value, half = PUBLISHED[name]
        lines.append(
            f"| {name} | {model} | {means.mean():.3f} | {error} | {len(means)} | "
            f"{spread:.3f} | {value:.3f} +- {half:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/mil_sets.jsonl"))
    parser.add_argument("--sets", nargs="+", default=list(PUBLISHED), choices=list(PUBLISHED))
    parser.add_argument("--models", nargs="+", default=["abmil", "encoder"], choices=MODELS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", module="lightning")
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_repeat, arguments.data, *job) for job in jobs_of(arguments)]
        for future in as_completed(futures):
            row = future.result()
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row["set"], row["model"], row["repeat"], np.mean(row["accuracies"]), flush=True)
    print(table(read_rows(arguments.out)))


if __name__ == "__main__":
    main()
