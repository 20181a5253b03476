"""Guessing bases: what is asked, what may be seen, what it is measured against."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import encode, reverse_complement
from pipelines.genomics.baseline import words_of
from pipelines.genomics.data import WindowDataset
from pipelines.genomics.markov import MarkovModel, count_words
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.pretraining import (
    HIDDEN,
    BaseGuesser,
    BitsPerBase,
    HiddenBases,
    Hiding,
    hide,
    next_bases,
)
from pipelines.shared.batch import Example, pack
from pipelines.shared.errors import InputError

QUICK = ["logger=none", "trainer.progress=false", "model.dim=32", "model.depth=1"]
BACK = "(SlidingWindow(radius=8) | GlobalTokens(first=2)) & Causal()"
BOTH = "SlidingWindow(radius=8) | GlobalTokens(first=2)"


def random_bases(size, seed=0, letters=4):
    return np.random.default_rng(seed).integers(1, letters + 1, size).astype(np.uint8)


@pytest.mark.parametrize("span", [1, 3, 10])
def test_bases_are_hidden_at_the_rate_and_in_runs(span):
    bases = random_bases(200_000)
    tokens, targets = hide(bases, Hiding(rate=0.15, span=span), np.random.default_rng(1))
    asked = targets > 0
    assert asked.mean() == pytest.approx(0.15, abs=0.01)
    assert np.array_equal(targets[asked], bases[asked])
    assert np.array_equal(tokens[~asked], bases[~asked])
    assert (tokens[asked] == HIDDEN).mean() == pytest.approx(0.8, abs=0.01)
    changed = asked & (tokens != HIDDEN) & (tokens != bases)
    assert changed.sum() / asked.sum() == pytest.approx(0.1 * 3 / 4, abs=0.01)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], asked.astype(int), [0]])))
    runs = edges[1::2] - edges[::2]
    assert runs[1:-1].min() == span


def test_ambiguous_letters_are_never_asked():
    bases = random_bases(5_000, letters=15)
    for _, targets in (hide(bases, Hiding(rate=0.9), np.random.default_rng(0)), next_bases(bases)):
        assert set(np.unique(targets)) == {0, 1, 2, 3, 4}
    tokens, targets = next_bases(encode("ACNGT"))
    assert tokens.tolist() == [1, 2, 5, 3, 4]
    assert targets.tolist() == [2, 0, 3, 4, 0]


def guesser(guess, pattern, **changed):
    torch.manual_seed(0)
    sizes = {
        "dim": 32,
        "depth": 2,
        "num_heads": 4,
        "stem": "none" if guess == "causal" else "convolution",
    }
    network = DnaClassifier(**{**sizes, **changed}, pattern=pattern, num_classes=1, rc="none")
    return BaseGuesser(network, guess).eval()


def batch_of(tokens, targets, weights=200):
    columns = np.stack([tokens, targets, np.full_like(tokens, weights)], axis=1)
    coords = torch.arange(len(tokens))[:, None]
    return pack([Example(torch.from_numpy(columns), coords, 0, "x", "x", 0)])


@pytest.mark.parametrize("pattern", [BACK, "Causal()"])
def test_a_causal_guess_sees_nothing_of_what_comes(pattern):
    network, bases = guesser("causal", pattern), random_bases(100)
    other = bases.copy()
    other[60:] = 5 - other[60:]
    with torch.no_grad():
        one, two = (network.guesses(batch_of(*next_bases(text))) for text in (bases, other))
    assert torch.equal(one[:60], two[:60])
    assert not torch.allclose(one[60:], two[60:], atol=1e-3)


def test_a_hidden_base_is_not_seen():
    network, bases = guesser("masked", BOTH), random_bases(100)
    with torch.no_grad():
        found = []
        for letter in (1, 2, 3, 4):
            bases[50] = letter
            tokens = bases.copy()
            tokens[50] = HIDDEN
            targets = np.zeros_like(bases)
            targets[50] = letter
            batch = batch_of(tokens, targets)
            found.append(float(network(batch).logits[0, 2]))
        shares = network.guesses(batch)[50].softmax(0)
    assert found == pytest.approx((-shares.log2()).tolist(), abs=1e-4)
    assert sum(2**-bits for bits in found) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("guess", "pattern", "changed", "words"),
    [
        ("causal", BOTH, {}, "look back only"),
        ("causal", "SlidingWindow(radius=3) | Causal()", {}, "look back only"),
        ("causal", BACK, {"stem": "convolution"}, "stem=none or kernel=1"),
        ("masked", BOTH, {"stem_stride": 2}, "stem_stride=1"),
    ],
)
def test_networks_that_see_the_answer_are_refused(guess, pattern, changed, words):
    with pytest.raises(InputError, match=words):
        guesser(guess, pattern, **changed)


@pytest.mark.parametrize("guess", ["masked", "causal"])
@pytest.mark.parametrize("turned", [False, True])
def test_soft_masked_bases_count_less_on_either_strand(memory_store, guess, turned):
    text = "ACGT" * 20 + "ttga" * 20
    store = memory_store({"r": text})
    windows = WindowDataset(store, [0], context=200, reverse_complement=turned, seed=1)
    windows.set_epoch(
        next(e for e in range(20) if windows.set_epoch(e) or windows.flips()[0] == turned)
    )
    item = HiddenBases(windows, Hiding(guess, soft_weight=0.1))[0]
    _, targets, weights = item.inputs.numpy().T
    place = np.flatnonzero(targets) + (guess == "causal")
    upper = place >= 80 if turned else place < 80
    assert set(weights[targets > 0][upper]) == {200}
    assert set(weights[targets > 0][~upper]) == {20}
    batch = pack([item])
    network = guesser("masked", BOTH)
    with torch.no_grad():
        outputs = network(batch).logits
    lost = -network.guesses(batch).log_softmax(1)[torch.arange(160), targets.astype(int) - 1]
    bits, asked = lost.detach().numpy() / np.log(2), targets > 0
    share = np.where(weights == 200, 1.0, 0.1)
    expected = (bits * share)[asked].sum() / share[asked].sum()
    assert float(BitsPerBase().loss(outputs, torch.zeros(1))) == pytest.approx(expected, abs=1e-4)
    score = BitsPerBase().evaluate(outputs.double().numpy(), np.zeros(1))
    assert score == pytest.approx(-bits[asked].mean(), abs=1e-4)


def test_what_is_hidden_depends_on_seed_epoch_and_index_alone(memory_store):
    store = memory_store({"a": "ACGT" * 50, "b": "TTGACA" * 40})

    def drawn(seed, epoch):
        windows = WindowDataset(store, [0, 1], context=100, seed=seed)
        data = HiddenBases(windows, Hiding())
        data.set_epoch(epoch)
        return [data[index].inputs.numpy().tobytes() for index in range(len(data))]

    assert drawn(0, 0) == drawn(0, 0)
    assert len({*drawn(0, 0), *drawn(0, 1), *drawn(1, 0)}) == 3 * len(drawn(0, 0))


@pytest.mark.parametrize("order", [0, 1, 3])
def test_markov_bits_are_those_of_counting_one_by_one(order):
    train, test = random_bases(400, 1), random_bases(300, 2, letters=5)  # N among them
    model = MarkovModel(count_words([train], order, both_strands=False))
    seen = {}
    for at in range(len(train)):
        for size in range(min(order, at) + 1):
            key = (*train[at - size : at], train[at])
            seen[key] = seen.get(key, 0) + 1

    def said(word, base):
        lower = said(word[1:], base) if word else 0.25
        total = sum(seen.get((*word, letter), 0) for letter in (1, 2, 3, 4))
        return (seen.get((*word, base), 0) + 2 * lower) / (total + 2)

    asked = [at for at in range(order, len(test)) if 5 not in test[at - order : at + 1]]
    bits = sum(-np.log2(said(tuple(test[at - order : at]), test[at])) for at in asked)
    assert model.measure(test) == (pytest.approx(bits, rel=1e-5), len(asked))
    for word in product((1, 2, 3, 4), repeat=order):
        assert sum(said(word, base) for base in (1, 2, 3, 4)) == pytest.approx(1)


def test_markov_models_know_long_repeats():
    tokens = np.tile(random_bases(997), 8)
    counts = count_words([tokens], 8, both_strands=True)
    assert counts[8].sum() == 2 * (tokens.size - 8)
    assert MarkovModel(counts).measure(tokens)[0] / tokens.size < 0.3
    assert MarkovModel(counts[:1]).measure(tokens)[0] / tokens.size == pytest.approx(2, abs=0.01)


def test_words_of_13_bases_are_counted_on_both_strands():
    tokens = np.tile(random_bases(50), 3)
    counts = count_words([tokens], 12, both_strands=True)[12].ravel()
    for strand in (tokens, reverse_complement(tokens)):
        words = words_of(strand, 13)
        assert set(counts[words].tolist()) <= {2, 3}
        assert counts[words[0]] == sum(words == words[0])
    assert counts.size == 4**13


def test_words_are_those_of_each_record():
    """However many there are: none spans two of them."""
    records = [random_bases(size) for size in (40, 1, 300, 3)]
    together = count_words(records, 3, both_strands=True)
    apart = [count_words([tokens], 3, both_strands=True) for tokens in records]
    for order in range(4):
        assert np.array_equal(together[order], sum(found[order] for found in apart))
        words = sum(max(tokens.size - order, 0) for tokens in records)
        assert together[order].sum() == 2 * words


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A network that has learned which base follows on which in repeats of eight bases."""
    folder = tmp_path_factory.mktemp("pretrained")
    rng = np.random.default_rng(0)
    lines = [f">r{n}\n{('ACGGTTCA' * 60)[rng.integers(8) :][:400]}\n" for n in range(20)]
    (folder / "r.fa").write_text("".join(lines))
    code = run("pretrain", f"sequences={folder / 'r.fa'}", f"out={folder / 'p'}", "epochs=10",
               "batch_size=4", "context=128", "markov=3", "optim.lr=0.005", *QUICK)  # fmt: skip
    assert code == 0
    return folder / "p"


