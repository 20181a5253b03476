import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.genomics.__main__ import VERBS as GENOMICS
from pipelines.pathology.__main__ import VERBS as PATHOLOGY
from pipelines.shared.cli import Verb, main
from pipelines.shared.conf_tree import conf_folder, read_root
from pipelines.shared.fit import FitSettings
from sparse_core.patterns import Pattern

ROOT = Path(__file__).resolve().parents[2]
VERBATIM = [
    "epoch=3-step=100.ckpt",
    "TCGA (2)",
    "[old]",
    "a&b",
    "it's",
    "ü",
    "a,b",
    "${x}",
    "${slides}",
    "two words ",
    "back\\slash",
    "100%",
    '"quoted"',
    "{a: b}",
    "null",
    "true",
    "007",
    "a#b;c|d*?!$HOME`x`",
    "new\nline",
    "-dash",
]

RECORDER = """
import json, sys
from pathlib import Path
from pipelines.shared.errors import InputError
from pipelines.shared.record import finish_run

calls = []

def run(config):
    calls.append(config)
    if config["window"] == 13:
        raise InputError("window 13 is unlucky")
    if config["window"] == 14:
        raise KeyboardInterrupt
    if config["window"] == 15:
        raise ZeroDivisionError
    Path(config["out"]).mkdir(parents=True, exist_ok=True)
    finish_run(Path(config["out"]), {"summary": {"auroc": config["window"] / 8, "note": "x"}})
    return 3 if config["window"] == 99 else 0
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Configurations that the fake verb was run with."""
    (tmp_path / "recorder.py").write_text(RECORDER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "recorder", raising=False)
    import recorder  # type: ignore[import-not-found]

    found: list[dict[str, Any]] = recorder.calls
    return found


def _train(*arguments: str, verb: Verb = PATHOLOGY["train"]) -> int:
    return main(
        "pathology", {"train": replace(verb, function="recorder:run")}, ["train", *arguments]
    )


