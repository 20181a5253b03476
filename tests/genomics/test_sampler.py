"""Batches out of memory: what windows hold, in an order that only seed and epoch decide."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipelines.genomics import store as store_module
from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.data import WindowDataset
from pipelines.genomics.ingest import ingest
from pipelines.genomics.model import DnaClassifier
from pipelines.genomics.sampler import ShardSampler, fill_batches
from pipelines.genomics.store import SequenceStore
from pipelines.genomics.tokenizers import KmerTokenizer
from pipelines.shared import fit as fit_module
from pipelines.shared.batch import pack
from pipelines.shared.objective import Classification


def write_records(path, lengths, *, odd=True):
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for number, length in enumerate(lengths):
            letters = generator.choice(list("ACGT"), length)
            if odd:
                letters[generator.random(length) < 0.02] = "N"
                spots = np.flatnonzero(generator.random(length) < 0.01)
                letters[spots] = generator.choice(list(LETTERS[5:]), spots.size)
            masked = np.repeat(generator.random(-(-length // 37)) < 0.4, 37)[:length]
            text = "".join(np.where(masked, np.char.lower(letters), letters))
            file.write(f">r{number}\n{text}\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sampler")


@pytest.fixture(scope="module")
def sharded(folder):
    """A store of several shards that does not fit its memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "SHARD_BYTES", 1 << 10)
        patch.setattr(store_module, "CHUNK_BYTES", 1 << 8)
        lengths = [9_001, 7, 4_096, 300, 2_500, 6_003, 1, 777, 3_000]
        fasta = write_records(folder / "x.fa", lengths)
        ingest(fasta, folder / "store", progress=False)
        yield SequenceStore(folder / "store", memory_bytes=0)


def windows_of(store, **options):
    records = np.arange(len(store))
    return WindowDataset(
        store, records, records % 3, **{"context": 700, "overlap": 90, "seed": 5, **options}
    )


def batches_of(windows, num_workers=0, **options):
    sampler = ShardSampler(windows, **{"max_tokens": 2_000, **options})
    return [batch for (batch,) in sampler.loader(num_workers)]


def assert_same(first, second):
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.windows, two.windows)
        assert torch.equal(one.inputs, two.inputs)


@pytest.mark.parametrize("context", [700, 40, 5_000])
def test_batches_hold_what_the_windows_hold(sharded, context):
    assert len(sharded.shards()) > 4
    windows = windows_of(sharded, context=context, overlap=0, reverse_complement=True)
    batches = batches_of(windows, epoch=3)
    windows.set_epoch(3)
    for batch in batches:
        packed, expected = batch.to("cpu"), pack([windows[int(w)] for w in batch.windows])
        assert torch.equal(packed.inputs, expected.inputs)
        assert torch.equal(packed.coords, expected.coords)
        assert torch.equal(packed.lengths, expected.lengths)
        assert torch.equal(packed.targets, expected.targets)
        assert packed.ids == expected.ids
    seen = torch.cat([batch.windows for batch in batches])
    assert sorted(seen.tolist()) == list(range(len(windows)))
    flipped = torch.cat([batch.flipped for batch in batches]).float().mean()
    assert 0 < flipped < 1


def test_half_of_many_windows_are_turned_around_anew_each_epoch(sharded):
    windows = windows_of(sharded, context=20, overlap=0, reverse_complement=True)
    turned = []
    for epoch in (0, 1):
        batches = batches_of(windows, epoch=epoch)
        order = torch.cat([batch.windows for batch in batches])
        turned.append(torch.cat([batch.flipped for batch in batches])[order.argsort()])
    for flips in turned:
        assert 0.45 < flips.float().mean() < 0.55
    assert 0.4 < (turned[0] != turned[1]).float().mean() < 0.6


def test_the_soft_mask_is_turned_with_its_bases(sharded):
    windows = windows_of(sharded, reverse_complement=True)
    for batch in batches_of(windows, soft_mask=True):
        parts = batch.soft_mask.split(batch.lengths.tolist())
        for window, turned, part in zip(batch.windows, batch.flipped, parts, strict=True):
            record, start, end = (
                int(column[window]) for column in (windows.records, windows.starts, windows.ends)
            )
            expected = sharded.mask(record, start, end)
            assert part.tolist() == (expected[::-1] if turned else expected).tolist()


def test_a_store_in_memory_gives_the_same_windows(sharded):
    whole = SequenceStore(sharded.path)
    assert whole.fits_memory
    for store in (whole, sharded):
        batches = batches_of(windows_of(store))
        bases = {int(w): b for batch in batches for w, b in zip(
            batch.windows, batch.inputs.split(batch.lengths.tolist()), strict=True)}  # fmt: skip
        for window, tokens in bases.items():
            assert torch.equal(tokens, windows_of(whole)[window].inputs)


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_batches_do_not_depend_on_the_number_of_workers(sharded):
    windows = windows_of(sharded, reverse_complement=True)
    alone = batches_of(windows)
    for num_workers in (1, 3):
        assert_same(alone, batches_of(windows, num_workers))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_position_goes_on_exactly(sharded, num_workers):
    windows = windows_of(sharded, reverse_complement=True)
    whole = batches_of(windows, epoch=1)
    first = ShardSampler(windows, epoch=1, max_tokens=2_000).loader(num_workers)
    taken = iter(first)
    begun = [next(taken)[0] for _ in range(4)]
    state = first.state_dict()
    assert state == {"epoch": 1, "batch": 4}
    again = ShardSampler(windows, epoch=1, max_tokens=2_000).loader(num_workers)
    again.load_state_dict(state)
    assert len(again) == len(whole)
    assert_same(whole, begun + [batch for (batch,) in again])
    with pytest.raises(ValueError, match="epoch"):
        ShardSampler(windows, epoch=2, max_tokens=2_000).load_state_dict(state)


