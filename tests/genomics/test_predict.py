"""predict and export through the command line: intervals, every output read back."""

import gzip
import json
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyBigWig
import pytest
import torch
import zarr

from pipelines.genomics import scoring
from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import decode, encode
from pipelines.genomics.data import cut_windows
from pipelines.genomics.ingest import ingest
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.outputs import read_embeddings
from pipelines.genomics.tokenizers import BaseTokenizer, KmerTokenizer, digest, train_bpe
from pipelines.shared.batch import Example, pack
from pipelines.shared.checkpoint import save_model
from pipelines.shared.inference import predict
from pipelines.shared.objective import Classification

CONTEXT, OVERLAP = 40, 10


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def text_of(bases: int, seed: int) -> str:
    return decode(np.random.default_rng(seed).integers(1, 5, bases).astype(np.uint8))


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    records = {"chr2": text_of(230, 0), "chr1": text_of(35, 1), "chrM": text_of(100, 2)}
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    path.write_text("".join(f">{name} made up\n{text}\n" for name, text in records.items()))
    return path, records


@pytest.fixture(scope="module")
def network() -> DnaClassifier:
    torch.manual_seed(0)
    pattern = "SlidingWindow(radius=4) | GlobalTokens(2)"
    return DnaClassifier(dim=16, depth=1, num_heads=2, pattern=pattern, num_classes=2).eval()


