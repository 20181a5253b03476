"""`predict`: inference over a folder, slide by slide, going on past the bad ones."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.pathology.cohort import load_objective
from pipelines.pathology.encoding import TileEncoder, build_encoder
from pipelines.pathology.features import expected_provenances, stream_features
from pipelines.pathology.manifest import is_table, list_slides, read_slide_table
from pipelines.pathology.model import TASK, build_network
from pipelines.pathology.progress import track
from pipelines.pathology.results import Results, Wanted
from pipelines.pathology.sequences import Predicted, predict_cases
from pipelines.pathology.slides import SlideFile
from pipelines.pathology.store import read_provenance, slide_folder
from pipelines.pathology.stored_features import STORED_ENCODER, match_stored
from pipelines.pathology.surveys import survey_folder
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.checkpoint import LoadedModel, load_model
from pipelines.shared.errors import InputError
from pipelines.shared.record import finish_run, open_run
from pipelines.shared.tables import Failure, write_failures

_VOLATILE = ("out", "num_workers", "tiles", "device", "max_tokens")
_PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16}


def predict(config: dict[str, Any]) -> int:
    """Predict every slide or patient; 0, or 3 if some failed.

    A slide goes all the way, from its file to its pictures, before the next one begins. What is
    finished stays in `slides/`, so that the same command goes on where it stopped. Raises
    InputError if nothing can be predicted.
    """
    ckpt, out = Path(config["ckpt"]), Path(config["out"])
    if not config["slides"] and not config["features"]:
        raise InputError(
            "slides= is missing: predict needs slides=... ckpt=..., or features=FOLDER with stored "
            "features instead of slides"
        )
    if config["features"] and not config["keep_features"]:
        raise InputError(
            "keep_features=false removes the features that predict makes, and features= names a "
            "store that holds others too; leave one of the two out"
        )
    for key, least in (("max_tokens", 1), ("top_tiles", 0)):
        if config[key] < least:
            raise InputError(f"{key} must be at least {least}; got {config[key]}")
    model = load_model(ckpt, task=TASK)
    if config["device"].startswith("cuda") and not torch.cuda.is_available():
        raise InputError("device=cuda: no GPU is found here; use device=cpu")
    if config["precision"] not in _PRECISIONS:
        raise InputError(f"precision is {', '.join(_PRECISIONS)}; got {config['precision']!r}")
    source = _from_slides(config, model) if config["slides"] else _from_store(config, model)
    digest = hashlib.sha256(ckpt.read_bytes()).hexdigest()
    open_run(out, {**config, "ckpt_sha256": digest}, volatile=_VOLATILE)
    failures = _run(config, model, source, out)
    return 3 if failures else 0


@dataclass(frozen=True, slots=True)
class _Source:
    """Where features come from: `stream` yields slides as they have some, or a failure.

    `patients` gives the patient of each slide, for models of patients; `provenances` what each
    slide's features are made from, which decides whether a result is still one of it. `slides` are
    the files, where there are any.
    """

    store: Path
    patients: dict[str, str]
    provenances: dict[str, dict[str, object]]
    slides: dict[str, SlideFile]
    refused: list[Failure]
    is_made: bool
    plan: TilePlan | None = None
    encoder: TileEncoder | None = None


def _run(config: dict[str, Any], model: LoadedModel, source: _Source, out: Path) -> list[Failure]:
    wanted = Wanted(
        heatmaps=config["heatmaps"],
        geojson=config["geojson"],
        tile_scores=config["tile_scores"],
        top_tiles=config["top_tiles"] if source.slides else 0,
    )
    results = Results(
        out,
        load_objective(model.metadata["task"]),  # type: ignore[arg-type]
        temperature=float(model.metadata["temperature"]),  # type: ignore[arg-type]
        by_patient=model.metadata["unit"] == "patient",
        averages=model.config.get("kind", "max") != "max",
        wanted=wanted,
        store=source.store,
        slides=source.slides,
        plan=source.plan,
    )
    cases = _cases(source, by_patient=results.by_patient)
    todo = {name: case for name, case in cases.items() if not results.has(name, case, source)}
    failures = list(source.refused)
    network = build_network(model.config)
    network.load_state_dict(model.state_dict)
    # scores of tiles take gradients, but none of weights: their inputs need not be kept
    network.requires_grad_(False)
    found = predict_cases(
        network,
        _ready(config, source, todo, failures),
        source.store,
        by_patient=results.by_patient,
        ahead=not source.is_made,
        explain=wanted.scores,
        max_tokens=config["max_tokens"],
        encoder=str(model.metadata["encoder_fingerprint"]),
        device=config["device"],
        autocast=_PRECISIONS[config["precision"]],
    )
    show = bool(config["progress"])
    for item in track(found, total=len(todo), label="predict", enabled=show):
        failure = item if isinstance(item, Failure) else results.keep(item, source)
        if failure is not None:
            failures.append(failure)
        _drop(config, source, item)
    failures = sorted(failures, key=lambda failure: failure.id)
    write_failures(out / "failures.csv", failures, id_column="slide_id")
    for failure in failures:
        print(f"failed: {failure.id}: {failure.status}: {failure.reason}; {failure.remedy}")
    count = results.write_tables([name for name in cases if results.has(name, cases[name], source)])
    unit = "patient" if results.by_patient else "slide"
    if not count:
        raise InputError(f"no {unit} could be predicted; {out / 'failures.csv'} says why of each")
    finish_run(out, {"slides": count, "failures": len(failures)})
    print(f"{count:,} {unit}s predicted: {out / 'predictions.csv'}")
    if (out / "heatmaps").is_dir():
        print(f"heatmaps: {out / 'heatmaps'}")
    if failures:
        print(f"{len(failures):,} failed: {out / 'failures.csv'}")
    return failures


def _cases(source: _Source, *, by_patient: bool) -> dict[str, tuple[str, ...]]:
    """Slides of each case by its name: a slide's id, or a patient's."""
    if not by_patient:
        return {slide_id: (slide_id,) for slide_id in source.patients}
    cases: dict[str, tuple[str, ...]] = {}
    for slide_id, patient in source.patients.items():
        cases[patient] = (*cases.get(patient, ()), slide_id)
    return cases


def _ready(
    config: dict[str, Any],
    source: _Source,
    todo: dict[str, tuple[str, ...]],
    failures: list[Failure],
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield cases as the features of all their slides are there; note the slides that have none.

    A patient of whose slides some fail is predicted by the others.
    """
    if not source.is_made:
        yield from todo.items()
        return
    assert source.plan is not None, "features are made by a plan"
    assert source.encoder is not None, "and by an encoder"
    case_of = {slide_id: name for name, case in todo.items() for slide_id in case}
    waiting = {name: set(case) for name, case in todo.items()}
    failed: set[str] = set()
    for slide_id, outcome in stream_features(
        [source.slides[slide_id] for slide_id in case_of],
        store=source.store,
        plan=source.plan,
        encoder=source.encoder,
        mpps=_mpps(config, source.slides),
        workers=config["num_workers"] or None,
        ahead=config["keep_features"],
        surveys=survey_folder(config["tiles"]),
    ):
        name = case_of[slide_id]
        waiting[name].discard(slide_id)
        if isinstance(outcome, Failure):
            failures.append(outcome)
            failed.add(slide_id)
        left = tuple(member for member in todo[name] if member not in failed)
        if not waiting[name] and left:
            yield name, left


