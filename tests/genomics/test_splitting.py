"""The verbs split and inspect through the command line, and train on the splits they make."""

import json

import numpy as np
import pandas as pd
import pytest

from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import decode, encode, reverse_complement
from pipelines.genomics.inspecting import _draw_lengths


def run(*arguments):
    return main([str(argument) for argument in arguments])


def random_text(seed, length=200):
    return decode(np.random.default_rng(seed).integers(1, 5, length).astype(np.uint8))


@pytest.fixture
def families(tmp_path):
    """Twelve families of three similar records, and labels."""
    rows = []
    with (tmp_path / "x.fa").open("w") as file:
        for family in range(12):
            text = random_text(family)
            turned = decode(reverse_complement(encode(text)))
            similar = text[40:] + random_text(99 + family, 40)
            for number, member in enumerate((text, turned, similar)):
                name = f"f{family}_{number}"
                file.write(f">{name}\n{member}\n")
                rows.append((name, "ab"[family % 2], f"site{family // 2}"))
    pd.DataFrame(rows, columns=["id", "label", "group"]).to_csv(tmp_path / "l.csv", index=False)
    return [f"sequences={tmp_path / 'x.fa'}", f"labels={tmp_path / 'l.csv'}"]


def splits_of(out):
    return pd.read_csv(out / "splits.tsv", sep="\t", dtype=str).set_index("id")


@pytest.mark.parametrize("by", ["record", "group", "cluster"])
def test_what_belongs_together_stays_together(families, tmp_path, by):
    out = tmp_path / "out"
    assert run("split", *families, f"by={by}", f"out={out}") == 0
    table = splits_of(out)
    assert set(table["split"]) == {"train", "val", "test"}
    family = table.index.str.split("_").str[0]
    copies = table[table.index.str[-1].isin(["0", "1"])]
    per_copy = copies.groupby(copies.index.str.split("_").str[0])["split"].nunique()
    assert (per_copy == 1).all()  # copies on the other strand, whatever the way
    if by == "cluster":
        assert (table.groupby(family)["split"].nunique() == 1).all()
    if by == "group":
        assert (table.groupby("group")["split"].nunique() == 1).all()


def test_the_same_seed_gives_the_same_splits_and_a_dry_run_none(families, tmp_path, capsys):
    for out, seed in (("one", 0), ("two", 0), ("three", 1)):
        assert run("split", *families, f"seed={seed}", f"out={tmp_path / out}") == 0
    assert splits_of(tmp_path / "one").equals(splits_of(tmp_path / "two"))
    assert not splits_of(tmp_path / "one").equals(splits_of(tmp_path / "three"))
    assert run("split", *families, f"out={tmp_path / 'dry'}", "dry_run=true") == 0
    assert "dry run" in capsys.readouterr().out
    assert not (tmp_path / "dry" / "splits.tsv").exists()


def test_chromosomes_are_chosen_by_name_or_pattern(tmp_path):
    fasta = tmp_path / "genome.fa"
    names = [f"chr{number}" for number in (1, 2, 8, 9, 10)]
    fasta.write_text("".join(f">{n}\n{random_text(i)}\n" for i, n in enumerate(names)))
    bed = tmp_path / "x.bed"
    bed.write_text("".join(f"{n}\t{s}\t{s + 30}\n" for n in names for s in (10, 20, 100)))
    out = tmp_path / "out"
    given = ["by=chromosome", "test=chr(8|9)", "val=chr10", f"out={out}"]
    assert run("split", f"sequences={fasta}", f"intervals={bed}", *given) == 0
    table = splits_of(out)
    assert table.groupby("group")["split"].first().to_dict() == {
        "chr1": "train", "chr2": "train", "chr8": "test", "chr9": "test", "chr10": "val",
    }  # fmt: skip
    alone = tmp_path / "alone"
    assert run("split", f"intervals={bed}", f"out={alone}") == 0  # without sequences
    table = splits_of(alone)
    assert (table.groupby("group").size() >= 2).any()  # overlapping ones share a group


def test_given_splits_that_overlap_are_refused_removed_or_allowed(tmp_path, capsys):
    folder = tmp_path / "task"
    folder.mkdir()
    shared = random_text(0, 60)
    for split, start in (("train", 1), ("dev", 100), ("test", 200)):
        rows = [(random_text(start + n, 60), n % 2) for n in range(12)]
        rows += [(shared, 0)] if split != "dev" else []
        table = pd.DataFrame(rows, columns=["sequence", "label"])
        table.to_csv(folder / f"{split}.csv", index=False)
    given = [f"sequences={folder}", "by=given"]
    assert run("split", *given, f"out={tmp_path / 'a'}") == 2
    error = capsys.readouterr().err
    assert "1 pairs in different splits have the same sequence" in error
    assert "(train) and" in error
    assert "overlap=allow" in error
    assert run("split", *given, "overlap=remove", f"out={tmp_path / 'b'}") == 0
    assert splits_of(tmp_path / "b")["split"].value_counts().to_dict() == {
        "test": 13, "train": 12, "val": 12,
    }  # fmt: skip
    assert run("split", *given, "overlap=allow", f"out={tmp_path / 'c'}") == 0
    assert len(splits_of(tmp_path / "c")) == 38

    quick = ["logger=none", "trainer.progress=false", "epochs=1", "baselines=[]"]
    quick += ["context=64", "window_overlap=0", f"sequences={folder}"]
    assert run("train", *quick, f"out={tmp_path / 't1'}") == 2
    assert "overlap=remove" in capsys.readouterr().err
    assert run("train", *quick, "overlap=allow", f"out={tmp_path / 't2'}") == 0
    assert len(pd.read_csv(tmp_path / "t2" / "predictions.csv").query("split == 'test'")) == 13


