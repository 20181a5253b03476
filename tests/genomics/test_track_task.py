"""Numbers per base: their files, the network, and a run on a genome whose rule is known."""

import gzip
import json

import numpy as np
import pandas as pd
import pyBigWig
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import mean_absolute_error, r2_score

from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import encode
from pipelines.genomics.baseline import fit_around
from pipelines.genomics.data import WindowDataset
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.track_files import Signals, open_track
from pipelines.genomics.track_task import Tracks, TrackWindows, read_tracks
from pipelines.shared.batch import Example, ExampleList, pack
from pipelines.shared.errors import InputError
from pipelines.shared.inference import predict
from tests.genomics.test_model import PATTERNS, texts, turned

MOTIF, REACH = "TATAGC", 8


def run(*arguments):
    return main([str(argument) for argument in arguments])


def network(rc, **changed):
    torch.manual_seed(3)
    sizes = {"dim": 32, "depth": 2, "num_heads": 4, "pattern": PATTERNS[rc], "num_classes": 2}
    found = DnaClassifier(rc=rc, per="base", **{**sizes, **changed})
    with torch.no_grad():
        for weight in found.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return found.eval()


def outputs(found, strings):
    examples = [
        Example(torch.from_numpy(encode(s)), torch.arange(len(s))[:, None], None, "x", "x", 0)
        for s in strings
    ]
    return [item.logits for item in predict(found, ExampleList(examples), max_tokens=100_000)]


