"""Which slides there are: from a folder, one file, or a table in the words of other tools.

A table names its columns slide_id, path, mpp, patient_id, label and split, or other names that
`columns` gives. The tables of CLAM, STAMP, TRIDENT, slide2vec and GigaPath are known by a column
that only they have, and what was taken for what is printed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from pipelines.pathology.slides import (
    IMAGE_ENDINGS,
    SLIDE_ENDINGS,
    SlideFile,
    find_slides,
    walk_slides,
)
from pipelines.shared.errors import InputError
from pipelines.shared.tables import keep_rows, read_labels, read_table, require_unique

ROLES = ("slide_id", "path", "mpp", "patient_id", "label", "split", "time", "event")
"""What a table says of a slide; its columns have these names unless others are given."""

KNOWN_TABLES: dict[str, dict[str, str]] = {
    "TRIDENT": {"path": "wsi"},
    "slide2vec": {"path": "image_path", "slide_id": "sample_id", "mpp": "spacing_at_level_0"},
    "STAMP": {"path": "FILENAME", "patient_id": "PATIENT"},
    "STAMP (clini)": {"patient_id": "PATIENT"},
    "CLAM": {"patient_id": "case_id"},
    "GigaPath": {"patient_id": "pat_id"},
}
"""Columns of other tools by what they mean here; the first one tells the tool."""

TABLE_ENDINGS = (".csv", ".tsv", ".xlsx", ".csv.gz", ".tsv.gz")
_SLIDES = SLIDE_ENDINGS | IMAGE_ENDINGS
_FEATURE_ENDINGS = (".h5", ".pt")  # tables of features name these in place of the slides


def list_slides(
    source: str | Path,
    *,
    root: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
) -> list[SlideFile]:
    """List the slides of a folder, of a table, or one slide, ordered by slide id.

    Relative paths in a table start from `root`, by default from the table's folder. Where a table
    names no slide files but ids or files of features, its slides are looked for in `root` by their
    names. Raises InputError for a table without paths, an id that stands twice, and a resolution
    that is no positive number; a file that is not there fails later, as one slide among others.
    """
    source = Path(source)
    if not is_table(source):
        if where:
            raise InputError(
                f"where.{next(iter(where))}= chooses rows of a table; {source} is none"
            )
        single = source.is_file() and source.suffix.lower() in _SLIDES
        return [SlideFile(source.stem, source)] if single else find_slides(source)
    table = read_slide_table(source, columns=columns, where=where)
    folder = source.parent if root is None else Path(root)
    if root is None:
        _check_paths(source, table)
    found = {} if root is None else _slides_by_name(folder, table)
    slides = [
        SlideFile(
            row["slide_id"],
            found.get(row["slide_id"]) or _locate(folder / row["path"]),
            given_mpp(source, number, row),
        )
        for number, row in zip(table.index, table.to_dict("records"), strict=True)
    ]
    return sorted(slides, key=lambda slide: slide.slide_id)


def is_table(path: Path) -> bool:
    """Tell a table from a folder or a slide by its name."""
    return path.name.lower().endswith(TABLE_ENDINGS) and not path.is_dir()


def read_slide_table(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
) -> pd.DataFrame:
    """Read a table of slides: slide_id and path, and of mpp, patient_id, label, split what it has.

    All values are strings; the index (`row`) is the line in the file. Where the table has no ids,
    a slide's is its file's name without the ending; where it has no paths, its ids stand for them.
    """
    table = read_table(path)
    names = map_columns(path, table.columns, columns)
    table = keep_rows(path, table, where or {})
    found = pd.DataFrame({role: table[name] for role, name in names.items()}, index=table.index)
    if "path" not in found and "slide_id" not in found:
        raise InputError(
            f"{path} has no column 'path' and no column 'slide_id'; it has "
            f"{', '.join(map(repr, table.columns))}; say which it is with columns.path=NAME"
        )
    if "path" not in found:
        found["path"] = found["slide_id"]
    empty = found.index[found["path"] == ""].tolist()
    if empty:
        raise InputError(f"{path}, row {empty[0]}: path is empty; fill it or drop the row")
    ids = found["slide_id"] if "slide_id" in found else found["path"].map(lambda p: Path(p).name)
    found["slide_id"] = ids.map(strip_ending)
    require_unique(path, found, "slide_id")
    return found[[role for role in ROLES if role in found]]


def read_slide_labels(
    path: Path,
    *,
    slides: Path | None = None,
    columns: Mapping[str, str] | None = None,
    where: Mapping[str, object] | None = None,
    truth: Sequence[str] = ("label",),
    classes: bool = True,
) -> pd.DataFrame:
    """Read a table of labels: slide_id, label, patient_id (the id where there is none).

    Also split and mpp if it has them. `truth` are the roles that are to be learned, without
    `classes` numbers. A table of patients without slide ids is joined with
    `slides`, a table that says whose the slides are. Raises InputError as `read_labels` does.
    """
    table = read_table(path)
    names = map_columns(path, table.columns, columns)
    known = [names.get(role, role) for role in truth]
    said: dict[str, Any] = {
        "label_column": known[0] if classes else None,
        "numbers": () if classes else known,
    }
    if "slide_id" not in names and "patient_id" in names and slides is not None:
        return _join_patients(path, names, read_slide_table(slides), where, said)
    mapped = [name for role, name in (columns or {}).items() if name != role]
    labels = read_labels(
        path,
        id_column=names.get("slide_id", "slide_id"),
        **said,
        group_column=names.get("patient_id", "patient_id"),
        split_column=names.get("split"),
        required=mapped,
        where=where,
        remedy=f"say which it is with columns.slide_id=NAME and columns.{truth[0]}=NAME",
    )
    labels = labels.rename(columns={name: role for role, name in names.items()})
    if "mpp" in names:
        labels["mpp"] = table[names["mpp"]].reindex(labels.index)
    labels["slide_id"] = labels["slide_id"].map(strip_ending)
    require_unique(path, labels, "slide_id")
    return labels


def _join_patients(
    path: Path,
    names: Mapping[str, str],
    slides: pd.DataFrame,
    where: Mapping[str, object] | None,
    said: Mapping[str, Any],
) -> pd.DataFrame:
    """Give every slide its patient's label."""
    if "patient_id" not in slides:
        raise InputError(f"{path} labels patients, and the table of slides does not name them")
    patients = read_labels(
        path,
        id_column=names["patient_id"],
        **said,
        split_column=names.get("split"),
        where=where,
        remedy="say which it is with columns.label=NAME",
    ).rename(columns={name: role for role, name in names.items()})
    joined = slides.drop(columns=["label", "split", "time", "event"], errors="ignore").reset_index()
    joined = joined.merge(patients, on="patient_id", how="inner").set_index("row")
    if joined.empty:
        raise InputError(
            f"{path}: no patient of it has a slide; it names {patients['patient_id'].iloc[0]!r}, "
            f"the table of slides {slides['patient_id'].iloc[0]!r}"
        )
    return joined.drop(columns="path")


