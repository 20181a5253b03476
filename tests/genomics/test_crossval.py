"""The verbs crossval and evaluate, through the command line, on small records."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import matthews_corrcoef, roc_auc_score

from pipelines.genomics.__main__ import main

SMALL = ["model.dim=16", "model.depth=1", "model.num_heads=2", "logger=none",
         "trainer.progress=false"]  # fmt: skip
QUICK = ["epochs=1", "resamples=30", *SMALL]
LETTERS = np.array(list("ACGT"))


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 records of 80 bases, rich in G and C or not; 10 of test are copied from train."""
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    rows = []
    for number in range(120):
        label = number % 2
        share = [0.35, 0.15, 0.15, 0.35] if label else [0.15, 0.35, 0.35, 0.15]
        split = "train" if number < 60 else "val" if number < 80 else "test"
        text = "".join(rng.choice(LETTERS, 80, p=share))
        rows.append((f"r{number}", text, "low" if label else "high", split))
    for number in range(80, 90):
        rows[number] = (rows[number][0], rows[number - 80][1], *rows[number][2:])
    table = pd.DataFrame(rows, columns=["id", "sequence", "label", "split"])
    table["site"] = np.where(np.arange(120) % 3 == 0, "north", "south")
    table.to_csv(folder / "records.csv", index=False)
    return folder / "records.csv"


