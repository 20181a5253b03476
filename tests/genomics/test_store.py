import os
import pickle
import shutil

import numpy as np
import pytest

from pipelines.genomics import store as store_module
from pipelines.genomics import store_writer as writer_module
from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import decode, encode
from pipelines.genomics.ingest import ingest
from pipelines.genomics.store import SequenceStore
from pipelines.shared.errors import InputError


def write_fasta(path, records):
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records.items()))
    return path


@pytest.fixture
def small_steps(monkeypatch):
    """Chunks of 16 bytes (64 bases), so that short records cross them."""
    for module in (store_module, writer_module):
        monkeypatch.setattr(module, "CHUNK_BYTES", 16)


def draw_records(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return {
        f"r{i} length {length}": decode(generator.integers(1, 16, length, np.uint8))
        for i, length in enumerate(lengths)
    }


LENGTHS = [1, 63, 64, 65, 500, 2, 1, 3000, 127]


@pytest.mark.parametrize("memory_bytes", [1 << 20, 0])
@pytest.mark.parametrize("shard_bytes", [1 << 14, 64])
def test_records_come_back_as_written(
    tmp_path, monkeypatch, small_steps, memory_bytes, shard_bytes
):
    for module in (store_module, writer_module):
        monkeypatch.setattr(module, "SHARD_BYTES", shard_bytes)
    monkeypatch.setattr(store_module, "_CACHED_CHUNKS", 3)
    records = draw_records(LENGTHS)
    ingest(write_fasta(tmp_path / "x.fa", records), tmp_path / "s")

    store = SequenceStore(tmp_path / "s", memory_bytes=memory_bytes)

    assert len(store) == len(records)
    assert store.lengths.tolist() == LENGTHS
    assert [f"{i} {d}" for i, d in zip(store.ids, store.descriptions, strict=True)] == [*records]
    assert [decode(store.read(i)) for i in range(len(store))] == [*records.values()]
    assert decode(store.read(7, 60, 70)) == records["r7 length 3000"][60:70]
    assert decode(store.read(7, 2990)) == records["r7 length 3000"][2990:]
    assert store.read(4, 9, 9).size == 0


@pytest.mark.parametrize(("start", "end"), [(-1, 3), (0, 66), (5, 4)])
def test_ranges_outside_the_record_are_refused(tmp_path, start, end):
    store = ingest(write_fasta(tmp_path / "x.fa", {"a": "A" * 65, "b": "C" * 9}), tmp_path / "s")
    with pytest.raises(ValueError, match="must hold"):
        store.read(0, start, end)


def test_what_is_read_may_be_changed_without_harm(tmp_path):
    store = ingest(write_fasta(tmp_path / "x.fa", {"a": "ACGT"}), tmp_path / "s")
    store.read(0)[:] = 0
    assert decode(store.read(0)) == "ACGT"


def test_letters_are_counted(tmp_path):
    fasta = write_fasta(tmp_path / "x.fa", {"a": "ACGTNNnacgtu", "b": "RYKU"})
    counts = ingest(fasta, tmp_path / "s").counts
    assert (counts.records, counts.bases, counts.n) == (2, 16, 3)
    assert (counts.iupac, counts.lower, counts.uracil) == (3, 6, 2)
    assert str(counts) == "2 records, 16 bases, 3 N, 3 IUPAC, 6 lower case, 2 U"


def test_current_store_is_reused_and_an_outdated_one_replaced(tmp_path):
    fasta = write_fasta(tmp_path / "x.fa", {"a": "ACGT"})
    first = ingest(fasta, tmp_path / "s")
    written = (tmp_path / "s" / "zarr.json").stat().st_ino
    moved = fasta.rename(tmp_path / "y.fa")
    os.utime(moved, (0, 0))

    assert ingest(moved, tmp_path / "s").fingerprint == first.fingerprint
    assert (tmp_path / "s" / "zarr.json").stat().st_ino == written

    write_fasta(moved, {"a": "ACGA"})
    second = ingest(moved, tmp_path / "s")
    assert second.fingerprint != first.fingerprint
    assert decode(second.read(0)) == "ACGA"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s", "y.fa"]


def test_failed_ingest_leaves_nothing_and_keeps_what_was_there(tmp_path):
    good = write_fasta(tmp_path / "good.fa", {"a": "ACGT"})
    bad = write_fasta(tmp_path / "bad.fa", {"a": "ACGT", "b": "AC1T"})
    with pytest.raises(InputError, match="record 2"):
        ingest(bad, tmp_path / "s")
    assert not (tmp_path / "s").exists()
    ingest(good, tmp_path / "s")
    with pytest.raises(InputError, match="record 2"):
        ingest(bad, tmp_path / "s")
    assert decode(SequenceStore(tmp_path / "s").read(0)) == "ACGT"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.fa", "good.fa", "s"]


def test_missing_fasta_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        ingest(tmp_path / "none.fa", tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_store_is_never_replaced(tmp_path, kind):
    fasta = write_fasta(tmp_path / "x.fa", {"a": "ACGT"})
    place = tmp_path / "s"
    (place / "mine").mkdir(parents=True) if kind == "folder" else place.write_text("mine")
    with pytest.raises(InputError, match="is no sequence store"):
        ingest(fasta, place)
    with pytest.raises(InputError, match="is no sequence store"):
        SequenceStore(place)
    assert place.exists()


def test_store_travels_to_a_worker(tmp_path):
    store = ingest(write_fasta(tmp_path / "x.fa", {"a": "ACGT" * 50}), tmp_path / "s")
    whole = store.read(0)
    sent = pickle.dumps(store)
    assert len(sent) < 2000
    assert np.array_equal(pickle.loads(sent).read(0), whole)


def test_padding_never_enters_a_store(tmp_path):
    store = ingest(write_fasta(tmp_path / "x.fa", draw_records(LENGTHS)), tmp_path / "s")
    assert min(store.read(i).min() for i in range(len(store))) == encode("A")[0]


MASKED = {"a": "acGTNNNRyk", "b": "C", "c": "ggggg" * 30, "d": "ACGTNACGTA" * 20}


def lower(store, record, start=0, end=None):
    letters = np.array(list(decode(store.read(record, start, end))), dtype="U1")
    masked = store.mask(record, start, end)
    letters[masked] = np.char.lower(letters[masked])
    return "".join(letters)


@pytest.fixture
def masked(tmp_path):
    return ingest(write_fasta(tmp_path / "x.fa", MASKED), tmp_path / "masked")


def test_the_soft_mask_comes_back_from_any_stretch(masked):
    for record, text in enumerate(MASKED.values()):
        assert lower(masked, record) == text
        for start in range(0, len(text), 3):
            for end in (start, start + 1, min(len(text), start + 7), len(text)):
                assert lower(masked, record, start, end) == text[start:end]


def test_the_flat_axis_holds_records_and_padding_between_them(masked):
    whole = masked.read_flat(0, masked.num_positions)
    assert whole.size == masked.num_positions == sum(-(-len(t) // 4) * 4 for t in MASKED.values())
    taken = np.zeros(whole.size, dtype=bool)
    for record, (offset, length) in enumerate(zip(masked.offsets, masked.lengths, strict=True)):
        assert offset % 4 == 0
        assert np.array_equal(whole[offset : offset + length], masked.read(record))
        taken[offset : offset + length] = True
    assert not whole[~taken].any()
    for start, end in ((0, 0), (3, 17), (9, 13), (11, 12), (150, 301)):
        assert np.array_equal(masked.read_flat(start, end), whole[start:end])
    with pytest.raises(ValueError, match="<="):
        masked.read_flat(0, masked.num_positions + 1)


def test_runs_of_n_stand_on_the_flat_axis(masked):
    whole = masked.read_flat(0, masked.num_positions)
    is_n = np.zeros(whole.size, dtype=bool)
    for start, end in masked.n_runs():
        is_n[start:end] = True
    assert np.array_equal(is_n, whole == encode("N")[0])


def test_shards_cover_the_axis(monkeypatch, masked):
    assert masked.shards() == [(0, masked.num_positions)]
    monkeypatch.setattr(store_module, "SHARD_BYTES", 30)
    shards = masked.shards()
    assert [start for start, _ in shards] == [0, *(end for _, end in shards[:-1])]
    assert shards[-1][1] == masked.num_positions
    assert shards[0] == (0, 120)


def test_equal_letters_have_equal_digests(tmp_path):
    records = {"a": "ACGTN", "b": "acgun", "c": "ACGTA", "d": "ACGT", "e": "ACGTAA"}
    store = ingest(write_fasta(tmp_path / "x.fa", records), tmp_path / "s")
    digests = [digest.tobytes() for digest in store.digests]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


def test_no_labels_are_named(masked):
    with pytest.raises(InputError, match="labels=TABLE"):
        masked.label_table()


def _cut_a_shard(store):
    place = store / "bases" / "c" / "0"
    place.write_bytes(place.read_bytes()[:-9] + b"123456789")


@pytest.mark.parametrize(
    ("harm", "word"),
    [
        (lambda store: (store / "bases" / "c" / "0").unlink(), "missing"),
        (lambda store: shutil.rmtree(store / "records" / "header"), "header"),
        (lambda store: (store / "bases" / "zarr.json").unlink(), "bases"),
        (_cut_a_shard, "checksum"),
    ],
    ids=["no shard", "no headers", "no bases", "other bytes"],
)
def test_a_damaged_store_is_one_message(tmp_path, capsys, harm, word):
    (tmp_path / "x.fa").write_text(">a\nACGTTGCANN\n>b\nGGTT\n")
    store = ingest(tmp_path / "x.fa", tmp_path / "store", progress=False).path
    harm(store)
    assert main(["export", f"store={store}", f"out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {store} is damaged")
    assert word in said
    assert "ingest again" in said