def test_ranks_take_turns_and_equally_many(sharded):
    windows = windows_of(sharded)
    whole = batches_of(windows)
    ranks = [batches_of(windows, rank=rank, num_ranks=3) for rank in range(3)]
    assert {len(batches) for batches in ranks} == {-(-len(whole) // 3)}
    turns = [batch for step in zip(*ranks, strict=True) for batch in step]
    assert_same(whole, turns[: len(whole)])
    assert_same(whole[: len(turns) - len(whole)], turns[len(whole) :])


def test_seed_and_epoch_decide_the_order(sharded):
    def order(seed, epoch):
        batches = batches_of(windows_of(sharded, seed=seed), epoch=epoch)
        return torch.cat([batch.windows for batch in batches]).tolist()

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(*key)) for key in ((1, 0), (1, 1), (2, 0))}) == 3


def test_windows_of_a_shard_are_spread_over_the_turns_of_others(sharded):
    windows = windows_of(sharded, context=50, overlap=0)
    sampler = ShardSampler(windows, max_tokens=500, mix_shards=2)
    plan = sampler._plan
    turns = plan.shard[plan.order]
    distance = [np.ptp(np.flatnonzero(turns == shard)) for shard in np.unique(turns)]
    assert max(distance) < 0.8 * len(turns)  # no shard stays to the end
    mixed = [len(set(turns[i : i + 40].tolist())) for i in range(40, len(turns) - 40, 40)]
    assert np.median(mixed) >= 2


def test_weights_draw_windows_in_their_proportion(sharded):
    windows = windows_of(sharded, context=20, overlap=0)
    weights = np.where(windows.targets == 0, 0.0, 1.0)
    drawn = torch.cat([batch.windows for batch in batches_of(windows, weights=weights)])
    assert len(drawn) == len(windows)
    assert (windows.targets[drawn.numpy()] != 0).all()


def test_a_tokenizer_reads_the_turned_bases(sharded):
    windows = windows_of(sharded, reverse_complement=True, tokenizer=KmerTokenizer(4, stride=4))
    for batch in batches_of(windows):
        packed, expected = batch.to("cpu"), pack([windows[int(w)] for w in batch.windows])
        assert torch.equal(packed.inputs, expected.inputs)
        assert torch.equal(packed.coords, expected.coords)
        assert torch.equal(packed.lengths, expected.lengths)


def test_positions_are_shuffled_as_the_windows_shuffle_them(sharded):
    windows = windows_of(sharded, shuffle_positions=True)
    for batch in batches_of(windows)[:4]:
        expected = pack([windows[int(w)] for w in batch.windows])
        assert torch.equal(batch.to("cpu").coords, expected.coords)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(1, 120),
    st.one_of(st.none(), st.integers(1, 7)),
)
def test_batches_are_as_full_as_they_may_be(lengths, max_tokens, max_sequences):
    bounds = fill_batches(np.array(lengths), max_tokens, max_sequences)
    assert bounds[0] == 0
    assert bounds[-1] == len(lengths)
    parts = [lengths[a:b] for a, b in pairwise(bounds)]
    for part, after in zip(parts, [*parts[1:], None], strict=True):
        assert part
        assert len(part) == 1 or sum(part) <= max_tokens
        assert max_sequences is None or len(part) <= max_sequences
        full = after is None or len(part) == max_sequences or sum(part) + after[0] > max_tokens
        assert full


def test_settings_without_sense_are_refused(sharded):
    windows = windows_of(sharded)
    with pytest.raises(ValueError, match="max_tokens"):
        ShardSampler(windows, max_tokens=0)
    with pytest.raises(ValueError, match="rank"):
        ShardSampler(windows, max_tokens=1, rank=2, num_ranks=2)
    words = windows_of(sharded, tokenizer=KmerTokenizer(4, stride=1))
    with pytest.raises(ValueError, match="soft mask"):
        ShardSampler(words, max_tokens=1, soft_mask=True)


class _Cut(nn.Module):
    """Raise after a number of training steps, as a power cut would."""

    def __init__(self, network, steps):
        super().__init__()
        self.network, self.left = network, steps

    def forward(self, batch):
        if self.training:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("power")
        return self.network(batch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_training_goes_on_within_an_epoch_with_equal_weights(
    sharded, tmp_path, monkeypatch, num_workers
):
    monkeypatch.setattr(fit_module, "_SAVE_SHARE", float("inf"))
    options = {"context": 200, "overlap": 0, "reverse_complement": True}
    setting = fit_module.FitSettings(
        epochs=2,
        max_tokens=3_000,
        num_workers=num_workers,
        progress=False,
        select="last",
        save_seconds=0.0,
    )

    def train(name, steps):
        torch.manual_seed(0)
        network = DnaClassifier(
            dim=16, depth=1, num_heads=2, pattern="SlidingWindow(radius=8)", num_classes=3,
            dropout=0.3,
        )  # fmt: skip
        cut = _Cut(network, steps)
        val = windows_of(sharded, context=200, overlap=0)
        fit_module.fit(
            cut,
            windows_of(sharded, **options),
            val,
            objective=Classification(("a", "b", "c")),
            out=tmp_path / name,
            settings=setting,
        )
        return cut

    whole = train("whole", 10**9)
    taken = 10**9 - whole.left
    with pytest.raises(RuntimeError, match="power"):
        train("cut", taken - 3)
    resumed = train("cut", 3)  # more steps than the three that are left would raise
    assert resumed.left == 0
    for one, two in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, two)