@pytest.mark.parametrize("rc", ["average", "equivariant"])
@pytest.mark.parametrize("sizes", [{}, {"stem": "none"}, {"stem_stride": 3}], ids=str)
def test_the_other_strand_turns_the_track_around(rc, sizes):
    found = network(rc, **sizes)
    strings = [text[: len(text) // 3 * 3] for text in texts(12)]
    for one, other in zip(
        outputs(found, strings), outputs(found, map(turned, strings)), strict=True
    ):
        assert (one - other.flip(0)).abs().max() <= 1e-5  # of numbers, not of probabilities
        assert one.std(0).min() > 1e-2


@pytest.mark.parametrize("rc", sorted(PATTERNS))
def test_a_base_hears_nothing_of_other_sequences(rc):
    found, strings = network(rc), texts(32)
    packed = outputs(found, strings)
    for text, one in zip(strings, packed, strict=True):
        assert one.shape == (len(text), 2)
        assert (outputs(found, [text])[0] - one).abs().max() <= 1e-5


def test_tokens_of_several_bases_say_one_thing_of_them():
    (one,) = outputs(network("none", stem_stride=4), ["ACGTACGTAC"])
    assert one.shape == (10, 2)
    assert torch.equal(one[0:4], one[0].expand(4, 2))
    assert torch.equal(one[8:], one[8].expand(2, 2))
    assert not torch.allclose(one[0], one[4])


def write_bedgraph(path, rows):
    path.write_text("".join(f"{c}\t{s}\t{e}\t{v}\n" for c, s, e, v in rows))
    return path


def write_bigwig(path, sizes, rows):
    with pyBigWig.open(str(path), "w") as file:
        file.addHeader(list(sizes.items()))
        for contig, start, end, value in rows:
            file.addEntries([contig], [start], ends=[end], values=[value])
    return path


ROWS = [("chr1", 2, 5, 1.5), ("chr1", 5, 6, -2.0), ("chr1", 8, 10, 4.0)]


@pytest.mark.parametrize("kind", ["bedgraph", "bedgraph.gz", "bw"])
def test_files_are_read_where_they_say_something(kind, tmp_path):
    path = tmp_path / f"signal.{kind}"
    if kind == "bw":
        write_bigwig(path, {"chr1": 12}, ROWS)
    else:
        text = write_bedgraph(tmp_path / "x", [ROWS[2], *ROWS[:2]]).read_text()
        text = f'track type=bedGraph name="x"\n# note\n{text}'
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    file = open_track(path)
    nan = np.nan
    expected = [nan, nan, 1.5, 1.5, 1.5, -2, nan, nan, 4, 4, nan, nan]
    np.testing.assert_array_equal(file.read("chr1", 0, 12), np.float32(expected))
    np.testing.assert_array_equal(file.read("chr1", 3, 9), np.float32(expected[3:9]))
    np.testing.assert_array_equal(file.read("chr1", -2, 3), np.float32([nan, nan, *expected[:3]]))
    assert np.isnan(file.read("chr1", 11, 15)).all()


def test_items_are_read_in_their_direction(tmp_path):
    path = write_bedgraph(tmp_path / "a.bedgraph", [("1", n, n + 1, n) for n in range(30)])
    table = pd.DataFrame({
        "id": ["x", "y", "z"], "contig": ["chr1", "chr1", "chr2"], "start": [4, 10, 0],
        "end": [9, 14, 3], "strand": ["+", "-", "."],
    })  # fmt: skip
    lengths = np.array([5, 4, 3])
    found = Signals([path], table, lengths, missing="skip")
    assert found.read(0, 1, 4)[:, 0].tolist() == [5, 6, 7]
    assert found.read(1, 0, 4)[:, 0].tolist() == [13, 12, 11, 10]
    assert found.read(1, 1, 3)[:, 0].tolist() == [12, 11]
    assert found.locate(1, 1, 3) == ("chr1", 11, 13, "-")
    assert np.isnan(found.read(2, 0, 3)).all()
    assert found.notes == ["a.bedgraph says nothing of 1 contigs: chr2"]
    assert Signals([path], table, lengths, missing="zero").read(2, 0, 3)[:, 0].tolist() == [0, 0, 0]
    with pytest.raises(InputError, match="'y' is spliced"):
        Signals([path], table, np.array([5, 3, 3]), missing="skip")


BAD = {
    "columns": ("chr1\t2\t5\n", ["line 1", "3 columns", "has 4"]),
    "value": ("chr1\t2\t5\tx\n", ["line 1", "'x'"]),
    "infinite": ("chr1\t2\t5\tinf\n", ["line 1", "'inf'"]),
    "start": ("chr1\ttwo\t5\t1\n", ["line 1", "'two'"]),
    "empty stretch": ("chr1\t5\t5\t1\n", ["line 1", "holds no base"]),
    "overlap": ("chr1\t2\t5\t1\nchr1\t4\t6\t1\n", ["line 2", "2-5 of line 1", "one value"]),
    "wiggle": ("track type=wiggle_0\nfixedStep chrom=chr1 start=1\n1\n", ["line 2", "wigToBigWig"]),
    "no lines": ("# nothing\n", ["holds no values"]),
    "other contigs": ("zebra\t2\t5\t1\n", ["zebra", "chr0"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_bedgraph_is_named(case, genome, tmp_path, capsys):
    content, words = BAD[case]
    (tmp_path / "bad.bedgraph").write_text(content)
    code = run("train", f"sequences={genome / 'g.fa'}", "task=tracks",
               f"task.files=[{tmp_path / 'bad.bedgraph'}]", f"out={tmp_path / 'o'}")  # fmt: skip
    error = capsys.readouterr().err
    assert code == 2, error
    for word in ("bad.bedgraph", *words):
        assert word in error


def test_bad_tracks_are_named(genome, tmp_path, capsys):
    write_bigwig(tmp_path / "other.bw", {"chr0": 700}, [("chr0", 0, 5, 1.0)])
    write_bedgraph(tmp_path / "flat.bedgraph", [(f"chr{n}", 0, 400, 3) for n in range(8)])
    write_bedgraph(tmp_path / "test_only.bedgraph", [("chr5", 0, 400, 3)])
    (tmp_path / "broken.bw").write_bytes(b"\x26\xfc\x8f\x88" + b"\0" * 100)
    (tmp_path / "sub").mkdir()
    write_bedgraph(tmp_path / "sub" / "flat.bw", [("chr0", 0, 5, 1)])
    splits = pd.DataFrame({"id": [f"chr{n}" for n in range(8)], "split": ["train"] * 8})
    splits.loc[4:5, "split"], splits.loc[6:, "split"] = "test", "val"
    splits.to_csv(tmp_path / "s.tsv", sep="\t", index=False)
    cases = {
        "other.bw": ["'chr0' has 700 bases there and 600", "another assembly"],
        "flat.bedgraph": ["'flat'", "3 at every training base", "task.missing=zero"],
        "test_only.bedgraph": ["'test_only'", "nothing of any training base"],
        "broken.bw": ["broken.bw", "bigWig"],
        "absent.bw": ["absent.bw", "no such file"],
        "[]": ["task.files=[a.bw,b.bw]"],
        f"[{tmp_path}/flat.bedgraph,{tmp_path}/sub/flat.bw]": ["two tracks are called 'flat'"],
    }
    for number, (name, words) in enumerate(cases.items()):
        files = name if name.startswith("[") else f"[{tmp_path / name}]"
        code = run("train", f"sequences={genome / 'g.fa'}", f"splits={tmp_path / 's.tsv'}",
                   "task=tracks", f"task.files={files}", f"out={tmp_path / str(number)}",
                   "leaks=false")  # fmt: skip
        error = capsys.readouterr().err
        assert code == 2, (name, error)
        for word in words:
            assert word in error
    code = run("train", f"sequences={genome / 'g.fa'}", "task=tracks", "tokenizer=kmer",
               f"task.files=[{genome / 'sum.bw'}]", f"out={tmp_path / 'o'}")  # fmt: skip
    assert code == 2
    assert "tokenizer=base" in capsys.readouterr().err


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    """Eight contigs of 600 bases with a motif on either strand; `sum` is 1 around each of them.

    `part` is ten times as much, and unknown of the first hundred bases.
    """
    folder, rng = tmp_path_factory.mktemp("genome"), np.random.default_rng(0)
    sizes, tracks, lines = {}, {"sum": [], "part": []}, []
    for number in range(8):
        bases, name = rng.choice(list("ACGT"), 600), f"chr{number}"
        for place in rng.choice(np.arange(20, 570, 12), 9, replace=False):
            bases[place : place + 6] = list(MOTIF if rng.random() < 0.5 else turned(MOTIF))
        text = "".join(bases)
        signal = np.zeros(600)
        for place in range(594):
            if text[place : place + 6] in (MOTIF, turned(MOTIF)):
                signal[max(place - REACH, 0) : place + 6 + REACH] += 1
        signal += rng.normal(0, 0.05, 600)
        sizes[name] = 600
        lines.append(f">{name}\n{text}\n")
        tracks["sum"].append(signal)
        tracks["part"].append(10 * signal)
    (folder / "g.fa").write_text("".join(lines))
    with pyBigWig.open(str(folder / "sum.bw"), "w") as file:
        file.addHeader(list(sizes.items()))
        for name, values in zip(sizes, tracks["sum"], strict=True):
            file.addEntries(name, 0, values=values.tolist(), span=1, step=1)
    write_bedgraph(folder / "part.bedgraph", [
        (name, at, at + 1, f"{value:.4f}")
        for name, values in zip(sizes, tracks["part"], strict=True)
        for at, value in enumerate(values) if at >= 100
    ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def trained(genome, tmp_path_factory):
    out = tmp_path_factory.mktemp("tracks")
    files = f"task.files=[{genome / 'sum.bw'},{genome / 'part.bedgraph'}]"
    code = run("train", f"sequences={genome / 'g.fa'}", "task=tracks", files, f"out={out}",
               "context=128", "window_overlap=28", "window=16", "batch_size=4", "epochs=25",
               "model.dim=32", "optim.lr=0.005", "baselines=[majority,kmer,cnn]", "rc=average",
               "logger=none", "trainer.progress=false", "seed=1")  # fmt: skip
    assert code == 0
    return out


def values_of(path, contig, column=3):
    rows = pd.read_csv(path, sep="\t", skiprows=1, header=None)
    mine = rows[rows[0] == contig]
    found = np.full(600, np.nan)
    for start, end, value in zip(mine[1], mine[2], mine[column], strict=True):
        found[start:end] = value
    return found


def test_tracks_are_learnt_and_scored_by_the_libraries(genome, trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    splits = pd.read_csv(trained / "splits.tsv", sep="\t").set_index("id")["split"]
    tested = splits.index[splits == "test"]
    table = pd.read_csv(trained / "predictions.csv")
    assert set(table[table["split"] == "test"]["item"]) == set(tested)
    assert (table[table["split"] == "test"]["end"] - table["start"][table["split"] == "test"]
            ).tolist() == [120] * 5 * len(tested)  # fmt: skip
    for name in ("sum", "part"):
        said = np.concatenate([
            values_of(trained / "tracks" / f"{name}.bedgraph", contig) for contig in tested
        ])  # fmt: skip
        file = open_track(genome / ("sum.bw" if name == "sum" else "part.bedgraph"))
        known = np.concatenate([file.read(contig, 0, 600) for contig in tested])
        seen = ~np.isnan(known)
        assert seen.mean() == (1 if name == "sum" else pytest.approx(5 / 6))
        pair = known[seen].astype(float), said[seen]
        found = {key: item["value"] for key, item in metrics["scores_by_target"][name].items()}
        assert found["r2"] == pytest.approx(r2_score(*pair), abs=1e-5)
        assert found["mae"] == pytest.approx(mean_absolute_error(*pair), abs=1e-5)
        assert found["pearson"] == pytest.approx(pearsonr(*pair).statistic, abs=1e-5)
        assert found["spearman"] == pytest.approx(spearmanr(*pair).statistic, abs=1e-4)
        assert found["r2"] > 0.4
        assert (trained / "tracks" / f"{name}.png").stat().st_size > 10_000
    scores = metrics["scores"]
    assert set(scores) == {"model", "majority", "kmer"}  # a network of sequences has no place here
    assert set(scores["model"]) == {"r2", "pearson", "spearman"}
    assert scores["majority"]["r2"]["value"] == pytest.approx(0, abs=0.05)
    assert scores["kmer"]["r2"]["value"] < scores["model"]["r2"]["value"]
    low, high = (scores["model"]["r2"][side] for side in ("low", "high"))
    assert low < scores["model"]["r2"]["value"] < high
    summary = (trained / "summary.txt").read_text()
    assert "ridge regression on 21 bases around" in summary
    assert "the model's\ntrack  R2" in summary


def test_saved_tracks_are_evaluated_by_contig_and_without_leaks(trained, tmp_path):
    metrics = json.loads((trained / "metrics.json").read_text())
    splits = pd.read_csv(trained / "splits.tsv", sep="\t")
    tested = splits["id"][splits["split"] == "test"].tolist()
    pd.DataFrame({"id": tested[:1], "split": "test", "leaks": True}).to_csv(
        tmp_path / "leaks.csv", index=False
    )
    code = run("evaluate", f"run={trained}", f"leaks={tmp_path / 'leaks.csv'}", "resamples=50",
               f"out={tmp_path / 'o'}")  # fmt: skip
    assert code == 0
    again = json.loads((tmp_path / "o" / "metrics.json").read_text())
    for score in ("r2", "pearson", "spearman"):
        assert again["scores"]["model"][score]["value"] == pytest.approx(
            metrics["scores"]["model"][score]["value"]
        )
    assert set(again["subgroups"]["contig"]) == set(tested)
    said = f"5 of {5 * len(tested)} test stretches stand in train or validation too"
    assert said in (tmp_path / "o" / "summary.txt").read_text()
    page = (tmp_path / "o" / "report.html").read_text()
    assert "R2 by track" in page
    assert "Predicted and true means of stretches, sum" in page


def test_predictions_lie_where_the_bases_do(genome, trained, tmp_path):
    """Intervals on either strand say the same of the same bases: the model averages strands."""
    (tmp_path / "i.bed").write_text(
        "chr0\t100\t220\tplus\t0\t+\nchr1\t100\t220\tminus\t0\t-\nchr0\t150\t160\tagain\t0\t+\n"
    )
    given = ["predict", f"sequences={genome / 'g.fa'}", f"ckpt={trained / 'model.ckpt'}"]
    assert run(*given, f"out={tmp_path / 'w'}") == 0
    assert {path.name for path in (tmp_path / "w" / "tracks").iterdir()} == {
        "sum.bedgraph", "part.bedgraph",
    }  # fmt: skip
    assert run(*given, f"out={tmp_path / 'w2'}", "outputs=[tsv,bigwig]") == 0
    assert run(*given, f"intervals={tmp_path / 'i.bed'}", f"out={tmp_path / 'i'}",
               "outputs=[bigwig,tsv]") == 0  # fmt: skip
    with pyBigWig.open(str(tmp_path / "w2" / "tracks" / "sum.bw")) as file:
        whole = np.array(file.values("chr0", 0, 600))
        assert not np.isnan(whole).any()
    splits = pd.read_csv(trained / "splits.tsv", sep="\t").set_index("id")["split"]
    tested = splits.index[splits == "test"][0]
    one, two = (
        values_of(folder / "tracks" / "sum.bedgraph", tested)
        for folder in (trained, tmp_path / "w")
    )
    assert one == pytest.approx(two, abs=2e-5)
    with pyBigWig.open(str(tmp_path / "i" / "tracks" / "sum.bw")) as file:
        assert np.isnan(file.values("chr0", 0, 100)).all()
        part = np.array(file.values("chr0", 100, 220))
        assert np.corrcoef(part, whole[100:220])[0, 1] > 0.9  # other windows, other neighbours
        turned_part = np.array(file.values("chr1", 100, 220))
    forward = (tmp_path / "i.bed").read_text().replace("-\n", "+\n")
    (tmp_path / "f.bed").write_text(forward)
    assert run(*given, f"intervals={tmp_path / 'f.bed'}", f"out={tmp_path / 'f'}",
               "outputs=[bigwig]") == 0  # fmt: skip
    with pyBigWig.open(str(tmp_path / "f" / "tracks" / "sum.bw")) as file:
        assert turned_part == pytest.approx(np.array(file.values("chr1", 100, 220)), abs=1e-4)
    table = pd.read_csv(tmp_path / "i" / "predictions.tsv", sep="\t").set_index("id")
    with pyBigWig.open(str(tmp_path / "i" / "tracks" / "sum.bw")) as file:
        mean = np.mean(file.values("chr1", 100, 220))
    assert table.loc["minus", "mean_sum"] == pytest.approx(mean, abs=1e-4)


def test_a_broken_motif_lowers_the_track(genome, trained, tmp_path):
    text = (genome / "g.fa").read_text().split("\n")[1]
    place = text.index(MOTIF, 50)
    (tmp_path / "v.vcf").write_text(
        "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
        f"chr0\t{place + 2}\tbreaks\tA\tC\t.\t.\t.\n"
    )
    (tmp_path / "p.bed").write_text(f"chr0\t{place - 30}\t{place + 36}\tm\t0\t+\n")
    given = [f"sequences={genome / 'g.fa'}", f"ckpt={trained / 'model.ckpt'}"]
    assert run("variants", *given, f"variants={tmp_path / 'v.vcf'}", f"out={tmp_path / 'v'}") == 0
    row = pd.read_csv(tmp_path / "v" / "variants.tsv", sep="\t").iloc[0]
    assert row["delta_sum"] < -0.05
    assert row["delta_part"] < -0.5
    assert run("saliency", *given, f"intervals={tmp_path / 'p.bed'}", "class=sum", "logos=0",
               f"out={tmp_path / 's'}") == 0  # fmt: skip
    table = pd.read_csv(tmp_path / "s" / "saliency.tsv", sep="\t")
    inside = table["position"].between(place, place + 5)
    assert table["mutagenesis"][inside].mean() > 4 * table["mutagenesis"][~inside].abs().mean()


def test_tracks_go_on_from_a_pretrained_network(genome, tmp_path, capsys):
    small = ["model.dim=16", "model.depth=1", "model.num_heads=2", "context=128", "epochs=1",
             "logger=none", "trainer.progress=false"]  # fmt: skip
    assert run("pretrain", f"sequences={genome / 'g.fa'}", "markov=1", "stem=none",
               f"out={tmp_path / 'p'}", *small) == 0  # fmt: skip
    given = ["train", f"sequences={genome / 'g.fa'}", "task=tracks", "leaks=false", "baselines=[]",
             f"task.files=[{genome / 'sum.bw'}]", "window_overlap=0", *small]  # fmt: skip
    code = run(*given, f"pretrained={tmp_path / 'p' / 'model.ckpt'}", "freeze=true",
               f"out={tmp_path / 't'}")  # fmt: skip
    assert code == 0
    assert "new: head" in capsys.readouterr().out
    one, two = (
        torch.load(tmp_path / name / "model.ckpt", weights_only=True)["state_dict"]
        for name in ("p", "t")
    )
    body = [name for name in one if name.startswith(("stem.", "encoder."))]
    assert body
    assert all(torch.equal(one[name], two[name]) for name in body)
    assert run("embed", f"sequences={genome / 'g.fa'}", f"ckpt={tmp_path / 't' / 'model.ckpt'}",
               "per=base", f"out={tmp_path / 'e'}") == 0  # fmt: skip
    content = torch.load(tmp_path / "t" / "model.ckpt", weights_only=True)
    del content["metadata"]["task"]
    torch.save(content, tmp_path / "old.ckpt")
    assert run("predict", f"sequences={genome / 'g.fa'}", f"ckpt={tmp_path / 'old.ckpt'}") == 2
    assert "old.ckpt was written by another version" in capsys.readouterr().err


def test_turned_windows_have_their_numbers_turned(memory_store, tmp_path):
    store = memory_store({"chr1": "ACGTTGCAAC", "chr2": "GGGTTTACCA"})
    path = write_bedgraph(tmp_path / "a.bedgraph", [
        (name, n, n + 1, encode(store._text[row][n])[0])
        for row, name in enumerate(store.ids) for n in range(10)
    ])  # fmt: skip
    table = pd.DataFrame({"id": list(store.ids)})
    signals = Signals([path], table, store.lengths, missing="skip")
    windows = WindowDataset(store, [0, 1], context=4, reverse_complement=True, seed=2)
    data = TrackWindows(windows, signals, {0: 0, 1: 1})
    seen = set()
    for epoch in range(4):
        data.set_epoch(epoch)
        for index in range(len(data)):
            item, flipped = data[index], bool(windows.flips()[index])
            bases = item.inputs.numpy().astype(int)
            own = 5 - bases if flipped else bases  # of A C G T, 1 to 4, the other one's number
            assert item.target[:, 0].tolist() == own.tolist()
            seen.add(flipped)
    assert seen == {True, False}
    batch = pack([data[0], data[1]])
    assert batch.targets.shape == (8, 1)


def test_another_process_opens_a_bigwig_anew(genome, monkeypatch):
    """Processes that share an open file move each other's place in it."""
    file = open_track(genome / "sum.bw")
    opened, before = file._open(), file.read("chr0", 5, 90)
    assert file._open() is opened
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert file._open() is not opened
    np.testing.assert_array_equal(file.read("chr0", 5, 90), before)


def test_unknown_bases_count_nowhere():
    objective = Tracks(("a", "b"), (1.0, 10.0), (2.0, 5.0))
    outputs = torch.tensor([[0.5, 1.0], [0.0, -1.0], [2.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[2.0, np.nan], [np.nan, np.nan], [3.0, 20.0]])
    loss = objective.loss(outputs, targets)
    assert float(loss.detach()) == pytest.approx((0 + (2 - 1) ** 2 + (0 - 2) ** 2) / 3)
    loss.backward()
    assert outputs.grad[0, 1] == outputs.grad[1].abs().max() == 0
    assert float(objective.loss(outputs.detach(), targets * np.nan)) == 0
    assert objective.evaluate(np.zeros((3, 2)), np.full((3, 2), np.nan)) is None
    assert read_tracks(objective.plain()) == objective


def test_a_linear_rule_of_the_bases_around_is_found():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=4)
    examples = []
    for _ in range(6):
        bases = rng.integers(1, 5, 300).astype(np.uint8)
        values = np.zeros((300, 1))
        values[:-3, 0] = weights[bases[3:] - 1]  # the base three behind
        examples.append((bases, values))
    found = fit_around(iter(examples[:5]), both_strands=False)
    bases, values = examples[5]
    assert pearsonr(found.predict(bases)[:-3, 0], values[:-3, 0]).statistic > 0.999
    both = fit_around(iter(examples[:5]), both_strands=True)
    other = both.predict(5 - bases[::-1])[::-1]
    assert both.predict(bases) == pytest.approx(other, abs=1e-8)
