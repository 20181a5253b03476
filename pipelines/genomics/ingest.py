"""`ingest`: sequences of any format into the store that everything else reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.genomics.store import SequenceStore, ingest
from pipelines.shared.errors import InputError


def require_input(config: Mapping[str, Any]) -> None:
    """Raise InputError where neither `sequences` nor `store` is given."""
    if config["sequences"] is None and config["store"] is None:
        raise InputError("sequences= is missing: give sequences=FILE, or store=FOLDER of ingest")


def provide_store(
    config: Mapping[str, Any], out: Path, *, require_labels: bool = False
) -> SequenceStore:
    """Return the store that a verb works on, made first where it is missing.

    `sequences` is ingested into `store`, or into OUT/store; `store` alone is taken as it is.
    Raises InputError for what `ingest` refuses.
    """
    if config["sequences"] is None:
        store = SequenceStore(config["store"])
    else:
        store = ingest(Path(config["sequences"]), Path(config["store"] or out / "store"))
    if require_labels:
        store.label_table()
    return store
