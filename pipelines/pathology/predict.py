"""`predict`: batch inference over a folder of slides, going on past the bad ones."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from pipelines.pathology.data import SlideDataset
from pipelines.pathology.encoding import TileEncoder, build_encoder
from pipelines.pathology.features import extract_features
from pipelines.pathology.manifest import list_slides
from pipelines.pathology.model import SlideClassifier
from pipelines.pathology.progress import track
from pipelines.pathology.store import read_provenance, slide_folder
from pipelines.pathology.stored_features import STORED_ENCODER, have_overviews, match_stored
from pipelines.pathology.study import TASK
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.checkpoint import LoadedModel, load_model
from pipelines.shared.errors import InputError
from pipelines.shared.inference import Prediction
from pipelines.shared.inference import predict as run
from pipelines.shared.record import finish_run, open_run
from pipelines.shared.study import probability_table
from pipelines.shared.tables import Failure, write_failures, write_table

_VOLATILE = ("out", "num_workers", "device")


def predict(config: dict[str, Any]) -> int:
    """Predict every slide of the folder; 0, or 3 if some failed.

    Results of finished slides are kept in `slides/`, so that the same command goes on where it
    stopped. Raises InputError if no slide can be predicted.
    """
    ckpt, out = Path(config["ckpt"]), Path(config["out"])
    if not config["slides"] and not config["features"]:
        raise InputError(
            "slides= is missing: predict needs slides=... ckpt=..., or features=FOLDER with stored "
            "features instead of slides"
        )
    model = load_model(ckpt, task=TASK)
    if config["device"].startswith("cuda") and not torch.cuda.is_available():
        raise InputError("device=cuda: no GPU is found here; use device=cpu")
    digest = hashlib.sha256(ckpt.read_bytes()).hexdigest()
    record = {**config, "ckpt_sha256": digest}
    store = Path(config["features"] or out / "features")
    done, failures = (_extract if config["slides"] else _find)(config, record, model, store)
    write_failures(out / "failures.csv", failures, id_column="slide_id")
    for failure in failures:
        print(f"failed: {failure.id}: {failure.status}: {failure.reason}; {failure.remedy}")
    if not done:
        raise InputError(f"no slide could be predicted; {out / 'failures.csv'} says why of each")
    classes: list[str] = model.metadata["classes"]  # type: ignore[assignment]
    results = _predict_slides(config, model, store, done, classes, out)
    table = probability_table(
        [slide_id for slide_id, _ in results],
        torch.tensor([logits for _, logits in results], dtype=torch.float64).softmax(-1).numpy(),
        classes,
        id_column="slide_id",
    )
    write_table(out / "predictions.csv", table)
    finish_run(out, {"slides": len(results), "failures": len(failures)})
    print(f"{len(results):,} slides predicted: {out / 'predictions.csv'}")
    if (out / "heatmaps").is_dir():
        print(f"heatmaps: {out / 'heatmaps'}")
    if failures:
        print(f"{len(failures):,} slides failed: {out / 'failures.csv'}")
    return 3 if failures else 0


def _extract(
    config: dict[str, Any], record: dict[str, Any], model: LoadedModel, store: Path
) -> tuple[list[str], list[Failure]]:
    """Make the features of all slides as the model wants them: ids and failures."""
    encoder = _encoder_of(model, config)
    plan = TilePlan(**model.metadata["plan"])  # type: ignore[arg-type]
    if plan.hash != model.metadata["plan_hash"]:
        raise InputError(
            f"{config['ckpt']} was trained on tiles cut by another version; train it again"
        )
    files = list_slides(
        config["slides"], root=config["root"], columns=config["columns"], where=config["where"]
    )
    open_run(Path(config["out"]), record, volatile=_VOLATILE)
    mpps = {file.slide_id: file.mpp or config["slide_mpp"] for file in files}
    report = extract_features(
        files,
        store=store,
        plan=plan,
        encoder=encoder,
        mpps={slide_id: float(mpp) for slide_id, mpp in mpps.items() if mpp is not None},
        workers=config["num_workers"] or None,
    )
    return report.done, report.failures


def _find(
    config: dict[str, Any], record: dict[str, Any], model: LoadedModel, store: Path
) -> tuple[list[str], list[Failure]]:
    """List the stored slides whose features fit the model, and those that do not."""
    done, failures = match_stored(store, model.metadata)
    open_run(Path(config["out"]), record, volatile=_VOLATILE)
    return done, failures


def _encoder_of(model: LoadedModel, config: dict[str, Any]) -> TileEncoder:
    """Make the encoder that the model was trained with; refuse any other weights."""
    settings: dict[str, Any] = model.metadata["encoder"]  # type: ignore[assignment]
    if settings["name"] == STORED_ENCODER:
        raise InputError(
            f"{config['ckpt']} was trained on stored features of {settings['of']!r}; give such "
            "features of your slides by features=FOLDER, without slides="
        )
    if settings["name"] == "torch" and config["encoder_factory"] != settings["factory"]:
        raise InputError(
            f"the model's tile encoder runs your code {settings['factory']!r}; allow it by "
            f"encoder_factory={settings['factory']}"
        )
    encoder = build_encoder(**settings)
    if encoder.fingerprint != model.metadata["encoder_fingerprint"]:
        raise InputError(
            f"{config['ckpt']} was trained on features of other weights than encoder "
            f"{settings['name']!r} has here; put the same weights in place"
        )
    return encoder


def _predict_slides(
    config: dict[str, Any],
    model: LoadedModel,
    store: Path,
    slide_ids: list[str],
    classes: list[str],
    out: Path,
) -> list[tuple[str, list[float]]]:
    """Predict what has no result yet; return all results in the folder's order."""
    network = SlideClassifier(**model.config)  # type: ignore[arg-type]
    network.load_state_dict(model.state_dict)
    todo = [slide_id for slide_id in slide_ids if not _is_done(out, store, slide_id)]
    data = SlideDataset(store, todo)
    predictions = run(network, data, max_tokens=config["max_tokens"], device=config["device"])
    for prediction in track(predictions, total=len(todo), label="predict", enabled=True):
        if config["heatmaps"] and have_overviews(store, [prediction.id]):
            path = out / "heatmaps" / f"{prediction.id}.png"
            draw_heatmap(path, store, prediction, classes)
        _keep(out, store, prediction)
    return [
        (slide_id, json.loads(_result_file(out, slide_id).read_text(encoding="utf-8"))["logits"])
        for slide_id in slide_ids
    ]


def _result_file(out: Path, slide_id: str) -> Path:
    return out / "slides" / f"{slide_id}.json"


def _is_done(out: Path, store: Path, slide_id: str) -> bool:
    """Tell whether a slide has a result, made from the features that it has now."""
    path = _result_file(out, slide_id)
    if not path.exists():
        return False
    result = json.loads(path.read_text(encoding="utf-8"))
    return bool(result["provenance"] == read_provenance(slide_folder(store, slide_id)))


def _keep(out: Path, store: Path, prediction: Prediction) -> None:
    path = _result_file(out, prediction.id)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    result = {
        "logits": prediction.logits.tolist(),
        "provenance": read_provenance(slide_folder(store, prediction.id)),
    }
    aside.write_text(json.dumps(result), encoding="utf-8")
    os.replace(aside, path)