@pytest.fixture(scope="module")
def ckpt(network: DnaClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.ckpt"
    tokenizer = BaseTokenizer()
    metadata = {
        "task": Classification(("no", "yes")).plain(),
        "context": CONTEXT,
        "overlap": OVERLAP,
        "tokenizer": tokenizer.config,
        "tokenizer_digest": digest(tokenizer),
    }
    save_model(path, network, task="genomics", metadata=metadata)
    return path


def logits_of(network: DnaClassifier, text: str) -> np.ndarray:
    """One window's logits, with nothing of the pipeline but the network."""
    tokens = BaseTokenizer().encode(np.array(["-ACGTN".index(c) for c in text], dtype=np.uint8))
    coords = torch.from_numpy(tokens.starts)[:, None]
    batch = pack([Example(torch.from_numpy(tokens.ids), coords, None, "x", "x", 0)])
    with torch.no_grad():
        return network(batch).logits[0].numpy()


def probability(network: DnaClassifier, text: str) -> float:
    """Of class yes: from the mean logits of the text's windows."""
    _, starts, ends = cut_windows(np.array([len(text)]), CONTEXT, OVERLAP)
    logits = np.mean([logits_of(network, text[a:b]) for a, b in zip(starts, ends, strict=True)], 0)
    return float(torch.from_numpy(logits).double().softmax(-1)[1])


OTHER_STRAND = str.maketrans("ACGT", "TGCA")


def test_records_in_input_order_and_every_output(genome, network, ckpt, tmp_path):
    path, records = genome
    kinds = "outputs=[tsv,parquet,embeddings,bedgraph,bigwig]"
    assert run("predict", f"sequences={path}", f"ckpt={ckpt}", f"out={tmp_path}", kinds) == 0
    table = pd.read_csv(tmp_path / "predictions.tsv", sep="\t")
    assert table["id"].tolist() == list(records)
    assert table[["start", "end"]].values.tolist() == [[0, 230], [0, 35], [0, 100]]
    assert table["num_windows"].tolist() == [8, 1, 3]
    for found, text in zip(table["probability_yes"], records.values(), strict=True):
        assert found == pytest.approx(probability(network, text), abs=2e-6)
    again = pd.read_parquet(tmp_path / "predictions.parquet")
    assert again["id"].tolist() == table["id"].tolist()
    assert np.allclose(again["probability_no"], table["probability_no"])
    ids, vectors = read_embeddings(tmp_path / "embeddings.zarr")
    assert ids == list(records)
    assert vectors.shape[0] == 3
    group = zarr.open_group(tmp_path / "embeddings.zarr", mode="r")
    assert bytes(group["contigs"][:]).decode().split() == list(records)
    assert [group["start"][:].tolist(), group["end"][:].tolist()] == [[0, 0, 0], [230, 35, 100]]
    with torch.no_grad():
        head = network.head(torch.from_numpy(vectors[1:2]))[0].numpy()
    assert np.allclose(head, logits_of(network, records["chr1"]), atol=1e-5)
    assert (tmp_path / "failures.csv").read_text().count("\n") == 1
    assert not (tmp_path / "parts").exists()


def test_tracks_have_the_mean_of_the_windows_over_a_base(genome, network, ckpt, tmp_path):
    path, records = genome
    kinds = "outputs=[bedgraph,bigwig]"
    assert run("predict", f"sequences={path}", f"ckpt={ckpt}", f"out={tmp_path}", kinds) == 0
    text = records["chr2"]
    _, starts, ends = cut_windows(np.array([len(text)]), CONTEXT, OVERLAP)
    scores = [
        torch.from_numpy(logits_of(network, text[a:b])).double().softmax(-1)[1].item()
        for a, b in zip(starts, ends, strict=True)
    ]
    wanted = np.array(
        [
            np.mean([s for s, a, b in zip(scores, starts, ends, strict=True) if a <= base < b])
            for base in range(len(text))
        ]
    )
    with pyBigWig.open(str(tmp_path / "tracks" / "yes.bw")) as file:
        assert list(file.chroms()) == list(records)
        assert np.allclose(file.values("chr2", 0, len(text)), wanted, atol=2e-6)
    rows = pd.read_csv(
        tmp_path / "tracks" / "yes.bedgraph", sep="\t", skiprows=1, header=None, dtype={0: str}
    )
    mine = rows[rows[0] == "chr2"]
    assert (mine[1].to_numpy()[1:] >= mine[2].to_numpy()[:-1]).all()
    assert np.allclose(np.repeat(mine[3], mine[2] - mine[1]), wanted, atol=2e-6)


def test_intervals_keep_their_order_label_and_coordinates(genome, network, ckpt, tmp_path):
    path, records = genome
    rows = [
        "M\t90\t100\tlast\t0\t+\tyes",
        "2\t10\t60\tfirst\t0\t-\tno",
        "2\t200\t300\tout\t0\t+\tno",
    ]
    bed = tmp_path / "mine.bed"
    bed.write_text("#chrom\tstart\tend\tname\tscore\tstrand\tclass\n" + "\n".join(rows) + "\n")
    out = tmp_path / "out"
    code = run(
        "predict", f"sequences={path}", f"intervals={bed}", f"ckpt={ckpt}", f"out={out}",
        "columns.label=class", "outputs=[tsv,bedgraph]",
    )  # fmt: skip
    assert code == 3
    table = pd.read_csv(out / "predictions.tsv", sep="\t", dtype={"contig": str})
    assert table["id"].tolist() == ["last", "first"]
    assert table["contig"].tolist() == ["M", "2"]
    assert table[["start", "end"]].values.tolist() == [[90, 100], [10, 60]]
    assert table["label"].tolist() == ["yes", "no"]
    backward = records["chr2"][10:60].translate(OTHER_STRAND)[::-1]
    expected = [probability(network, records["chrM"][90:]), probability(network, backward)]
    assert np.allclose(table["probability_yes"], expected, atol=2e-6)
    failures = pd.read_csv(out / "failures.csv")
    assert failures["id"].tolist() == ["out"]
    assert failures["path"].tolist() == [f"{bed}: line 4"]
    tracks = (out / "tracks" / "yes.bedgraph").read_text().splitlines()[1:]
    covered = {tuple(line.split("\t")[:3]) for line in tracks}
    assert ("chrM", "90", "100") in covered
    # the strand is -: its first window ends where the interval does
    assert ("chr2", "50", "60") in covered


def test_what_is_odd_of_an_interval_is_flagged(ckpt, tmp_path):
    (tmp_path / "genome.fa").write_text(">a\nACGTNNRACGT\n")
    (tmp_path / "mine.bed").write_text("a\t0\t4\na\t2\t8\na\t8\t14\n")
    code = run(
        "predict", f"sequences={tmp_path / 'genome.fa'}", f"intervals={tmp_path / 'mine.bed'}",
        f"ckpt={ckpt}", f"out={tmp_path / 'out'}", "past_end=pad_n",
    )  # fmt: skip
    assert code == 0
    table = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t", keep_default_na=False)
    assert table["flags"].tolist() == [
        "",
        "3 ambiguous bases",
        "padded with N; 3 ambiguous bases",
    ]


def test_labels_of_a_table_stand_beside_the_predictions(genome, ckpt, tmp_path):
    _, records = genome
    rows = [
        f"{name},{text},{kind}" for (name, text), kind in zip(records.items(), "nyn", strict=True)
    ]
    (tmp_path / "test.csv").write_text("\n".join(["id,sequence,class", *rows]) + "\n")
    given = [f"sequences={tmp_path / 'test.csv'}", f"ckpt={ckpt}", f"out={tmp_path / 'out'}"]
    assert run("predict", *given, "columns.label=class") == 0
    table = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert table["id"].tolist() == list(records)
    assert table["label"].tolist() == ["n", "y", "n"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(genome, ckpt, tmp_path, capsys):
    path, _ = genome
    out = tmp_path / "out"
    code = run("predict", f"sequences={path}", f"ckpt={ckpt}", f"out={out}", "dry_run=true")
    assert code == 0
    assert "records: 3, bases: 365, windows: 12" in capsys.readouterr().out
    assert not out.exists()


def test_a_finished_run_is_not_repeated_and_another_is_refused(genome, ckpt, tmp_path, capsys):
    path, _ = genome
    given = ["predict", f"sequences={path}", f"ckpt={ckpt}", f"out={tmp_path}"]
    assert run(*given) == 0
    before = (tmp_path / "predictions.tsv").stat().st_mtime_ns
    assert run(*given) == 0
    assert "holds these predictions already" in capsys.readouterr().out
    assert (tmp_path / "predictions.tsv").stat().st_mtime_ns == before
    assert run(*given, "max_tokens=50") == 2


def test_an_interrupted_run_goes_on_where_it_was(ckpt, tmp_path, monkeypatch):
    fasta = tmp_path / "long.fa"
    fasta.write_text(f">long\n{text_of(2_710, 3)}\n")
    given = ["predict", f"sequences={fasta}", f"ckpt={ckpt}", "max_tokens=40"]
    predicted = []

    def counted(*arguments, stop, **settings):
        for prediction in predict(*arguments, **settings):
            predicted.append(prediction)
            if len(predicted) == stop:
                raise KeyboardInterrupt
            yield prediction

    def run_until(out: str, stop: int | None) -> int:
        predicted.clear()
        monkeypatch.setattr(scoring, "predict", partial(counted, stop=stop))
        return run(*given, f"out={tmp_path / out}")

    assert run_until("halted", 70) == 130
    parts = list((tmp_path / "halted" / "parts").glob("*.npz"))
    assert len(parts) == 70 // 32
    assert not (tmp_path / "halted" / "predictions.tsv").exists()
    assert run_until("halted", None) == 0
    total, taken_up = 90, len(predicted)
    assert taken_up == total - 70 // 32 * 32
    assert run_until("whole", None) == 0
    assert len(predicted) == total
    halted, whole = (tmp_path / name / "predictions.tsv" for name in ("halted", "whole"))
    assert halted.read_bytes() == whole.read_bytes()


def test_sequences_come_out_as_they_went_in(tmp_path):
    lines = [">a one\n", "ACGTNacgtnRY\n", "acgt\n", ">b\n", "NNNNNNNNNNNN\n", "NNNNNNNNNNNN\n"]
    fasta = tmp_path / "in.fa"
    fasta.write_text("".join(lines))
    code = run("export", f"sequences={fasta}", f"out={tmp_path / 'out'}", "line_width=12")
    assert code == 0
    assert (tmp_path / "out" / "sequences.fa").read_bytes() == fasta.read_bytes()
    code = run(
        "export", f"store={tmp_path / 'out' / 'store'}", f"out={tmp_path / 'gz'}",
        "line_width=0", "compress=true",
    )  # fmt: skip
    assert code == 0
    with gzip.open(tmp_path / "gz" / "sequences.fa.gz", "rt") as file:
        assert file.read() == ">a one\nACGTNacgtnRYacgt\n>b\n" + "N" * 24 + "\n"


def test_intervals_are_cut_with_their_coordinates(genome, tmp_path):
    path, records = genome
    gff = tmp_path / "genes.gff"
    rows = [("chr2", 11, 20, "-"), ("chr2", 31, 40, "-"), ("chr1", 1, 5, "+")]
    gff.write_text(
        "##gff-version 3\n"
        + "".join(f"{c}\ts\tCDS\t{a}\t{b}\t.\t{s}\t0\tID={c}\n" for c, a, b, s in rows)
    )
    out = tmp_path / "out"
    assert run("export", f"sequences={path}", f"intervals={gff}", f"out={out}") == 0
    spliced = (records["chr2"][10:20] + records["chr2"][30:40]).translate(OTHER_STRAND)[::-1]
    assert (out / "intervals.fa").read_text() == (
        f">chr2 chr2:10-40(-)\n{spliced}\n>chr1 chr1:0-5(+)\n{records['chr1'][:5]}\n"
    )
    table = pd.read_csv(out / "intervals.tsv", sep="\t")
    assert table["parts"].tolist() == ["30-40(-),10-20(-)", "0-5(+)"]


@pytest.mark.real_data
def test_a_soft_masked_chromosome_comes_out_bit_for_bit(real_data, tmp_path):
    source = real_data / "genomes" / "celegans_augustus_chrI_1Mb_softmasked.fa.gz"
    with gzip.open(source, "rt") as file:
        text = file.read()
    width = len(text.split("\n", 2)[1])
    assert run("export", f"sequences={source}", f"out={tmp_path}", f"line_width={width}") == 0
    assert (tmp_path / "sequences.fa").read_text() == text


@pytest.mark.real_data
def test_genes_of_a_circular_virus_are_predicted(real_data, ckpt, tmp_path):
    genomes = real_data / "genomes"
    store = ingest(genomes / "phix174_NC_001422.gbk", tmp_path / "store", progress=False)
    code = run(
        "predict", f"store={store.path}", f"intervals={genomes / 'phix174_NC_001422.gbk'}",
        "feature=CDS", "columns.label=product", f"ckpt={ckpt}", f"out={tmp_path / 'out'}",
        "outputs=[tsv,bigwig]",
    )  # fmt: skip
    assert code == 0
    table = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    assert len(table) == 11
    assert table["parts"].str.contains(",").sum() == 3
    with pyBigWig.open(str(tmp_path / "out" / "tracks" / "yes.bw")) as file:
        assert file.chroms() == {"NC_001422.1": 5386}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["rows"] == 11


TOKENIZERS = {
    "words that slide": lambda: KmerTokenizer(3, stride=1),
    "words end to end": lambda: KmerTokenizer(4, stride=4),
    "byte pairs": lambda: train_bpe([encode(text_of(9_000, 5))], vocab_size=80, max_bases=9_000),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_model_brings_its_tokenizer(name, genome, tmp_path):
    path, records = genome
    tokenizer = TOKENIZERS[name]()
    pattern = "SlidingWindow(radius=9) | GlobalTokens(1)"
    torch.manual_seed(0)
    network = DnaClassifier(
        dim=8, depth=1, num_heads=1, pattern=pattern, num_classes=2, num_tokens=tokenizer.num_tokens
    ).eval()
    metadata = {"task": Classification(("no", "yes")).plain(), "context": 300, "overlap": 0}
    metadata |= {"tokenizer": tokenizer.config, "tokenizer_digest": digest(tokenizer)}
    save_model(tmp_path / "model.ckpt", network, task="genomics", metadata=metadata)
    out = tmp_path / "out"
    given = [f"sequences={path}", f"ckpt={tmp_path / 'model.ckpt'}", f"out={out}"]
    assert run("predict", *given) == 0
    table = pd.read_csv(out / "predictions.tsv", sep="\t")
    for found, text in zip(table["probability_yes"], records.values(), strict=True):
        tokens = tokenizer.encode(encode(text))
        coords = torch.from_numpy(tokens.starts)[:, None]
        batch = pack([Example(torch.from_numpy(tokens.ids), coords, None, "x", "x", 0)])
        with torch.no_grad():
            expected = network(batch).logits[0].double().softmax(-1)[1].item()
        assert found == pytest.approx(expected, abs=2e-6)