def map_columns(
    path: Path, present: Sequence[str], columns: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Find the table's column for each role that it has, and print what is not called so.

    What `columns` gives must be there (InputError); then the role's own name; then a known tool's.
    """
    chosen = {role: name for role, name in (columns or {}).items() if name != role}
    for role, name in chosen.items():
        if name not in present:
            raise InputError(
                f"{path} has no column {name!r} for columns.{role}={name}; "
                f"it has {', '.join(map(repr, present))}"
            )
    twice = [role for role, name in chosen.items() if list(chosen.values()).count(name) > 1]
    if twice:
        which = " and ".join(f"columns.{role}" for role in twice[:2])
        raise InputError(f"{path}: {which} are both {chosen[twice[0]]!r}; a column says one thing")
    taken = set(chosen.values())
    names = {r: r for r in ROLES if r in present and r not in taken} | chosen
    for tool, known in KNOWN_TABLES.items():
        if next(iter(known.values())) not in present:
            continue
        guessed = {r: n for r, n in known.items() if n in present and r not in names}
        names |= guessed
        if guessed:
            shown = ", ".join(f"{role} from {name!r}" for role, name in guessed.items())
            print(f"{path}: a table as of {tool}: {shown}")
    return {role: names[role] for role in ROLES if role in names}


def given_mpp(path: Path, number: int, row: Mapping[str, str]) -> float | None:
    """Micrometres per pixel in a row of a table, None where it says nothing; else InputError."""
    text = row.get("mpp", "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise InputError(f"{path}, row {number}: mpp must be a positive number; got {text!r}")
    return value


def strip_ending(name: str) -> str:
    """Drop the ending of a slide's or a feature file's name; other dots are part of the id."""
    suffix = Path(name).suffix.lower()
    return name[: -len(suffix)] if suffix in _SLIDES or suffix in _FEATURE_ENDINGS else name


def _check_paths(source: Path, table: pd.DataFrame) -> None:
    """Refuse a table of ids or of files of features where no folder of slides is given."""
    for row, path in table["path"].items():
        here = source.parent / path
        if here.suffix.lower() not in _SLIDES and not here.exists():
            raise InputError(
                f"{source}, row {row}: {path!r} is no slide's file; say which column holds the "
                "paths with columns.path=NAME, or give root=FOLDER with the slides of these names"
            )


def _slides_by_name(folder: Path, table: pd.DataFrame) -> dict[str, Path]:
    """Slides in a folder by id, if some row of a table does not name a slide's file."""
    if all(Path(path).suffix.lower() in _SLIDES for path in table["path"]):
        return {}
    return {slide.slide_id: slide.path for slide in find_slides(folder)}


def _locate(path: Path) -> Path:
    """A folder stands for the slide in it (a DICOM series); anything else for itself."""
    inside = list(walk_slides(path)) if path.is_dir() else []
    return inside[0].path if len(inside) == 1 else path
