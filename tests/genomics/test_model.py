"""What a network says of bases, whatever strand they are read from and whatever stands beside."""

import pytest
import torch

from pipelines.genomics.alphabet import NUM_TOKENS, decode, encode, reverse_complement
from pipelines.genomics.convolution import BenchmarkCnn, refuse_long
from pipelines.genomics.model import DnaClassifier, opposite_strand
from pipelines.shared.batch import Example, ExampleList, pack
from pipelines.shared.errors import InputError
from pipelines.shared.inference import predict

PATTERNS = {
    "none": "SlidingWindow(radius=8) | GlobalTokens(first=2)",
    "augment": "SlidingWindow(radius=8) | RandomBlocks(num_blocks=2, block=16)",
    "average": "SlidingWindow(radius=8) & Causal() | GlobalTokens(first=2)",
    "equivariant": "SlidingWindow(radius=8) | DilatedWindow(steps=4, dilation=16)",
}


def example(text, name="x", target=None):
    bases = torch.from_numpy(encode(text))
    return Example(bases, torch.arange(len(text))[:, None], target, name, name, 0)


def texts(count, seed=0, low=20, high=200, letters="ACGTN"):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(low, high, (count,), generator=generator).tolist()
    draws = [torch.randint(len(letters), (size,), generator=generator) for size in sizes]
    return ["".join(letters[place] for place in draw.tolist()) for draw in draws]


def turned(text):
    return decode(reverse_complement(encode(text)))


def network(rc, *, pooling="attention", head_norm="layer", stem_stride=1, **changed):
    torch.manual_seed(3)
    arguments = {
        "dim": 32, "depth": 3, "num_heads": 4, "pattern": PATTERNS[rc], "num_classes": 3,
        "pooling": pooling, "head_norm": head_norm, "stem_stride": stem_stride, **changed,
    }  # fmt: skip
    found = DnaClassifier(rc=rc, **arguments)
    with torch.no_grad():
        for weight in found.parameters():  # also those that begin as zeros or ones
            weight.add_(0.1 * torch.randn_like(weight))
    return found.eval()


def probabilities(found, strings):
    with torch.no_grad():
        return found(pack([example(text) for text in strings])).logits.softmax(1)