def test_train_takes_splits_intervals_and_tokenizers(families, tmp_path):
    assert run("split", *families, "by=cluster", f"out={tmp_path / 's'}") == 0
    quick = ["logger=none", "trainer.progress=false", "epochs=1", "baselines=[kmer]"]
    quick += ["context=128", "window_overlap=16"]
    splits = [f"splits={tmp_path / 's' / 'splits.tsv'}", "tokenizer=kmer", "tokenizer.k=4"]
    assert run("train", *families, *splits, *quick, f"out={tmp_path / 'k'}") == 0
    tested = pd.read_csv(tmp_path / "k" / "predictions.csv").query("split == 'test'")["id"]
    table = splits_of(tmp_path / "s")
    assert set(tested) == set(table.index[table["split"] == "test"])
    predict = [families[0], f"ckpt={tmp_path / 'k' / 'model.ckpt'}", f"out={tmp_path / 'p'}"]
    assert run("predict", *predict) == 0

    bed = tmp_path / "x.bed"
    lines = [
        f"f{family}_0\t{start}\t{start + 60}\ti{family}_{start}\t0\t{'+-'[start > 50]}\t{label}"
        for family in range(12)
        for start, label in ((5, "left"), (120, "right"))
    ]
    bed.write_text("\n".join(lines) + "\n")
    given = [families[0], f"intervals={bed}", "columns.label=7", f"out={tmp_path / 'i'}"]
    assert run("train", *given, *quick) == 0
    fasta = (tmp_path / "i" / "intervals.fa").read_text().split(">")[1:]
    records = dict(text.split("\n", 1) for text in fasta)
    bases = random_text(3)
    assert records["i3_5"].replace("\n", "") == bases[5:65]
    turned = decode(reverse_complement(encode(bases[120:180])))
    assert records["i3_120"].replace("\n", "") == turned


def test_a_report_is_written(families, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("split", *families, f"out={tmp_path / 's'}") == 0
    splits = f"splits={tmp_path / 's' / 'splits.tsv'}"
    assert run("inspect", *families, splits, f"out={out}") == 0
    shown = capsys.readouterr().out
    assert "36 items, 7,200 bases" in shown
    assert "test against train" in shown
    report = json.loads((out / "report.json").read_text())
    assert report["copies"] == 12
    assert report["label_conflicts"]["in all"] == 0
    assert sum(row["items"] for row in report["counts"]) == 36
    items = pd.read_csv(out / "items.tsv", sep="\t").set_index("id")
    text = random_text(0)
    gc = (text.count("G") + text.count("C")) / 200
    assert items.loc["f0_0", "gc"] == pytest.approx(gc, abs=1e-4)
    for name in ("lengths.png", "gc.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert run("inspect", *families, splits, f"out={out}") == 0
    assert "holds this report already" in capsys.readouterr().out


@pytest.mark.parametrize(("low", "high"), [(300, 300), (298, 303), (71, 593), (14_935, 28_757)])
def test_lengths_are_drawn_where_they_are(low, high):
    lengths = np.linspace(low, high, 500).astype(int)
    groups = {("train", "0"): np.arange(250), ("train", "1"): np.arange(250, 500)}
    axes = _draw_lengths(lengths, groups).axes[0]
    left, right = axes.get_xlim()
    assert left < low <= high < right
    assert right - left < 1.3 * (high - low) + 6
    for curve in axes.patches:
        values, edges, _ = curve.get_data()
        assert values.sum() == pytest.approx(100)
        assert len(set(np.diff(edges))) == 1
        assert np.diff(edges)[0] % 1 == 0


@pytest.mark.real_data
def test_known_leaks_of_genomic_benchmarks_are_found(real_data, tmp_path):
    folder = real_data / "genomes" / "gb_intervals"
    found = {}
    for name in ("human_enhancers_ensembl", "human_nontata_promoters"):
        out = tmp_path / name
        assert run("inspect", f"intervals={folder}", f"only={name}", f"out={out}") == 0
        rows = json.loads((out / name / "report.json").read_text())["leaks"]
        found[name] = {(row["label"], row["criterion"]): row for row in rows}
    copies = found["human_enhancers_ensembl"]["", "identical"]
    assert (copies["found"], copies["items"]) == (11_694, 30_970)
    assert round(100 * copies["share"], 1) == 37.8
    overlapping = found["human_nontata_promoters"]["negative", "overlapping"]
    assert (overlapping["found"], overlapping["items"]) == (4_101, 4_119)
    assert overlapping["remaining"] == 18


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("task", "leaking", "conflicts"), [("prom_core_all", 43, 40), ("prom_300_tata", 6, 10)]
)
def test_known_leaks_of_gue_are_found(real_data, tmp_path, task, leaking, conflicts):
    folder = tmp_path / task
    folder.mkdir()
    for split in ("train", "dev", "test"):
        source = real_data / "genomes" / f"gue_{task}_{split}.csv.gz"
        (folder / f"{split}.csv.gz").symlink_to(source)
    out = tmp_path / "out"
    assert run("inspect", f"sequences={folder}", f"out={out}") == 0
    report = json.loads((out / "report.json").read_text())
    rows = {(row["split"], row["against"], row["criterion"], row["label"]): row
            for row in report["leaks"]}  # fmt: skip
    assert rows["test", "train", "identical", ""]["found"] == leaking
    assert rows["test", "train", "share a 50-mer", ""]["found"] > leaking
    assert report["label_conflicts"]["within train"] == conflicts
