"""saliency on a network whose motif is known."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import zarr
from PIL import Image

from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import decode, encode, reverse_complement
from pipelines.genomics.attribution import (
    importance,
    input_gradient,
    log_odds,
    mutate_in_silico,
    own_gradient,
)
from pipelines.genomics.model import DnaClassifier
from pipelines.shared.batch import Example, pack
from tests.genomics.known_motif import MOTIF, WITH, WITHOUT, build, save

SECOND, THIRD = (partial(log_odds, column=column) for column in (1, 2))
PLACE = slice(20, 20 + len(MOTIF))


def run(*arguments):
    return main([str(argument) for argument in arguments])


def turned(text):
    return decode(reverse_complement(encode(text)))


@pytest.fixture(scope="module")
def text():
    """40 bases without the motif on any strand but at 20, and without near misses."""
    return "GGCCTGCAGGCCTCCGGACC" + MOTIF + "GGCCTCGAGGCCAG"


def score_of(network, text, column=1):
    bases = torch.from_numpy(encode(text))
    batch = pack([Example(bases, torch.arange(len(text))[:, None], None, "", "", 0)])
    with torch.no_grad():
        return float(log_odds(network(batch).logits[0], column))


def test_the_network_is_what_it_is_said_to_be(text):
    network = build("none")
    assert score_of(network, text) == pytest.approx(WITH, abs=0.1)
    assert score_of(network, text.replace(MOTIF, "CCCCCC")) == pytest.approx(WITHOUT, abs=0.1)
    assert score_of(network, text.replace(MOTIF, "TATAGG")) == pytest.approx(WITHOUT, abs=0.1)


def test_changing_a_base_of_the_motif_takes_the_score_away(text):
    network, bases = build("none"), encode(text)
    changes = mutate_in_silico(
        network, bases, SECOND, positions=np.arange(len(text)), max_tokens=999
    )
    own = np.zeros((len(text), 4), dtype=bool)
    own[np.arange(len(text)), bases - 1] = True
    assert (changes[own] == 0).all()
    inside = np.zeros(len(text), dtype=bool)
    inside[PLACE] = True
    assert changes[inside[:, None] & ~own] == pytest.approx(WITHOUT - WITH, abs=0.2)
    assert changes[~inside] == pytest.approx(0, abs=0.2)
    added = importance(changes)
    assert added[inside] == pytest.approx(WITH - WITHOUT, abs=0.2)


def test_changes_are_those_of_changed_sequences(text):
    torch.manual_seed(0)
    pattern = "SlidingWindow(radius=5) | GlobalTokens(2)"
    network = DnaClassifier(dim=16, depth=2, num_heads=2, pattern=pattern, num_classes=3).eval()
    with_n = text[:5] + "N" + text[6:]
    asked = np.array([3, 5, 25])
    changes = mutate_in_silico(network, encode(with_n), THIRD, positions=asked, max_tokens=100)
    assert np.isnan(changes[[0, 4, 5, 26]]).all()
    for at in (3, 25):
        for column, letter in enumerate("ACGT"):
            changed = with_n[:at] + letter + with_n[at + 1 :]
            expected = score_of(network, changed, 2) - score_of(network, with_n, 2)
            assert changes[at, column] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("strand", ["+", "-"])
def test_gradients_point_at_the_motif_on_either_strand(text, strand):
    network = build("average")
    given = text if strand == "+" else turned(text)
    inside = np.zeros(len(text), dtype=bool)
    inside[PLACE] = True
    inside = inside if strand == "+" else inside[::-1]
    gradient = input_gradient(network, encode(given), SECOND)
    assert gradient.sum(axis=1) == pytest.approx(0, abs=1e-9)
    added = own_gradient(gradient, encode(given))
    assert added[inside].min() > 2
    assert np.abs(gradient[~inside]).max() < 0.1


@pytest.mark.parametrize("stem", ["convolution", "none"])
@pytest.mark.parametrize("rc", ["none", "equivariant"])
def test_gradients_are_differences_in_the_limit(text, stem, rc):
    """Of scores at bases that are mixed a little, as far as the stem can be given such."""
    torch.manual_seed(1)
    network = DnaClassifier(
        dim=16, depth=1, num_heads=2, pattern="SlidingWindow(radius=5)", num_classes=2, rc=rc,
        stem=stem,
    )  # fmt: skip
    network.double().eval()
    bases = encode(text)
    gradient = input_gradient(network, bases, SECOND)
    step, at = 1e-5, 17
    found = []
    for letter in (1, 2, 3, 4):
        scores = []
        for sign in (1, -1):

            def mixed(_, given, sign=sign, letter=letter):
                changed = given[0].clone()
                changed[0, letter, at] += sign * step
                return (changed,)

            def mixed_vectors(module, _, vectors, sign=sign, letter=letter):
                changed = vectors.clone()
                changed[at] += sign * step * module.weight[letter]
                return changed

            if stem == "convolution":
                hook = network.stem.convolution.register_forward_pre_hook(mixed)
            else:
                hook = network.stem.embedding.register_forward_hook(mixed_vectors)
            scores.append(score_of(network, text))
            hook.remove()
        found.append((scores[0] - scores[1]) / (2 * step))
    assert gradient[at] == pytest.approx(np.array(found) - np.mean(found), abs=1e-6)


def test_maps_are_written_with_the_places_of_the_genome(text, tmp_path):
    other = "GGCCTCCGGACCTGGCCTCAGGCCTCAGGCCTGGCCAGGC"
    (tmp_path / "g.fa").write_text(f">chr1\n{other}{text}{other}\n>chr2\n{other * 3}\n")
    rows = ["chr1\t40\t80\tplus\t0\t+", "chr1\t40\t80\tminus\t0\t-", "chr2\t0\t90\tlong\t0\t+"]
    (tmp_path / "p.bed").write_text("\n".join(rows) + "\n")
    out = tmp_path / "out"
    code = run("saliency", f"sequences={tmp_path / 'g.fa'}", f"intervals={tmp_path / 'p.bed'}",
               f"ckpt={save(tmp_path / 'm.ckpt')}", f"out={out}")  # fmt: skip
    assert code == 3
    assert pd.read_csv(out / "failures.csv")["status"].tolist() == ["too_long"]
    table = pd.read_csv(out / "saliency.tsv", sep="\t")
    plus, minus = (table[table["id"] == name] for name in ("plus", "minus"))
    assert plus["position"].tolist() == list(range(40, 80))
    assert minus["position"].tolist() == list(range(79, 39, -1))
    assert "".join(minus["base"]) == turned("".join(plus["base"])) == turned(text)
    for one in (plus, minus):
        important = one[one["mutagenesis"] > 3]["position"]
        assert sorted(important) == list(range(60, 60 + len(MOTIF)))
        assert sorted(one[one["gradient"] > 1]["position"]) == sorted(important)
    backwards = minus.iloc[::-1]
    for kind in ("mutagenesis", "gradient"):
        assert plus[kind].to_numpy() == pytest.approx(backwards[kind].to_numpy(), abs=1e-5)
    group = zarr.open_group(out / "saliency.zarr", mode="r")
    assert group["offsets"][:].tolist() == [0, 40, 80]
    assert decode(group["bases"][:40]) == text
    assert group["mutagenesis"].shape == group["gradient"].shape == (80, 4)
    logos = sorted(path.name for path in (out / "logos").iterdir())
    assert logos == ["0_plus.png", "1_minus.png"]
    with Image.open(out / "logos" / logos[0]) as picture:
        assert len(picture.convert("L").getcolors()) > 50


def test_only_the_middle_is_changed_if_asked(text, tmp_path):
    (tmp_path / "r.fa").write_text(f">a\n{text}\n")
    code = run("saliency", f"sequences={tmp_path / 'r.fa'}", f"ckpt={save(tmp_path / 'm.ckpt')}",
               f"out={tmp_path / 'o'}", "focus=10", "logos=0", "class=no")  # fmt: skip
    assert code == 0
    table = pd.read_csv(tmp_path / "o" / "saliency.tsv", sep="\t")
    assert table["position"].tolist() == list(range(15, 25))
    assert table["mutagenesis"].min() < -3  # the motif speaks against `no`
    assert not (tmp_path / "o" / "logos").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["class=maybe"], ["no, yes", "maybe"]),
        (["focus=0"], ["focus", "1 or more"]),
        (["logos=-1"], ["logos"]),
    ],
    ids=str,
)
def test_bad_commands_are_named(text, tmp_path, capsys, arguments, words):
    (tmp_path / "r.fa").write_text(f">a\n{text}\n")
    code = run("saliency", f"sequences={tmp_path / 'r.fa'}", f"ckpt={save(tmp_path / 'm.ckpt')}",
               f"out={tmp_path / 'o'}", *arguments)  # fmt: skip
    assert code == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error