@pytest.fixture(scope="module")
def finished(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The splits given, with two seeds, one after the other as an array of jobs would."""
    out = tmp_path_factory.mktemp("run")
    given = ["crossval", f"sequences={records}", "scheme=given", "seeds=[3,5]", "overlap=allow",
             "baselines=[majority,kmer,cnn]", f"out={out}", *QUICK]  # fmt: skip
    assert run(*given, "fold=1") == 0
    assert not (out / "metrics.json").exists()
    assert run(*given, "fold=0") == 0
    return out


def test_every_seed_is_scored_with_and_without_leaks(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    assert metrics["seeds"] == [3, 5]
    assert (metrics["folds"], metrics["rows"], metrics["without_leaks"]["rows"]) == (2, 40, 30)
    assert set(metrics["scores"]) == {"model", "majority", "kmer", "cnn"}
    assert metrics["scores"]["majority"]["auroc"]["value"] == 0.5
    assert metrics["scores"]["kmer"]["mcc"]["value"] > 0.8
    wanted = {"auroc", "auprc", "accuracy", "balanced_accuracy", "f1", "mcc", "brier", "ece"}
    assert set(metrics["scores"]["model"]) == wanted
    assert set(metrics["differences"]) == {"model", "majority", "cnn"}
    card = (finished / "fold_0" / "model_card.md").read_text()
    assert "stand in train or validation too" in card
    assert "stem: convolution over 11 bases, a token of each 1" in card
    summary = (finished / "summary.txt").read_text()
    assert "standard deviation over the folds" in summary
    assert "10 of 40 test records stand in train or validation too" in summary
    page = (finished / "report.html").read_text(encoding="utf-8")
    assert "Scores without leaking test records" in page
    assert "Difference to 4-mer logistic regression without leaking test records" in page
    assert "convolutions (Genomic Benchmarks)" in page
    seeds = [json.loads((finished / f"fold_{n}" / "metrics.json").read_text()) for n in (0, 1)]
    assert seeds[0]["scores"]["model"] != seeds[1]["scores"]["model"]
    assert seeds[0]["scores"]["kmer"] == seeds[1]["scores"]["kmer"]


def test_scores_are_those_of_the_saved_predictions(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    for model in ("model", "kmer", "cnn"):
        areas, correlations = [], []
        for fold in (0, 1):
            table = pd.read_csv(finished / f"fold_{fold}" / "models" / model / "predictions.csv")
            leaking = pd.read_csv(finished / f"fold_{fold}" / "leaks.csv").query("leaks")
            test = table[(table["split"] == "test") & ~table["id"].isin(leaking["id"])]
            assert len(test) == 30
            areas.append(roc_auc_score(test["label"] == "low", test["probability_low"]))
            whole = table[table["split"] == "test"]
            correlations.append(matthews_corrcoef(whole["label"], whole["prediction"]))
        clean = metrics["without_leaks"]["scores"][model]["auroc"]["value"]
        assert clean == pytest.approx(np.mean(areas))
        assert metrics["scores"][model]["mcc"]["value"] == pytest.approx(np.mean(correlations))


def test_a_finished_run_is_shown_again(
    finished: Path, records: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.json").stat().st_mtime_ns
    code = run("crossval", f"sequences={records}", "scheme=given", "seeds=[3,5]", "overlap=allow",
               "baselines=[majority,kmer,cnn]", f"out={finished}", *QUICK)  # fmt: skip
    assert code == 0
    assert "finished cross-validation" in capsys.readouterr().out
    assert (finished / "metrics.json").stat().st_mtime_ns == before


def test_folds_keep_copies_together_and_test_everything_once(records: Path, tmp_path: Path) -> None:
    table = pd.read_csv(records, dtype=str).drop(columns="split")
    table.to_csv(tmp_path / "all.csv", index=False)
    code = run("crossval", f"sequences={tmp_path / 'all.csv'}", "folds=2", f"out={tmp_path / 'o'}",
               "baselines=[]", *QUICK)  # fmt: skip
    assert code == 0
    gathered = pd.read_csv(tmp_path / "o" / "all_predictions.csv").query("split == 'test'")
    assert sorted(gathered["id"]) == sorted(table["id"])
    for fold in (0, 1):
        splits = pd.read_csv(tmp_path / "o" / f"splits_{fold}.tsv", sep="\t").set_index("id")
        assert all(splits["split"][f"r{n}"] == splits["split"][f"r{n - 80}"] for n in range(80, 90))
        assert not pd.read_csv(tmp_path / "o" / f"fold_{fold}" / "leaks.csv")["leaks"].any()


def test_evaluate_scores_a_run_against_another_by_subgroup(
    finished: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("evaluate", f"run={finished / 'fold_0'}", f"against={finished / 'fold_1'}",
               f"labels={records}", "subgroups=[site]", "resamples=20",
               f"out={tmp_path}")  # fmt: skip
    assert code == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["reference"] == "fold_1/model"
    assert metrics["differences"]["kmer"]["auroc"]["value"] is not None
    counts = {value: item["rows"] for value, item in metrics["subgroups"]["site"].items()}
    assert counts == {"north": 13, "south": 27}
    assert metrics["without_leaks"]["rows"] == 30
    assert "AUROC by site" in capsys.readouterr().out


def test_a_table_of_predictions_is_scored_with_leaks_that_are_given(
    finished: Path, tmp_path: Path
) -> None:
    table = finished / "fold_0" / "models" / "kmer" / "predictions.csv"
    code = run("evaluate", f"run={table}", f"leaks={finished / 'fold_0' / 'leaks.csv'}",
               "threshold=0.5", "resamples=20", f"out={tmp_path}")  # fmt: skip
    assert code == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["without_leaks"]["rows"] == 30
    assert metrics["thresholds"] == {"predictions": [0.5]}


def test_scores_are_told_apart_by_contig(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    genome = {f"chr{n}": "".join(rng.choice(LETTERS, 4_000)) for n in (1, 2, 3, 4)}
    (tmp_path / "g.fa").write_text("".join(f">{name}\n{text}\n" for name, text in genome.items()))
    rows = [
        f"{contig}\t{start}\t{start + 80}\tpeak{contig}_{start}\t{'ab'[start // 100 % 2]}"
        for contig in genome
        for start in range(0, 3_900, 100)
    ]
    (tmp_path / "p.bed").write_text("\n".join(rows) + "\n")
    code = run("crossval", f"sequences={tmp_path / 'g.fa'}", f"intervals={tmp_path / 'p.bed'}",
               "columns.label=5", "by=chromosome", "folds=2", f"out={tmp_path / 'o'}",
               "baselines=[kmer]", *QUICK)  # fmt: skip
    assert code == 0
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert {name: item["rows"] for name, item in metrics["subgroups"]["contig"].items()} == (
        dict.fromkeys(genome, 39)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scheme=loo"], ["kfold, monte_carlo, given", "'loo'"]),
        (["by=species"], ["record, group, cluster, chromosome"]),
        (["seeds=[1,1]"], ["different whole numbers"]),
        (["scheme=given", "overlap=allow", "fold=1"], ["fold=1", "0 to 0"]),
        (["scheme=given"], ["r0", "r80"]),
        (["reference=kmers"], ["reference is one of model, majority, kmer", "'kmers'"]),
        (["threshold=1.5"], ["threshold is a probability", "1.5"]),
        (["subgroups=[site]"], ["subgroups= needs labels=TABLE"]),
        (["task=regression"], ["needs numbers", "'r0'"]),
    ],
    ids=str,
)
def test_bad_cross_validations_are_named(
    arguments: list[str], words: list[str], records: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = run("crossval", f"sequences={records}", f"out={tmp_path}", *arguments, *QUICK)
    error = capsys.readouterr().err
    assert code == 2, error
    for word in words:
        assert word in error


def test_leaks_that_are_none_are_named(
    finished: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("evaluate", f"run={finished}", f"leaks={records}", f"out={tmp_path}")
    assert code == 2
    assert "leaks=" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["task.sampling=balanced", "task.class_weights=balanced"])
def test_classes_of_unequal_size_are_balanced_if_asked(
    setting: str, records: Path, tmp_path: Path
) -> None:
    """Of five records four are `high`: said of all without balance, and of fewer with it."""
    table = pd.read_csv(records, dtype=str)
    rng = np.random.default_rng(3)
    table["sequence"] = ["".join(rng.choice(LETTERS, 80)) for _ in range(len(table))]
    table["label"] = np.where(np.arange(len(table)) % 5 == 0, "low", "high")
    table.to_csv(tmp_path / "t.csv", index=False)
    shares = {}
    for name, extra in (("plain", []), ("balanced", [setting])):
        code = run("train", f"sequences={tmp_path / 't.csv'}", f"out={tmp_path / name}",
                   "baselines=[]", "epochs=4", "leaks=false", "optim.lr=0.003", *SMALL,
                   *extra)  # fmt: skip
        assert code == 0
        found = pd.read_csv(tmp_path / name / "predictions.csv")
        shares[name] = found["probability_low"].mean()
    assert shares["plain"] == pytest.approx(0.2, abs=0.12)
    assert 0.32 < shares["balanced"] < 0.65
