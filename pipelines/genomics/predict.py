"""`predict`: sequences and a model to one row per record, in input order."""

from pathlib import Path
from typing import Any

import torch

from pipelines.genomics.data import WindowDataset
from pipelines.genomics.ingest import provide_store, require_input
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.train import TASK, record_probabilities
from pipelines.shared.checkpoint import load_model
from pipelines.shared.errors import InputError
from pipelines.shared.inference import predict as run
from pipelines.shared.record import RunState, finish_run, make_folder, open_run
from pipelines.shared.study import probability_table
from pipelines.shared.tables import write_table


def predict(config: dict[str, Any]) -> int:
    """Predict every record; returns 0."""
    require_input(config)
    model = load_model(Path(config["ckpt"]), task=TASK)
    if config["device"].startswith("cuda") and not torch.cuda.is_available():
        raise InputError("device=cuda: no GPU is found here; use device=cpu")
    network = DnaClassifier(**model.config)  # type: ignore[arg-type]
    network.load_state_dict(model.state_dict)
    out = Path(config["out"])
    make_folder(out)
    store = provide_store(config, out)
    record = {**config, "data": store.fingerprint}
    if open_run(out, record) is RunState.FINISHED:
        print(f"{out / 'predictions.tsv'} is there already; give another out= to predict again")
        return 0
    windows = WindowDataset(
        store,
        range(len(store)),
        context=model.metadata["context"],  # type: ignore[arg-type]
        overlap=model.metadata["overlap"],  # type: ignore[arg-type]
    )
    print(f"{len(store):,} records, {sum(store.lengths):,} bases, {len(windows):,} windows")
    predictions = run(network, windows, max_tokens=config["max_tokens"], device=config["device"])
    records, probabilities = record_probabilities(predictions)
    classes: list[str] = model.metadata["classes"]  # type: ignore[assignment]
    ids = [store.ids[i] for i in records]
    table = probability_table(ids, probabilities, classes, id_column="id")
    table["num_windows"] = [int((windows.records == i).sum()) for i in records]
    write_table(out / "predictions.tsv", table)
    finish_run(out, {"records": len(store), "windows": len(windows)})
    print(f"predictions  {out / 'predictions.tsv'}")
    return 0