def test_repeats_are_learned_and_measured_beside_markov_models(backbone):
    metrics = json.loads((backbone / "metrics.json").read_text())
    assert metrics["bits_per_base"] < 1
    assert list(metrics["markov"]) == ["0", "1", "2", "3"]
    assert metrics["markov"]["0"] == pytest.approx(2, abs=0.05)
    assert metrics["markov"]["3"] < metrics["markov"]["1"]
    assert "Markov, order 3" in (backbone / "summary.txt").read_text()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labelled") / "t.csv"
    rng = np.random.default_rng(1)
    rows = [f"r{n},{''.join(rng.choice(list('ACGT'), 60))},{'ab'[n % 2]}" for n in range(60)]
    path.write_text("id,sequence,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.mark.parametrize("freeze", [True, False])
def test_training_goes_on_from_a_pretrained_network(backbone, labelled, tmp_path, freeze):
    code = run("train", f"sequences={labelled}", f"out={tmp_path}", "baselines=[]", "epochs=1",
               f"pretrained={backbone / 'model.ckpt'}", f"freeze={freeze}", *QUICK)  # fmt: skip
    assert code == 0
    before, after = (
        torch.load(path / "model.ckpt", weights_only=True) for path in (backbone, tmp_path)
    )
    assert after["config"]["pattern"] == before["config"]["pattern"]
    same = {
        name: torch.equal(weight, before["state_dict"][name])
        for name, weight in after["state_dict"].items()
        if name.startswith(("stem.", "encoder.", "registers"))
    }
    assert len(same) > 15
    assert all(same.values()) if freeze else not any(same.values())


def test_training_goes_on_from_a_trained_network(labelled, tmp_path):
    given = [f"sequences={labelled}", "baselines=[]", "epochs=1", *QUICK]
    assert run("train", *given, f"out={tmp_path / 'a'}", "stem_stride=2") == 0
    trained = f"pretrained={tmp_path / 'a' / 'model.ckpt'}"
    assert run("train", *given, f"out={tmp_path / 'b'}", trained, "freeze=true", "seed=1") == 0
    first, second = (torch.load(tmp_path / name / "model.ckpt", weights_only=True) for name in "ab")
    assert second["config"]["stem_stride"] == 2
    same = {
        name: torch.equal(weight, first["state_dict"][name])
        for name, weight in second["state_dict"].items()
    }
    assert all(same[n] for n in same if n.startswith(("stem.", "encoder.", "registers")))
    assert not all(same[n] for n in same if n.startswith("head."))


def test_a_network_of_words_is_no_pretrained_one(labelled, tmp_path, capsys):
    given = [f"sequences={labelled}", "baselines=[]", "epochs=1", *QUICK]
    assert run("train", *given, f"out={tmp_path / 'a'}", "tokenizer=kmer") == 0
    path = tmp_path / "a" / "model.ckpt"
    assert run("train", *given, f"out={tmp_path / 'b'}", f"pretrained={path}") == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert "reads kmer tokens" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrained={backbone}", "tokenizer=kmer"], ["tokenizer=base"]),
        (["freeze=true"], ["pretrained=FILE"]),
        (["pretrained={backbone}", "rc=equivariant"], ["rc=augment", "tied"]),
    ],
    ids=str,
)
def test_what_does_not_fit_a_pretrained_network_is_named(
    backbone, labelled, tmp_path, capsys, arguments, words
):
    given = [item.format(backbone=backbone / "model.ckpt") for item in arguments]
    assert run("train", f"sequences={labelled}", f"out={tmp_path}", *given, *QUICK) == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["guess=backwards"], ["masked or causal"]),
        (["guess=causal"], ["look back only", "& Causal()"]),
        (["mask_rate=1"], ["between 0 and 1"]),
        (["mask_span=0"], ["1 or more"]),
        (["soft_mask_weight=2"], ["from 0 to 1"]),
        (["markov=13"], ["0 to 12"]),
        (["context=0"], ["1 or more", "got 0"]),
        (["rc=average"], ["rc=augment or equivariant"]),
        (["val=nowhere"], ["matches no record", "r0"]),
        (["val=r.*"], ["0 windows to train on"]),
    ],
    ids=str,
)
def test_bad_commands_are_named(backbone, tmp_path, capsys, arguments, words):
    code = run("pretrain", f"store={backbone / 'store'}", f"out={tmp_path}", *arguments, *QUICK)
    assert code == 2
    error = capsys.readouterr().err
    for word in words:
        assert word in error


def test_records_without_a_base_to_guess_are_named(tmp_path, capsys):
    """Before anything is trained: a score over nothing is none."""
    (tmp_path / "n.fa").write_text("".join(f">r{n}\n{'N' * 90}\n" for n in range(4)))
    assert run("pretrain", f"sequences={tmp_path / 'n.fa'}", f"out={tmp_path / 'o'}", *QUICK) == 2
    error = capsys.readouterr().err
    assert "windows to train on" in error
    assert "no A C G T" in error


def test_a_network_without_classes_predicts_none(backbone, labelled, tmp_path, capsys):
    code = run("predict", f"sequences={labelled}", f"ckpt={backbone / 'model.ckpt'}",
               f"out={tmp_path}")  # fmt: skip
    assert code == 2
    assert "has learnt no task" in capsys.readouterr().err
