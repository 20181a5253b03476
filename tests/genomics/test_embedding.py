"""The verb embed: vectors of sequences and of bases."""

import numpy as np
import pandas as pd
import pytest
import torch
import zarr

from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import decode, encode
from pipelines.genomics.data import cut_windows
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.outputs import read_embeddings
from pipelines.genomics.tokenizers import BaseTokenizer, digest
from pipelines.shared.batch import Example, pack
from pipelines.shared.checkpoint import save_model
from pipelines.shared.objective import Classification

CONTEXT, OVERLAP = 50, 10
TEXTS = {
    f"r{size}": decode(np.random.default_rng(size).integers(1, 5, size).astype(np.uint8))
    for size in (33, 120, 50)
}


def run(*arguments):
    return main([str(argument) for argument in arguments])


def save(path, *, stem_stride=1, classes=True):
    torch.manual_seed(0)
    network = DnaClassifier(
        dim=16, depth=2, num_heads=2, pattern="SlidingWindow(radius=4) | GlobalTokens(2)",
        num_classes=2, stem_stride=stem_stride,
    ).eval()  # fmt: skip
    metadata = {"context": CONTEXT, "overlap": OVERLAP, "tokenizer": BaseTokenizer().config,
                "tokenizer_digest": digest(BaseTokenizer()), "guess": "masked"}  # fmt: skip
    metadata |= {"task": Classification(("no", "yes")).plain()} if classes else {}
    save_model(path, network, task="genomics", metadata=metadata)
    return network


def expected(network, text):
    """Vectors of the bases: means over the windows that hold them."""
    total, count = np.zeros((len(text), 16)), np.zeros(len(text))
    for _, start, end in zip(*cut_windows(np.array([len(text)]), CONTEXT, OVERLAP), strict=True):
        bases = torch.from_numpy(encode(text[start:end]))
        coords = torch.arange(end - start)[:, None]
        with torch.no_grad():
            found = network.encode(pack([Example(bases, coords, None, "", "", 0)]))
        total[start:end] += found.numpy()
        count[start:end] += 1
    return total / count[:, None]


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "r.fa"
    path.write_text("".join(f">{name}\n{text}\n" for name, text in TEXTS.items()))
    return path


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("max_tokens", [60, 10_000])
def test_vectors_of_sequences_are_means_over_their_bases(fasta, tmp_path, classes, max_tokens):
    network = save(tmp_path / "m.ckpt", classes=classes)
    code = run("embed", f"sequences={fasta}", f"ckpt={tmp_path / 'm.ckpt'}",
               f"out={tmp_path / 'o'}", f"max_tokens={max_tokens}")  # fmt: skip
    assert code == 0
    names, vectors = read_embeddings(tmp_path / "o" / "embeddings.zarr")
    assert names == list(TEXTS)
    for vector, text in zip(vectors, TEXTS.values(), strict=True):
        assert vector == pytest.approx(expected(network, text).mean(0), abs=1e-5)
    assert pd.read_csv(tmp_path / "o" / "sequences.tsv", sep="\t")["id"].tolist() == names


def test_every_base_of_an_interval_has_its_vector(fasta, tmp_path):
    network = save(tmp_path / "m.ckpt")
    (tmp_path / "p.bed").write_text("r120\t10\t110\ta\nr50\t5\t25\tb\n")
    code = run("embed", f"sequences={fasta}", f"intervals={tmp_path / 'p.bed'}", "per=base",
               f"ckpt={tmp_path / 'm.ckpt'}", f"out={tmp_path / 'o'}")  # fmt: skip
    assert code == 0
    group = zarr.open_group(tmp_path / "o" / "embeddings.zarr", mode="r")
    assert group["offsets"][:].tolist() == [0, 100, 120]
    assert bytes(group["contigs"][:]) == b"r120\nr50\n"
    assert [group["start"][:].tolist(), group["end"][:].tolist()] == [[10, 5], [110, 25]]
    one, two = group["embeddings"][:100], group["embeddings"][100:]
    assert one == pytest.approx(expected(network, TEXTS["r120"][10:110]), abs=1e-5)
    assert two == pytest.approx(expected(network, TEXTS["r50"][5:25]), abs=1e-5)


def test_tokens_of_several_bases_have_none_for_each(fasta, tmp_path, capsys):
    save(tmp_path / "m.ckpt", stem_stride=3)
    given = ["embed", f"sequences={fasta}", f"ckpt={tmp_path / 'm.ckpt'}", f"out={tmp_path / 'o'}"]
    assert run(*given, "per=base") == 2
    assert "per=sequence" in capsys.readouterr().err
    assert run(*given, "per=word") == 2
    assert "sequence or base" in capsys.readouterr().err
    assert run(*given) == 0
    assert read_embeddings(tmp_path / "o" / "embeddings.zarr")[1].shape == (3, 16)
