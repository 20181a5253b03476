"""What a user may hand over by mistake, through the command line: exit code and words.

A row is (name, input, arguments, exit code, words). The input is a function of the test's folder
that returns the path it made, or the name of a real genome file. In the arguments `{input}` stands
for its path, `{folder}` for the test's folder (`out={folder}/out` is added where no out= is given,
`store=` for ingest) and `{data}` for the folder of real genomes (alone: they are needed). The words
must stand in what the command says, or in the failures.csv that it wrote; a command that fails says
one message and no traceback.
"""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.genomics.__main__ import main

Row = tuple[str, Callable[[Path], Path] | str, list[str], int, list[str]]


def rows_of(module: str, name: str) -> list[Row]:
    rows: list[Row] = runpy.run_path(str(Path(__file__).with_name(module)))[name]
    return rows


def is_real(row: Row) -> bool:
    return isinstance(row[1], str) or any("{data}" in argument for argument in row[2])


ROWS = [
    *rows_of("bad_sequences.py", "ROWS_B"),
    *rows_of("bad_coordinates.py", "ROWS_C"),
    *rows_of("bad_splits.py", "ROWS_D"),
]


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row[0], marks=[pytest.mark.real_data] * is_real(row)) for row in ROWS],
)
def test_bad_input_is_named(
    row: Row,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, source, arguments, code, words = row
    places = {"folder": str(tmp_path)}
    if is_real(row):
        places["data"] = str(request.getfixturevalue("real_data") / "genomes")
    made = Path(places["data"]) / source if isinstance(source, str) else source(tmp_path)
    places["input"] = str(made)
    given = [fill(argument, places) for argument in arguments if argument != "{data}"]
    key = "store" if given[0] == "ingest" else "out"
    if not any(argument.startswith(f"{key}=") for argument in given):
        given.append(f"{key}={tmp_path / 'out'}")
    capsys.readouterr()

    assert main(given) == code

    shown = capsys.readouterr()
    failures = tmp_path / "out" / "failures.csv"
    said = shown.err + shown.out + (failures.read_text() if failures.exists() else "")
    assert shown.err.startswith("error: ") == (code == 2), shown.err
    assert "Traceback" not in said
    for word in words:
        assert fill(word, places) in said


def fill(text: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def test_the_checklist_is_long_and_its_names_differ() -> None:
    names = [row[0] for row in ROWS]
    real = [row for row in ROWS if is_real(row)]
    assert len(set(names)) == len(names) >= 60
    assert len(real) >= 15