def _drop(config: dict[str, Any], source: _Source, item: Predicted | Failure) -> None:
    """Remove the features of a predicted case, where they are not to be kept."""
    if config["keep_features"] or isinstance(item, Failure):
        return
    for slide_id in item.slides:
        shutil.rmtree(slide_folder(source.store, slide_id), ignore_errors=True)


def _from_slides(config: dict[str, Any], model: LoadedModel) -> _Source:
    """Features are to be made of slide files, as the model wants them."""
    encoder = _encoder_of(model, config)
    plan = TilePlan(**model.metadata["plan"])  # type: ignore[arg-type]
    if plan.hash != model.metadata["plan_hash"]:
        raise InputError(
            f"{config['ckpt']} was trained on tiles cut by another version; train it again"
        )
    said = {"columns": config["columns"], "where": config["where"]}
    files = list_slides(config["slides"], root=config["root"], **said)
    slides = {file.slide_id: file for file in files}
    provenances = expected_provenances(
        files,
        plan=plan,
        encoder=encoder,
        mpps=_mpps(config, slides),
        surveys=survey_folder(config["tiles"]),
    )
    store = Path(config["features"] or Path(config["out"]) / "features")
    patients, refused = _patients(config, model, list(slides))
    return _Source(store, patients, provenances, slides, refused, True, plan, encoder)


def _from_store(config: dict[str, Any], model: LoadedModel) -> _Source:
    """Take stored slides whose features fit the model; the others are refused."""
    store = Path(config["features"])
    fitting, others = match_stored(store, model.metadata)
    patients, refused = _patients(config, model, fitting)
    weights = str(model.metadata["encoder_fingerprint"])
    provenances = {
        slide_id: read_provenance(slide_folder(store, slide_id), weights) or {}
        for slide_id in patients
    }
    return _Source(store, patients, provenances, {}, [*others, *refused], False)


def _patients(
    config: dict[str, Any], model: LoadedModel, slide_ids: list[str]
) -> tuple[dict[str, str], list[Failure]]:
    """Patient of each slide, itself for a model of slides; slides without one are refused."""
    if model.metadata["unit"] != "patient":
        return {slide_id: slide_id for slide_id in slide_ids}, []
    given = config["patients"] or config["slides"]
    if not given or not is_table(Path(given)):
        raise InputError(
            f"{config['ckpt']} was trained on patients (unit=patient): say whose the slides are by "
            "patients=TABLE with slide_id and patient_id"
        )
    table = read_slide_table(Path(given), columns=config["columns"])
    if "patient_id" not in table:
        raise InputError(
            f"{given} has no column 'patient_id'; say which it is by columns.patient_id="
        )
    known = dict(zip(table["slide_id"], table["patient_id"], strict=True))
    missing = [slide_id for slide_id in slide_ids if not known.get(slide_id)]
    remedy = f"add a row with its slide_id and patient_id to {given}"
    refused = [
        Failure(name, str(given), "no_patient", "nobody says whose it is", remedy)
        for name in missing
    ]
    return {name: known[name] for name in slide_ids if known.get(name)}, refused


def _mpps(config: dict[str, Any], slides: dict[str, SlideFile]) -> dict[str, float]:
    """Micrometres per pixel by slide, of a table or of `slide_mpp`."""
    found = {name: file.mpp or config["slide_mpp"] for name, file in slides.items()}
    return {name: float(mpp) for name, mpp in found.items() if mpp is not None}


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