@pytest.mark.parametrize("rc", ["average", "equivariant"])
@pytest.mark.parametrize("stem_stride", [1, 3])
@pytest.mark.parametrize(("pooling", "head_norm"), [("attention", "layer"), ("mean+max", "batch")])
def test_both_strands_are_said_to_be_the_same(rc, stem_stride, pooling, head_norm):
    found = network(rc, pooling=pooling, head_norm=head_norm, stem_stride=stem_stride)
    strings = [text[: len(text) // 3 * 3] for text in texts(16, letters="ACGTNRYSWKMBDHV")]
    one, other = probabilities(found, strings), probabilities(found, map(turned, strings))
    assert (one - other).abs().max() <= 1e-6
    assert one.std(0).max() > 1e-3  # and not because nothing is said


@pytest.mark.parametrize("rc", ["average", "equivariant"])
def test_both_strands_are_the_same_without_a_convolution(rc):
    found, strings = network(rc, stem="none"), texts(16, letters="ACGTNRYSWKMBDHV")
    one, other = probabilities(found, strings), probabilities(found, map(turned, strings))
    assert (one - other).abs().max() <= 1e-6
    assert one.std(0).max() > 1e-3


def test_without_a_convolution_bases_are_embedded_one_by_one():
    """Where nothing attends and tokens are averaged, their order says nothing; with one it does."""
    sizes = {"depth": 1, "pattern": None, "pooling": "mean"}
    text = texts(1, letters="ACGT")[0]
    without, given = network("none", stem="none", **sizes), network("none", **sizes)
    for found, alike in ((without, True), (given, False)):
        one, other = probabilities(found, [text]), probabilities(found, ["".join(sorted(text))])
        assert torch.allclose(one, other, atol=1e-5) == alike


@pytest.mark.parametrize("rc", ["none", "augment"])
def test_a_network_of_one_strand_tells_them_apart(rc):
    found, strings = network(rc), texts(8)
    one, other = probabilities(found, strings), probabilities(found, map(turned, strings))
    assert (one - other).abs().max() > 1e-3


def test_an_equivariant_network_stays_so_in_training():
    found, strings = network("equivariant", pooling="mean+max", head_norm="batch"), texts(8)
    found.train()
    optimiser = torch.optim.AdamW(found.parameters(), lr=0.01)
    batch = pack([example(text, target=number % 3) for number, text in enumerate(strings)])
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(found(batch).logits, batch.targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found.eval()
    one, other = probabilities(found, strings), probabilities(found, map(turned, strings))
    assert (one - other).abs().max() <= 1e-6


def test_tokens_of_an_equivariant_network_are_turned_around():
    found, (text, *_) = network("equivariant", depth=2), texts(1)
    half = found.pool.content.in_features // 2

    def encoded(string):
        batch = pack([example(string)])
        x = found.stem(batch.inputs, batch.lengths)
        return found.encoder(x[None], found.build_layouts(batch))[0]

    with torch.no_grad():
        one, other = encoded(text), encoded(turned(text)).flip(0)
    swapped = torch.cat([other[:, half:], other[:, :half]], 1)
    assert torch.allclose(one, swapped, atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-2)


def test_weights_of_an_equivariant_network_come_back():
    found, strings = network("equivariant"), texts(4)
    again = DnaClassifier(**found.config)
    again.load_state_dict(found.state_dict())
    assert torch.equal(probabilities(found, strings), probabilities(again.eval(), strings))


def test_the_other_strand_of_the_other_strand_is_the_first():
    batch = pack([example(text) for text in texts(5)])
    again = opposite_strand(opposite_strand(batch))
    assert torch.equal(again.inputs, batch.inputs)
    assert torch.equal(again.coords, batch.coords)


@pytest.mark.parametrize("rc", sorted(PATTERNS))
@pytest.mark.parametrize("stem", ["convolution", "none"])
def test_neither_neighbours_nor_order_nor_batches_matter(rc, stem):
    found, strings = network(rc, stem=stem), texts(32)
    examples = [example(text, str(number)) for number, text in enumerate(strings)]
    alone = torch.cat([probabilities(found, [text]) for text in strings])
    assert (alone - probabilities(found, strings)).abs().max() <= 1e-5
    for max_tokens in (200, 1_000):
        items = list(predict(found, ExampleList(examples[::-1]), max_tokens=max_tokens))
        assert [item.id for item in items] == [item.id for item in examples[::-1]]
        given = torch.stack([item.probabilities for item in items[::-1]])
        assert (alone - given).abs().max() <= 1e-5


def test_the_benchmark_network_has_the_layers_that_were_published():
    """Of 251 bases, as human_nontata_promoters has them."""
    found = BenchmarkCnn(251, 2)
    kinds = [type(layer).__name__ for layer in found.convolutions]
    assert kinds == ["Conv1d", "BatchNorm1d", "ReLU", "MaxPool1d"] * 3
    shapes = {name: tuple(weight.shape) for name, weight in found.named_parameters()}
    assert shapes["embedding.weight"] == (NUM_TOKENS, 100)
    assert [shapes[f"convolutions.{n}.weight"] for n in (0, 4, 8)] == [
        (16, 100, 8), (8, 16, 8), (4, 8, 8),
    ]  # fmt: skip
    # 251 -> 244 -> 122 -> 115 -> 57 -> 50 -> 25 places of 4 channels
    assert (shapes["hidden.weight"], shapes["head.weight"]) == ((512, 100), (2, 512))


def test_a_convolution_over_whole_chromosomes_is_refused():
    refuse_long(131_072)
    with pytest.raises(InputError, match=r"200,000 bases they would be 51 million.*context of"):
        refuse_long(200_000)


def test_a_convolution_says_the_same_alone_and_filled_up():
    torch.manual_seed(0)
    found, strings = BenchmarkCnn(200, 3).eval(), texts(32)
    alone = torch.cat([probabilities(found, [text]) for text in strings])
    assert (alone - probabilities(found, strings)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "pattern",
    [
        "Hierarchical(cell=8, near=1, factor=2) | GlobalTokens(first=2)",
        "Routed(block=16, top=2, near=1) | GlobalTokens(first=2)",
        "DilatedSegments(segment=16) + DilatedSegments(segment=64, dilation=2)",
    ],
    ids=lambda text: text.split("(")[0],
)
def test_patterns_that_pool_route_and_mix_are_packed_alike(pattern):
    found, strings = network("average", pattern=pattern, depth=2), texts(12, high=300)
    alone = torch.cat([probabilities(found, [text]) for text in strings])
    assert (alone - probabilities(found, strings)).abs().max() <= 1e-5
    assert (alone - probabilities(found, strings[::-1]).flip(0)).abs().max() <= 1e-5
    turned_around = probabilities(found, map(turned, strings))
    assert (turned_around - probabilities(found, strings)).abs().max() <= 1e-6


@pytest.mark.parametrize("rc", sorted(PATTERNS))
@pytest.mark.parametrize("stem", ["convolution", "none"])
def test_no_gradient_crosses_packed_records(rc, stem):
    found = network(rc, stem=stem)
    batch = pack([example(text) for text in texts(3)])
    seen = {}

    def keep(_, __, output):
        output.retain_grad()
        seen.setdefault("tokens", output)

    found.stem.register_forward_hook(keep)
    found.train()(batch).logits[1].sum().backward()
    gradient = seen["tokens"].grad.abs().sum(1).split(batch.lengths.tolist())
    assert gradient[0].max() == gradient[2].max() == 0
    assert gradient[1].min() > 0


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("Causal()", "one side only"),
        ("SlidingWindow(left=3, right=4)", "SlidingWindow"),
        ("Dense() & Causal()", "one side only"),
        ("SlidingWindow(radius=2) | GlobalTokens(first=1)", "before the first base"),
        ("SlidingWindow(radius=2) | RandomBlocks(num_blocks=2, block=16)", "drawn anew"),
        ("Strided(stride=4)", "counts from the first base"),
    ],
)
def test_patterns_that_differ_backwards_are_refused(pattern, words):
    with pytest.raises(InputError, match=r"the same backwards.*" + words):
        network("equivariant", pattern=pattern)


def test_words_and_lengths_that_differ_backwards_are_refused():
    with pytest.raises(InputError, match="tokenizer=base"):
        network("equivariant", num_tokens=4096)
    with pytest.raises(InputError, match="200 bases are cut into other tokens"):
        probabilities(network("equivariant", stem_stride=3), ["A" * 200])
    assert NUM_TOKENS == 16
