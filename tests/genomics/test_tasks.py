"""Tasks besides classes: several labels and numbers, from the table to the report."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score

from pipelines.genomics.__main__ import main
from pipelines.genomics.multilabel import MultiLabel, read_multilabel
from pipelines.genomics.tasks import (
    load_objective,
    make_objective,
    name_outputs,
    read_targets,
    read_values,
    score_of,
    score_outputs,
    settle,
)
from pipelines.shared.errors import InputError
from pipelines.shared.objective import Classification, Regression

QUICK = ["model.dim=16", "model.depth=1", "model.num_heads=2", "logger=none",
         "trainer.progress=false", "epochs=1"]  # fmt: skip
SETS = {"name": "multilabel", "separator": ";", "none": "-", "columns": [], "weights": None}


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """150 records: `value` grows with the share of A, `rich` is above 0.3, `odd` is random."""
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    rows = []
    for number in range(150):
        share = rng.uniform(0.1, 0.5)
        rest = (1 - share) / 3
        text = "".join(rng.choice(list("ACGT"), 200, p=[share, rest, rest, rest]))
        value = 40 + 100 * text.count("A") / 200 + rng.normal(0, 1)
        rich, odd = int(text.count("A") > 60), int(rng.random() < 0.3)
        sets = ";".join([name for name, on in (("rich", rich), ("odd", odd)) if on]) or "-"
        split = "train" if number < 90 else "val" if number < 120 else "test"
        rows.append((f"r{number}", text, f"{value:.3f}", sets, rich, odd, split))
    columns = ["id", "sequence", "value", "sets", "rich", "odd", "split"]
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(folder / "records.csv", index=False)
    table.drop(columns="sequence").to_csv(folder / "labels.csv", index=False)
    (folder / "r.fa").write_text("".join(f">{r[0]}\n{r[1]}\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def numbers(records, tmp_path_factory):
    out = tmp_path_factory.mktemp("numbers")
    code = run("train", f"sequences={records / 'records.csv'}", "columns.label=value",
               "task=regression", "baselines=[majority,kmer,cnn]", f"out={out}",
               *QUICK)  # fmt: skip
    assert code == 0
    return out


@pytest.fixture(scope="module")
def sets(records, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets")
    code = run("train", f"sequences={records / 'records.csv'}", "columns.label=sets",
               "task=multilabel", "baselines=[majority,kmer]", f"out={out}", *QUICK)  # fmt: skip
    assert code == 0
    return out


def test_numbers_are_learnt_and_scored_by_the_libraries(numbers):
    metrics = json.loads((numbers / "metrics.json").read_text())
    for name in ("model", "majority", "kmer", "cnn"):
        table = pd.read_csv(numbers / "models" / name / "predictions.csv")
        test = table[table["split"] == "test"]
        assert len(test) == 30
        scores, known = metrics["scores"][name], (test["target"], test["prediction"])
        assert scores["r2"]["value"] == pytest.approx(r2_score(*known))
        assert scores["mae"]["value"] == pytest.approx(mean_absolute_error(*known))
        if name != "majority":
            assert scores["pearson"]["value"] == pytest.approx(pearsonr(*known).statistic)
            assert scores["spearman"]["value"] == pytest.approx(spearmanr(*known).statistic)
            assert scores["pearson"]["low"] < scores["pearson"]["value"] <= 1
    assert metrics["scores"]["kmer"]["r2"]["value"] > 0.8
    assert metrics["scores"]["majority"]["pearson"]["reason"] == "no variation"
    train = pd.read_csv(numbers / "splits.tsv", sep="\t").query("split == 'train'")
    constant = pd.read_csv(numbers / "models" / "majority" / "predictions.csv")["prediction"]
    assert constant.unique() == pytest.approx([train["label"].mean()], abs=1e-4)
    assert "4-mer ridge regression" in (numbers / "summary.txt").read_text()


def test_numbers_are_predicted_and_evaluated(numbers, records, tmp_path):
    code = run("predict", f"sequences={records / 'r.fa'}", f"ckpt={numbers / 'model.ckpt'}",
               f"out={tmp_path / 'p'}", "outputs=[tsv,bedgraph]")  # fmt: skip
    assert code == 0
    said = pd.read_csv(tmp_path / "p" / "predictions.tsv", sep="\t").set_index("id")["prediction"]
    known = pd.read_csv(numbers / "predictions.csv").set_index("id")["prediction"]
    assert said[known.index].to_numpy() == pytest.approx(known.to_numpy(), abs=1e-3)
    line = (tmp_path / "p" / "tracks" / "prediction.bedgraph").read_text().splitlines()[1]
    assert line.split("\t")[:3] == ["r0", "0", "200"]
    assert float(line.split("\t")[3]) == pytest.approx(said["r0"], abs=1e-3)
    assert run("evaluate", f"run={numbers}", "resamples=20", f"out={tmp_path / 'e'}") == 0
    page = (tmp_path / "e" / "report.html").read_text()
    assert "Predicted and true" in page
    assert "4-mer ridge regression" in page


def test_folds_of_numbers_need_no_classes(records, tmp_path, capsys):
    table = pd.read_csv(records / "records.csv").drop(columns="split")
    table.to_csv(tmp_path / "t.csv", index=False)
    code = run("crossval", f"sequences={tmp_path / 't.csv'}", "columns.label=value",
               "task=regression", "folds=2", "baselines=[kmer]", "resamples=20",
               f"out={tmp_path / 'o'}", *QUICK)  # fmt: skip
    assert code == 0
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert (metrics["task"], metrics["rows"]) == ("regression", 150)
    assert metrics["scores"]["kmer"]["r2"]["value"] > 0.8
    assert run("crossval", f"sequences={tmp_path / 't.csv'}", "columns.label=value",
               "task=regression", "folds=200", f"out={tmp_path / 'p'}", *QUICK) == 2  # fmt: skip
    assert "folds=200, and there are 150 groups" in capsys.readouterr().err


def test_numbers_are_not_told_apart_in_a_look(records, tmp_path, capsys):
    assert run("inspect", f"sequences={records / 'records.csv'}", "columns.label=value",
               f"out={tmp_path}") == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "test against train: 30 items" in shown
    assert shown.count("identical") == 3
    assert len(shown.splitlines()) < 60


def test_splits_of_numbers_are_drawn_without_strata(records, tmp_path, capsys):
    table = pd.read_csv(records / "records.csv").drop(columns="split")
    table.to_csv(tmp_path / "t.csv", index=False)
    given = ["split", f"sequences={tmp_path / 't.csv'}", "columns.label=value"]
    assert run(*given, "stratify=false", f"out={tmp_path / 'a'}") == 0
    splits = pd.read_csv(tmp_path / "a" / "splits.tsv", sep="\t")["split"]
    assert splits.value_counts().to_dict() == {"train": 90, "val": 30, "test": 30}


def test_labels_are_scored_one_by_one_with_thresholds_of_validation(sets, tmp_path):
    metrics = json.loads((sets / "metrics.json").read_text())
    assert metrics["labels"] == ["odd", "rich"]
    assert "- labels: odd, rich" in (sets / "model_card.md").read_text()
    table = pd.read_csv(sets / "models" / "kmer" / "predictions.csv")
    test = table[table["split"] == "test"]
    areas = [roc_auc_score(test[f"label_{n}"], test[f"probability_{n}"]) for n in ("odd", "rich")]
    assert areas[1] > 0.95
    assert metrics["scores"]["kmer"]["auroc"]["value"] == pytest.approx(np.mean(areas))
    exact = (test[["label_odd", "label_rich"]].to_numpy()
             == test[["prediction_odd", "prediction_rich"]].to_numpy()).all(axis=1)  # fmt: skip
    assert metrics["scores"]["kmer"]["exact_match"]["value"] == pytest.approx(exact.mean())
    assert set(metrics["scores_by_target"]) == {"odd", "rich"}
    assert metrics["scores"]["majority"]["auroc"]["value"] == 0.5
    assert len(metrics["task"]["thresholds"]) == 2
    assert run("evaluate", f"run={sets}", "resamples=20", f"out={tmp_path}") == 0
    again = json.loads((tmp_path / "metrics.json").read_text())
    assert again["task"] == "multilabel"
    for name in ("model", "kmer"):
        for score in ("auroc", "f1", "exact_match"):
            found = again["scores"][name][score]["value"]
            assert found == pytest.approx(metrics["scores"][name][score]["value"])
    assert "AUROC by label" in (tmp_path / "report.html").read_text()


def test_labels_in_columns_are_those_in_one(sets, records, tmp_path):
    code = run("train", f"sequences={records / 'r.fa'}", f"labels={records / 'labels.csv'}",
               "task=multilabel", "task.columns=[rich,odd]", "baselines=[kmer]",
               f"out={tmp_path / 'o'}", *QUICK)  # fmt: skip
    assert code == 0
    for name in ("kmer", "model"):
        one, two = (
            pd.read_csv(run_ / "models" / name / "predictions.csv")
            for run_ in (sets, tmp_path / "o")
        )
        pd.testing.assert_frame_equal(one, two)
    code = run("predict", f"sequences={records / 'r.fa'}", f"ckpt={tmp_path / 'o' / 'model.ckpt'}",
               f"out={tmp_path / 'p'}")  # fmt: skip
    assert code == 0
    said = pd.read_csv(tmp_path / "p" / "predictions.tsv", sep="\t").set_index("id")
    known = pd.read_csv(tmp_path / "o" / "predictions.csv").set_index("id")
    for column in ("prediction_rich", "probability_odd"):
        assert said.loc[known.index, column].to_numpy() == pytest.approx(
            known[column].to_numpy(), abs=1e-5
        )


def test_effects_and_maps_speak_of_labels_and_numbers(sets, numbers, records, tmp_path):
    first = (records / "r.fa").read_text().split("\n")[1]
    alt = "A" if first[99] != "A" else "G"
    (tmp_path / "v.vcf").write_text(
        f"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        f"r0\t100\tx\t{first[99]}\t{alt}\t.\t.\t.\n"
    )
    (tmp_path / "one.fa").write_text(f">r0\n{first}\n")
    columns = {}
    for name, folder in (("sets", sets), ("numbers", numbers)):
        code = run("variants", f"sequences={records / 'r.fa'}", f"variants={tmp_path / 'v.vcf'}",
                   f"ckpt={folder / 'model.ckpt'}", f"out={tmp_path / name}")  # fmt: skip
        assert code == 0
        columns[name] = pd.read_csv(tmp_path / name / "variants.tsv", sep="\t").iloc[0]
    assert {"ref_rich", "alt_odd", "delta_rich", "log_odds_odd"} <= set(columns["sets"].index)
    found = columns["numbers"]
    assert found["delta_prediction"] == pytest.approx(
        found["alt_prediction"] - found["ref_prediction"], abs=2e-6
    )
    assert 40 < found["ref_prediction"] < 100
    assert "log_odds_prediction" not in columns["numbers"]
    assert "LOGODDS" not in (tmp_path / "numbers" / "variants.vcf").read_text()
    given = [f"sequences={tmp_path / 'one.fa'}", f"ckpt={numbers / 'model.ckpt'}", "focus=3"]
    assert run("saliency", *given, "logos=0", f"out={tmp_path / 's'}") == 0
    assert len(pd.read_csv(tmp_path / "s" / "saliency.tsv", sep="\t")) == 3
    assert run("saliency", f"sequences={tmp_path / 'one.fa'}", f"ckpt={sets / 'model.ckpt'}",
               "focus=3", "class=rich", "logos=0", f"out={tmp_path / 't'}") == 0  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["columns.label=sets", "task=regression"], ["'r0'", "needs numbers", "records.csv"]),
        (["columns.label=sets", "task=multilabel", "task.separator=''"], ["task.separator"]),
        (["columns.label=sets", "task=multilabel", "task.weights=many"], ["task.weights"]),
        (["columns.label=sets", "task=multilabel", "task.columns=[rich]"], ["labels=TABLE"]),
        (["columns.label=value", "task=regression", "task.loss=l1"], ["mse or huber", "'l1'"]),
        (["columns.label=value", "task=regression", "callbacks.select=auroc"], ["r2"]),
        (["columns.label=value"], ["150 records have", "use task=regression"]),
        (["columns.label=sets", "task=survival_cox"], ["task=survival_cox", "task=tracks"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_bad_tasks_are_named(arguments, words, records, tmp_path, capsys):
    code = run("train", f"sequences={records / 'records.csv'}", *arguments, "baselines=[]",
               f"out={tmp_path}", *QUICK)  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2, error
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("changes", "words"),
    [({4: "high"}, "l.csv, row 6: value must be a number; got 'high'"),
     ({4: "inf"}, "l.csv, row 6: value must be a number; got 'inf'"),
     (dict.fromkeys(range(150), "7"), "all 90 training targets are 7")],
    ids=["a word", "infinity", "a constant"],
)  # fmt: skip
def test_numbers_that_are_none_are_named(changes, words, records, tmp_path, capsys):
    table = pd.read_csv(records / "labels.csv", dtype=str)
    for row, value in changes.items():
        table.loc[row, "value"] = value
    table.to_csv(tmp_path / "l.csv", index=False)
    code = run("train", f"sequences={records / 'r.fa'}", f"labels={tmp_path / 'l.csv'}",
               "columns.label=value", "task=regression", "leaks=false",
               f"out={tmp_path / 'o'}")  # fmt: skip
    assert code == 2
    assert words in capsys.readouterr().err


def test_a_column_of_labels_that_is_none_is_named(records, tmp_path, capsys):
    table = pd.read_csv(records / "labels.csv")
    table.loc[3, "odd"] = 2
    table.to_csv(tmp_path / "l.csv", index=False)
    code = run("train", f"sequences={records / 'r.fa'}", f"labels={tmp_path / 'l.csv'}",
               "task=multilabel", "task.columns=[rich,odd]", f"out={tmp_path / 'o'}")  # fmt: skip
    assert code == 2
    assert "l.csv, row 5: odd is 1 or 0; got 2" in capsys.readouterr().err


@pytest.mark.parametrize("label", ["a;;b", "a;a", ";"])
def test_label_sets_that_are_none_are_named(label):
    table = pd.DataFrame({"id": ["x", "y"], "label": ["a", label]})
    with pytest.raises(InputError, match=r"t\.csv: the labels of 'y'"):
        read_targets(table, {"task": SETS}, "t.csv")


def test_label_sets_are_read_with_spaces_and_none():
    table = pd.DataFrame({"id": list("wxyz"), "label": ["b; a", "-", "c", "a"]})
    found = read_targets(table, {"task": SETS}, "t.csv")
    assert found.names == ("a", "b", "c")
    assert found.values.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert found.of(np.array([0])) == [(1.0, 1.0, 0.0)]
    with pytest.raises(InputError, match="'c' is on 0 of 2 training items"):
        make_objective({"task": SETS}, found, np.array([0, 1]))


def test_the_loss_of_labels_weighs_the_rare_ones_if_asked():
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    outputs = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    balanced = MultiLabel.of(["a", "b"], targets.numpy(), balanced=True)
    assert balanced.weights == (1.0, 3.0)
    shares = outputs.sigmoid()
    weights = torch.tensor([1.0, 3.0])
    each = -(weights * targets * shares.log() + (1 - targets) * (1 - shares).log())
    assert float(balanced.loss(outputs, targets)) == pytest.approx(float(each.mean()), rel=1e-5)
    plain = MultiLabel(("a", "b"))
    assert plain.evaluate(outputs.double().numpy(), np.zeros((4, 2))) is None
    outputs = np.array([[3.0, -1], [-2, 0], [1, -2], [0, 0.5]])
    settled = settle(plain, outputs, [(1, 0), (0, 0), (1, 1), (0, 0)])
    assert isinstance(settled, MultiLabel)
    assert settled.thresholds is not None
    assert 0.5 < settled.thresholds[0] < 0.74  # between the sigmoids of 0 and of 1
    assert read_multilabel(settled.plain()) == settled


@pytest.mark.parametrize(
    "objective",
    [Classification(("a", "b", "c")), MultiLabel(("a", "b", "c")), Regression(5.0, 2.0)],
    ids=["classes", "labels", "number"],
)
def test_a_score_is_what_the_values_say(objective):
    """Log odds of probabilities, or the number itself; differentiable."""
    outputs = np.random.default_rng(0).normal(size=(6, objective.num_outputs))
    values, scores = read_values(objective, outputs), score_outputs(objective, outputs)
    assert values.shape == scores.shape == (6, len(name_outputs(objective)))
    expected = values if isinstance(objective, Regression) else np.log(values / (1 - values))
    assert scores == pytest.approx(expected, abs=1e-4)
    given = torch.tensor(outputs, requires_grad=True)
    score_of(objective, 0)(given[0]).backward()
    assert given.grad is not None
    assert given.grad[0].abs().max() > 0
    assert load_objective(objective.plain()) == objective
