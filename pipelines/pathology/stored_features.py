"""Stored features that are used as they are: of which encoder and which tiles they must be."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from pipelines.pathology.store import list_slides, read_index, read_slide, slide_folder
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure

STORED_ENCODER = "stored"
"""Name in a model file of the encoder that nobody can call: its features come from elsewhere."""


@dataclass(frozen=True, slots=True)
class FeatureSource:
    """Where a model's features are, and what others must be to fit it.

    `dim` is E, `tiles` says for people how tiles were cut, `metadata` is for the model file:
    encoder, encoder_fingerprint, plan, plan_hash.
    """

    store: Path
    dim: int
    tiles: str
    metadata: dict[str, object]


def find_source(store: Path, slide_ids: Iterable[str], encoder: str | None = None) -> FeatureSource:
    """Say what a store's features of these slides are.

    `encoder` names one where slides have features of several. Raises InputError where it is open
    which are meant, a slide has none of it, or not all are of one way to cut tiles.
    """
    wanted = set(slide_ids)
    index = read_index(store)
    rows = index[index["slide_id"].isin(wanted)]
    if encoder is not None:
        rows = rows[rows["encoder"] == encoder]
        missing = sorted(wanted - set(rows["slide_id"]))
        if missing:
            raise InputError(
                f"{store} holds no features of encoder {encoder} of {missing[0]!r} "
                f"({len(missing):,} slides in all); it has {_names(index)}"
            )
    elif rows["slide_id"].duplicated().any():
        raise InputError(
            f"{store} holds features of several encoders ({_names(rows)}); choose one by "
            "stored_encoder=NAME"
        )
    first = rows.iloc[0]
    for column, title in (
        ("encoder_fingerprint", "of another encoder"),
        ("num_features", "of another length"),
        ("plan_hash", "of tiles that were cut in another way"),
    ):
        others = rows[rows[column] != first[column]]
        if len(others):
            raise InputError(
                f"{store}: features of {others.iloc[0]['slide_id']!r} are {title} than those of "
                f"{first['slide_id']!r} ({_of(others.iloc[0])}, not {_of(first)}); keep one kind "
                "in a folder"
            )
    noted = read_slide(slide_folder(store, first["slide_id"])).attributes
    metadata = {
        "encoder": {"name": STORED_ENCODER, "of": first["encoder"]},
        "encoder_fingerprint": first["encoder_fingerprint"],
        "plan": noted.get("plan", {}),
        "plan_hash": first["plan_hash"],
    }
    return FeatureSource(store, int(first["num_features"]), f"({_of(first)})", metadata)


def match_stored(store: Path, metadata: dict[str, object]) -> tuple[list[str], list[Failure]]:
    """List the slides of a store that fit a model's metadata, and those that do not."""
    fitting, failures = [], []
    keys = ["encoder_fingerprint", "plan_hash"]
    for slide_id, rows in read_index(store).groupby("slide_id"):
        if [metadata[key] for key in keys] in rows[keys].to_numpy().tolist():
            fitting.append(str(slide_id))
            continue
        held = " and of ".join(_of(row) for _, row in rows.iterrows())
        reason = f"features of {held}, the model knows {_known(metadata)}"
        remedy = "make or import them with the encoder and tiles that the model was trained on"
        folder = str(slide_folder(store, str(slide_id)))
        failures.append(Failure(str(slide_id), folder, "other_features", reason, remedy))
    return fitting, failures


def read_contents(store: Path) -> dict[str, str]:
    """Digest of each stored slide's content: copies have equal ones. Empty for an empty store."""
    if not store.is_dir() or not list_slides(store):
        return {}
    index = read_index(store)
    return dict(zip(index["slide_id"], index["digest"], strict=True))


def have_overviews(store: Path, slide_ids: Iterable[str]) -> bool:
    """Tell whether all slides have a picture and a tissue mask; imported ones have none."""
    return all(read_slide(slide_folder(store, name)).has_overview for name in slide_ids)


def _names(index: pd.DataFrame) -> str:
    return ", ".join(sorted(index["encoder"].unique()))


def _of(row: "pd.Series[str]") -> str:
    made = f"{row['encoder_fingerprint']}, {row['num_features']} numbers"
    return f"encoder {row['encoder']} ({made}), tiles {row['plan_hash']}"


def _known(metadata: dict[str, object]) -> str:
    settings = metadata["encoder"]
    assert isinstance(settings, dict), "a model file holds its encoder's settings"
    name = settings.get("of", settings["name"])
    return f"encoder {name} ({metadata['encoder_fingerprint']}), tiles {metadata['plan_hash']}"