def _error(capsys: pytest.CaptureFixture[str], *arguments: str, verb: Verb | None = None) -> str:
    assert _train(*arguments, verb=verb or PATHOLOGY["train"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def test_defaults_reach_the_verb_as_plain_values(calls: list[dict[str, Any]]) -> None:
    assert _train() == 0

    assert calls[0]["verb"] == "pathology_train"
    assert calls[0]["data"]["name"] == "synthetic"
    assert calls[0]["pattern"]["expression"] == "SlidingWindow(radius=2) | GlobalTokens(first=4)"
    assert type(calls[0]["optim"]) is dict
    assert type(calls[0]["baselines"]) is list


@pytest.mark.parametrize("value", VERBATIM)
def test_paths_are_taken_as_they_are(value: str, calls: list[dict[str, Any]]) -> None:
    assert _train(f"slides={value}", f"labels={value}/l.csv", f"out={value}/out") == 0

    assert calls[0]["slides"] == value
    assert calls[0]["labels"] == f"{value}/l.csv"
    assert calls[0]["out"] == f"{value}/out"


@pytest.mark.parametrize("value", VERBATIM)
def test_paths_stay_as_they_are_in_a_study(value: str, calls: list[dict[str, Any]]) -> None:
    assert _train("--multirun", "window=1,2", f"slides={value}", f"out={value}") == 0

    assert [call["slides"] for call in calls] == [value, value]
    assert [call["out"] for call in calls] == [f"{value}/window-1", f"{value}/window-2"]


@pytest.mark.parametrize("value", ["epoch=3-step=100.ckpt", "it's ${x}, [ü] (2)"])
def test_a_process_gets_paths_as_they_are(value: str) -> None:
    done = _python("-m", "pipelines.pathology", "train", "--cfg", f"slides={value}")

    assert yaml.safe_load(done.stdout)["slides"] == value


def test_a_tilde_is_the_home_folder(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/x")

    assert _train("slides=~/x", "labels=a~/x", "out=~") == 0

    assert (calls[0]["slides"], calls[0]["labels"]) == ("/home/x/x", "a~/x")


def test_a_path_below_a_choice_is_taken_as_it_is(calls: list[dict[str, Any]]) -> None:
    assert _train("encoder=torch", "encoder.factory=a.b:c", "encoder.weights=x=[1],y.pt") == 0

    assert calls[0]["encoder"]["weights"] == "x=[1],y.pt"


@pytest.mark.parametrize(
    ("verbs", "key", "choice"),
    [(PATHOLOGY, "slides", "slides"), (GENOMICS, "sequences", "sequences")],
)
def test_giving_data_chooses_its_road(
    verbs: dict[str, Verb],
    key: str,
    choice: str,
    calls: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _train(f"{key}=x", verb=verbs["train"]) == 0
    assert _train(f"{key}=x", f"data={choice}", verb=verbs["train"]) == 0

    assert [call["data"]["name"] for call in calls] == [choice, choice]
    message = _error(capsys, f"{key}=x", "data=synthetic", verb=verbs["train"])
    assert f"{key}= goes with data={choice}" in message


def test_choices_and_keys_are_overridden(calls: list[dict[str, Any]]) -> None:
    assert _train("data=synthetic_far", "pattern=bigbird", "model=base", "optim.lr=1e-4") == 0
    assert _train("experiment=far", "window=7", "baselines=[]", "optim.lr=1") == 0

    first, second = calls
    assert (first["data"]["variant"], first["model"]["depth"]) == ("far", 12)
    assert first["optim"]["lr"] == 1e-4
    assert "RandomBlocks(num_blocks=3, block=64)" in first["pattern"]["expression"]
    assert second["data"]["variant"] == "far"
    assert second["pattern"]["expression"].startswith("SlidingWindow(radius=7)")
    assert second["baselines"] == []


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "pattern.expression=SlidingWindow(left=2, right=0) | GlobalTokens(first=${registers})",
            "SlidingWindow(left=2, right=0) | GlobalTokens(first=4)",
        ),
        ("pattern.expression=['Dense()', 'Causal()']", ["Dense()", "Causal()"]),
    ],
)
def test_a_pattern_can_be_written_out(
    argument: str, expected: object, calls: list[dict[str, Any]]
) -> None:
    assert _train(argument) == 0

    assert calls[0]["pattern"]["expression"] == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pattern=bigbrd"], "did you mean bigbird?\npattern is one of: bigbird, causal, dense"),
        (
            ["model=huge"],
            "unknown model 'huge'\nmodel is one of: abmil, base, clam_sb, gated_abmil",
        ),
        (["model=null"], "unknown model 'null'"),
        (["data=sequences"], "data is one of: slides, synthetic, synthetic_bag, synthetic_far"),
        (["experiment=x"], "experiment is one of: arrangement_bag, arrangement_far"),
        (["patern=bigbird"], "unknown setting 'patern'; did you mean pattern?"),
        (["sequences=x"], "unknown setting 'sequences'"),
        (
            ["optim.lrr=1"],
            "mean optim.lr or optim or optim.final_lr?\noptim has: optim.name, optim.lr",
        ),
        (["window=x"], "window takes a whole number, such as 2; got 'x'"),
        (["window=1.5"], "window takes a whole number"),
        (["window=null"], "window takes a whole number"),
        (["tile_px=big"], "tile_px takes a whole number, such as 64"),
        (["optim.lr=fast"], "optim.lr takes a number, such as 0.002; got 'fast'"),
        (["callbacks.save_last=1"], "callbacks.save_last takes true or false"),
        (["baselines=abmil"], "baselines takes a list"),
        (["optim=adam"], "unknown optim 'adam'"),
        (["window=f("], "window=f( cannot be read"),
        (["window=${nothing}"], "nothing"),
        (["window=1,2"], "several values at once need --multirun"),
        (["pattern=dense,causal"], "several values at once need --multirun"),
        (["encoder=timm"], "encoder.model is missing: give encoder.model=..."),
        (["slides="], "slides= is empty"),
        (["slides"], "'slides' is not a setting: write KEY=VALUE"),
        (["~pattern"], "is not a setting"),
        (["--fast"], "unknown option --fast"),
        (["encoder.weights=x"], "encoder.weights= has no meaning here"),
        (["hydra.run.dir=x"], "unknown setting 'hydra.run.dir'"),
    ],
)
def test_a_wrong_setting_is_one_clear_message(
    arguments: list[str],
    words: str,
    calls: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in _error(capsys, *arguments)
    assert calls == []


def test_an_unknown_verb_lists_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("genomics", GENOMICS, ["trian"]) == 2

    assert f"use {' or '.join(GENOMICS)}; did you mean train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verbs", "words"),
    [
        (PATHOLOGY, "slides= is missing: predict needs slides=... ckpt=..."),
        (GENOMICS, "sequences= is missing: give sequences=FILE, or store=FOLDER"),
    ],
)
def test_predict_says_what_it_needs(
    verbs: dict[str, Verb], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main("x", verbs, ["predict", "ckpt=x"]) == 2

    assert words in capsys.readouterr().err


def test_exit_codes(calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert _train("window=99") == 3
    assert _train("window=13") == 2
    assert "error: window 13 is unlucky" in capsys.readouterr().err
    assert _train("window=14") == 130
    with pytest.raises(ZeroDivisionError):
        _train("window=15")


def test_argv_stays_and_no_folder_appears(
    calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    argv = ["prog", "train", "pattern=dense", "slides=a b", f"out={tmp_path}/out"]
    monkeypatch.setattr(sys, "argv", list(argv))

    assert main("pathology", {"train": replace(PATHOLOGY["train"], function="recorder:run")}) == 0

    assert sys.argv == argv
    assert calls[0]["pattern"]["expression"] == "Dense()"
    assert {path.name for path in tmp_path.iterdir()} - {"__pycache__"} == {"recorder.py", "out"}


def test_other_processes_of_a_run_print_nothing(
    calls: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "loud.py").write_text("def run(config):\n    print('loud')\n    return 0\n")
    verbs = {"train": replace(PATHOLOGY["train"], function="loud:run")}
    monkeypatch.setenv("LOCAL_RANK", "1")

    assert main("pathology", verbs, ["train"]) == 0

    assert capsys.readouterr().out == ""


def test_a_study_runs_each_combination_in_its_folder_and_compares(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    code = _train(
        "-m", "pattern=dense,sliding_window", "data=synthetic,synthetic_far", "window=2,4"
    )

    assert code == 0
    assert len(calls) == 8
    folders = [call["out"] for call in calls]
    assert folders[0] == "runs/pathology/pattern-dense_data-synthetic_window-2"
    assert len(set(folders)) == 8
    lines = capsys.readouterr().out.splitlines()[-9:]
    assert lines[0].split() == ["run", "exit", "auroc", "note"]
    assert lines[1].split() == ["pattern-dense_data-synthetic_window-2", "0", "0.25", "x"]


def test_a_study_goes_on_after_a_failed_run(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train("--multirun", "window=13,4") == 3
    assert _train("--multirun", "window=13,13") == 2

    captured = capsys.readouterr()
    assert "error: window 13 is unlucky" in captured.err
    assert re.search(r"window-13 +2 +-", captured.out)
    assert re.search(r"window-4 +0 +0.5", captured.out)


def test_a_study_sweeps_ranges_lists_and_written_patterns(calls: list[dict[str, Any]]) -> None:
    assert _train("-m", "window=range(1,3)", "baselines=[abmil],[]") == 0
    assert _train("-m", "pattern.expression=SlidingWindow(left=1, right=2)", "seed=1,2") == 0

    assert [(call["window"], call["baselines"]) for call in calls[:4]] == [
        (1, ["abmil"]),
        (1, []),
        (2, ["abmil"]),
        (2, []),
    ]
    assert calls[4]["pattern"]["expression"] == "SlidingWindow(left=1, right=2)"
    assert len({call["out"] for call in calls}) == 6


def test_a_study_on_several_devices_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "runs on one device" in _error(capsys, "-m", "window=1,2", "trainer=ddp")


def test_a_study_checks_every_name_before_it_runs_any(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "unknown pattern 'dens'" in _error(capsys, "-m", "pattern=causal,dens")
    assert calls == []


def test_cfg_prints_the_resolved_configuration(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _train("--cfg", "slides=${x}, ü", "window=9") == 0

    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["slides"], printed["tile_px"]) == ("${x}, ü", 256)
    assert printed["pattern"]["expression"].startswith("SlidingWindow(radius=9)")
    assert calls == []


@pytest.mark.parametrize("pipeline", ["pathology", "genomics"])
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["predict", "-h"]])
def test_help_is_instant_and_useful(pipeline: str, arguments: list[str]) -> None:
    done = _python("-X", "importtime", "-m", f"pipelines.{pipeline}", *arguments)

    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    heavy = {"torch", "hydra", "omegaconf", "numpy", "pandas", "lightning", "yaml"}
    assert not imported & heavy
    assert f"python -m pipelines.{pipeline}" in done.stdout
    assert "Examples" in done.stdout


def test_help_shows_settings_choices_and_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("genomics", GENOMICS, ["train", "--help"]) == 0

    text = capsys.readouterr().out
    for words in (
        "sequences=null",
        "FASTA (plain, gz, bgz), 2bit",
        "context=(by data=)",
        "pattern=window_global\n",
        "bigbird         window, registers and random blocks",
        "--multirun, -m",
    ):
        assert words in text
    assert "synthetic_far" not in text


def test_a_root_takes_the_settings_of_those_it_includes() -> None:
    own, train = read_root("pathology_crossval"), read_root("pathology_train")
    split = {item.key for item in read_root("pathology_split").settings}

    keys = {item.key: item for item in own.settings}

    assert {item.key for item in train.settings} | split < set(keys)
    assert keys["out"].default == "runs/pathology_crossval"
    assert [group.name for group in own.groups] == [group.name for group in train.groups]


def test_no_verb_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("pathology", PATHOLOGY, []) == 2

    assert "predict" in capsys.readouterr().out


VERBS = [verb for verbs in (PATHOLOGY, GENOMICS) for verb in verbs.values()]


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.config)
def test_every_setting_has_a_meaning_and_every_choice_a_summary(verb: Verb) -> None:
    root = read_root(verb.config)

    assert root.settings
    assert [item.key for item in root.settings if not item.meaning] == []
    for group in root.groups:
        assert group.options, group.name
        assert group.default is None or group.default in group.options
        assert all(group.options.values()), group.name


@pytest.mark.parametrize("verb", [PATHOLOGY["train"], GENOMICS["train"]], ids=lambda v: v.config)
def test_every_choice_composes(verb: Verb, calls: list[dict[str, Any]]) -> None:
    needs = {
        "encoder=timm": "encoder.model=x",
        "encoder=torch": "encoder.factory=a:b",
        "encoder=conch": "encoder.arguments.checkpoint_path=x",
        "encoder=huggingface": "encoder.model=x",
    }
    groups = read_root(verb.config).groups
    for turn in range(max(len(group.options) for group in groups)):
        chosen = [
            f"{group.name}={list(group.options)[turn % len(group.options)]}" for group in groups
        ]
        assert _train(*chosen, *(needs[text] for text in chosen if text in needs), verb=verb) == 0
        settings = FitSettings.from_config(calls[-1])
        assert settings.logger == calls[-1]["logger"]["name"]


def test_every_pattern_file_names_patterns_that_exist(calls: list[dict[str, Any]]) -> None:
    group = next(item for item in read_root("genomics_train").groups if item.name == "pattern")
    for option in group.options:
        assert _train(f"pattern={option}", verb=GENOMICS["train"]) == 0

    for call in calls:
        assert str(Pattern.parse(call["pattern"]["expression"]))


def test_no_setting_refers_to_a_path() -> None:
    # paths are set after interpolations are resolved
    keys = {key for verb in VERBS for key in verb.path_keys}
    for file in conf_folder().rglob("*.yaml"):
        assert not set(re.findall(r"\$\{([\w.]+)\}", file.read_text())) & keys, file


def test_path_keys_exist_in_their_root() -> None:
    for verb in VERBS:
        known = {item.key for item in read_root(verb.config).settings}
        assert {key for key in verb.path_keys if "." not in key} <= known
        assert set(verb.required) <= set(verb.path_keys)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
