"""Real files: what they hold is known, and what is wrong with them is said."""

import gzip
import time
from itertools import islice

import numpy as np
import pandas as pd
import pysam
import pytest
from Bio import SeqIO, bgzf
from Bio.Seq import Seq

from pipelines.genomics.alphabet import decode
from pipelines.genomics.baseline import fit_kmer_baseline
from pipelines.genomics.collection import Collection
from pipelines.genomics.data import WindowDataset, match_labels, read_label_table
from pipelines.genomics.duplicates import find_copies
from pipelines.genomics.genome import read_records
from pipelines.genomics.ingest import ingest, read_report
from pipelines.genomics.leaks import find_leaks
from pipelines.genomics.letters import Reading
from pipelines.genomics.sequence_tables import Columns
from pipelines.shared.errors import InputError
from pipelines.shared.evaluation import evaluate
from pipelines.shared.splits import assign_splits

pytestmark = pytest.mark.real_data


@pytest.fixture
def genomes(real_data):
    return real_data / "genomes"


def test_human_mitochondrion_equals_biopython(genomes):
    (record,) = read_records(genomes / "human_MT.fa")
    expected = SeqIO.read(genomes / "human_MT.fa", "fasta")
    assert record.id == expected.id
    assert decode(record.tokens) == str(expected.seq).upper()
    assert (record.tokens.size, record.lower) == (16_569, 1)


def test_yeast_is_ingested(genomes, tmp_path):
    store = ingest(genomes / "yeast_R64-1-1.dna.toplevel.fa.gz", tmp_path / "yeast")
    assert len(store) == 17
    assert store.counts.bases == store.lengths.sum() == 12_157_105
    index = pd.read_csv(
        genomes / "yeast_R64-1-1.dna.toplevel.fa.gz.fai", sep="\t", header=None, dtype={0: str}
    )
    assert index[0].tolist() == list(store.ids)
    assert index[1].tolist() == store.lengths.tolist()
    dataset = WindowDataset(store, range(17), context=100_000, overlap=1_000)
    assert set(dataset.lengths) == {100_000, 85_779}


def test_soft_masked_letters_are_counted(genomes, tmp_path):
    store = ingest(genomes / "celegans_augustus_chrI_1Mb_softmasked.fa.gz", tmp_path / "worm")
    assert store.counts.lower == 268_286


def test_incorrect_characters_are_named(genomes):
    path = genomes / "messy_quast_incorrect_chars_in_sequence.fasta"
    with pytest.raises(InputError) as caught:
        list(read_records(path))
    assert "record 1 ('contig1'): 'f' at position 74" in str(caught.value)
    assert str(path) in str(caught.value)


def test_tiny_contigs_and_lonely_n_are_read(genomes):
    tiny = list(read_records(genomes / "messy_quast_contigs_tiny.fasta"))
    assert [record.tokens.size for record in tiny] == [70, 24]
    (lonely,) = read_records(genomes / "messy_quast_only_Ns_in_sequence.fasta")
    assert set(decode(lonely.tokens)) == {"N"}
    assert lonely.tokens.size == 616
    assert len(list(read_records(genomes / "nucleus_unindexed_emptylines.fasta"))) == 3


@pytest.mark.parametrize("name", ["human_hg38_1m.fa.gz", "yeast_R64-1-1.dna.toplevel.fa.gz"])
def test_real_block_gzip_cut_at_a_block_boundary_is_refused(genomes, tmp_path, name):
    with (genomes / name).open("rb") as handle:
        starts = [start for start, *_ in bgzf.BgzfBlocks(handle)]
    cut = tmp_path / "cut.fa.bgz"
    cut.write_bytes((genomes / name).read_bytes()[: starts[len(starts) // 2]])
    with gzip.open(cut) as handle:
        assert handle.read().startswith(b">")  # gzip alone notices nothing
    with pytest.raises(InputError, match="without its end marker"):
        list(read_records(cut))


@pytest.mark.parametrize(
    ("name", "masked"),
    [
        ("yeast_R64-1-1.dna.toplevel.fa.gz", False),
        ("human_hg38_1m.fa.gz", False),
        ("nucleus_unindexed_emptylines.fasta", True),
    ],
)
def test_random_access_by_index_equals_the_store(genomes, tmp_path, name, masked):
    """Through .fai and .gzi, as pysam reads them; without them, by the whole text."""
    store = ingest(genomes / name, tmp_path / "store")
    generator = np.random.default_rng(0)
    if masked:
        with (genomes / name).open() as file:
            whole = {record.id: str(record.seq) for record in SeqIO.parse(file, "fasta")}
        fetch = lambda contig, start, end: whole[contig][start:end]  # noqa: E731
    else:
        index = pysam.FastaFile(str(genomes / name))
        fetch = index.fetch
        assert list(index.references) == list(store.ids)
        assert list(index.lengths) == store.lengths.tolist()
    for record in generator.integers(0, len(store), 200):
        start, end = np.sort(generator.integers(0, store.lengths[record] + 1, 2))
        end = min(end, start + 5000)
        text = decode(store.read(int(record), int(start), int(end)))
        letters = np.array(list(text), dtype="U1")
        mask = store.mask(int(record), int(start), int(end))
        letters[mask] = np.char.lower(letters[mask])
        assert "".join(letters) == fetch(store.ids[record], int(start), int(end))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("phix174_NC_001422.fna", "phix174_NC_001422.gbk"),
        ("biopython_NC_005816.fna", "biopython_NC_005816.gb"),
        ("sarscov2_MN908947.fasta", "sarscov2_MN908947.gb"),
    ],
)
def test_genbank_holds_the_letters_of_its_fasta(genomes, one, other):
    (fasta,), (genbank,) = (list(read_records(genomes / name)) for name in (one, other))
    assert np.array_equal(fasta.tokens, genbank.tokens)
    assert genbank.circular == (other != "sarscov2_MN908947.gb")
    assert genbank.id in fasta.id


def test_a_2bit_genome_equals_biopython(genomes):
    (record,) = read_records(genomes / "jbrowse_T_ko.2bit")
    with (genomes / "jbrowse_T_ko.2bit").open("rb") as file:
        (expected,) = SeqIO.parse(file, "twobit")
        assert decode(record.tokens) == bytes(expected.seq).decode().upper()
    assert (record.id, record.tokens.size) == ("chr1", 2_088_737)


def test_the_soft_mask_of_the_worm_comes_back(genomes, tmp_path):
    store = ingest(genomes / "celegans_augustus_chrI_1Mb_softmasked.fa.gz", tmp_path / "worm")
    with gzip.open(genomes / "celegans_augustus_chrI_1Mb_softmasked.fa.gz", "rt") as file:
        text = "".join(line.strip() for line in file if line[0] != ">")
    assert np.array_equal(store.mask(0), [letter.islower() for letter in text])
    assert decode(store.read(0)) == text.upper()


@pytest.mark.parametrize(
    ("name", "sizes", "conflicts"),
    [("prom_300_tata", (4904, 613, 613), 10), ("prom_core_all", (47356, 5920, 5920), 40)],
)
def test_a_gue_set_is_read_as_it_comes(genomes, tmp_path, name, sizes, conflicts):
    (tmp_path / name).mkdir()
    for split in ("train", "dev", "test"):
        (tmp_path / name / f"{split}.csv.gz").symlink_to(genomes / f"gue_{name}_{split}.csv.gz")
    store = ingest(tmp_path / name, tmp_path / "store")
    counts = pd.Series(store.splits).value_counts()
    assert (counts["train"], counts["val"], counts["test"]) == sizes
    assert set(store.labels) == {"0", "1"}
    report = read_report(store)
    both = [c for c in report["conflicts"] if c["splits"].count("train") > 1]
    in_train = [
        c for c in both
        if len({lab for lab, s in zip(c["labels"], c["splits"], strict=True) if s == "train"}) > 1
    ]  # fmt: skip
    assert len(in_train) == conflicts
    assert report["copies"]["across_splits"] > 0


def test_the_splice_sites_of_uci_are_read_by_place(genomes, tmp_path):
    columns = Columns({"label": "1", "id": "2", "sequence": "3"})
    reading = Reading(duplicate_ids="suffix")
    store = ingest(genomes / "uci_splice.data", tmp_path / "s", columns=columns, reading=reading)
    assert pd.Series(store.labels).value_counts().to_dict() == {"N": 1655, "IE": 768, "EI": 767}
    assert set(store.lengths) == {60}
    assert (store.counts.n, store.counts.iupac) == (56, 4)


def test_yeast_takes_little_room(genomes, tmp_path):
    store = ingest(genomes / "yeast_R64-1-1.dna.toplevel.fa.gz", tmp_path / "yeast")
    on_disk = sum(512 * entry.stat().st_blocks for entry in store.path.rglob("*"))
    assert on_disk <= 0.35 * store.counts.bases


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("human_hg38_1m.fa.gz.gzi", "binary"),
        ("human_chr20_1mb1kgp.vcf.gz", "VCF"),
        ("phix174_NC_001422.gff", "GFF"),
        ("nucleus_test_nist.b37_chr20_100kbp_at_10mb.bed", "BED"),
    ],
)
def test_other_formats_are_refused(genomes, name, message):
    with pytest.raises(InputError, match=message):
        list(read_records(genomes / name))


@pytest.fixture
def mitochondria(genomes, tmp_path):
    """Sequences and classes of the first 300 genomes of the vertebrate task."""
    labels = pd.read_csv(genomes / "mldsp_labels.tsv.gz", sep="\t", dtype=str)
    labels = labels[labels["task"] == "Vertebrates"].rename(
        columns={"record_id": "id", "class": "label"}
    )
    wanted = set(labels["id"])
    records = read_records(genomes / "mldsp_mito_pool.fasta.gz")
    chosen = list(islice((record for record in records if record.id in wanted), 300))
    records.close()
    fasta = tmp_path / "mito.fa.gz"
    with gzip.open(fasta, "wt", compresslevel=1) as handle:
        handle.writelines(f">{record.id}\n{decode(record.tokens)}\n" for record in chosen)
    return fasta, labels


def test_mitochondrial_genomes_become_whole_examples(mitochondria, tmp_path):
    fasta, labels = mitochondria
    store = ingest(fasta, tmp_path / "store")
    match = match_labels(store.ids, labels)
    assert len(store) == len(match.records) == 300
    assert match.unlabelled == ()
    assert len(match.unknown) == len(labels) - 300
    dataset = WindowDataset(store, match.records, context=32_768)
    assert len(dataset) == 300
    assert dataset.lengths == store.lengths.tolist()


def test_words_tell_vertebrate_classes_in_seconds(mitochondria, tmp_path):
    fasta, labels = mitochondria
    store = ingest(fasta, tmp_path / "store")
    match = match_labels(store.ids, labels)
    names = labels["label"].iloc[match.rows]
    targets = pd.factorize(names, sort=True)[0]
    order = np.random.default_rng(0).permutation(300)
    train, test = order[:200], order[200:]
    start = time.monotonic()
    prediction = fit_kmer_baseline(
        (store.read(i) for i in train), targets[train], (store.read(i) for i in test)
    )
    assert time.monotonic() - start < 10
    assert (prediction.predicted == targets[test]).mean() > 0.85


COLUMNS = {"id": "record_id", "label": "class"}


@pytest.fixture(scope="module")
def pool(real_data, tmp_path_factory):
    """The store of all 7,461 genomes."""
    fasta = real_data / "genomes" / "mldsp_mito_pool.fasta.gz"
    return ingest(fasta, tmp_path_factory.mktemp("pool") / "store")


@pytest.fixture
def vertebrates(genomes):
    path = genomes / "mldsp_labels.tsv.gz"
    return read_label_table(path, columns=COLUMNS, where={"task": "Vertebrates"})


def test_the_vertebrate_task_is_read_as_it_comes(pool, vertebrates):
    match = match_labels(pool.ids, vertebrates)
    assert (len(pool), pool.counts.bases) == (7_461, 188_580_938)
    assert len(match.records) == len(vertebrates) == 4_322
    assert match.unknown == ()
    assert match.notes(filtered=True) == ["3,139 records are not asked for"]
    assert vertebrates["label"].value_counts().to_dict() == {
        "Amphibians": 290,
        "Birds": 553,
        "Fish": 2_313,
        "Mammals": 874,
        "Reptiles": 292,
    }
    assert pool.lengths[match.records].max() < 32_768


def test_copies_stand_in_the_pool_and_not_in_the_task(pool, vertebrates):
    everywhere = find_copies(pool, range(len(pool)))
    assert [len(places) for places in everywhere] == [2] * 36
    assert find_copies(pool, match_labels(pool.ids, vertebrates).records) == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"task": "Vertebrate"}, "did you mean 'Vertebrates'"),
        ({"task": "Vertebrates", "class": "Insects"}, "'Fish' (2,313 rows), 'Mammals' (874 rows)"),
        ({"kingdom": "Animals"}, "it has 'task', 'class'"),
    ],
)
def test_what_the_real_table_does_not_hold_is_named(genomes, where, words):
    with pytest.raises(InputError) as caught:
        read_label_table(genomes / "mldsp_labels.tsv.gz", columns=COLUMNS, where=where)
    assert words in str(caught.value)


def test_words_of_whole_genomes_reach_the_known_figure(pool, vertebrates):
    match = match_labels(pool.ids, vertebrates)
    rows = vertebrates.iloc[match.rows]
    targets = pd.factorize(rows["label"], sort=True)[0]
    ids = rows["id"].tolist()
    splits = np.array(
        assign_splits(
            ids=ids, labels=rows["label"].tolist(), groups=ids, val_fraction=0.1, test_fraction=0.2
        )
    )
    train, test = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test")
    assert (len(train), len(test)) == (3_026, 865)
    prediction = fit_kmer_baseline(
        (pool.read(i) for i in match.records[train]),
        targets[train],
        (pool.read(i) for i in match.records[test]),
        both_strands=False,
    )
    scores = evaluate(
        targets[test], prediction.probabilities, groups=[ids[row] for row in test], resamples=10
    )
    assert scores["accuracy"].value > 0.99
    assert scores["balanced_accuracy"].value > 0.98


def test_long_genomes_leak_by_their_share_of_words(genomes, tmp_path):
    """Vertebrates of one class, every other one held out, half of these turned around."""
    labels = pd.read_csv(genomes / "mldsp_labels.tsv.gz", sep="\t", dtype=str)
    wanted = set(labels.query("task == 'Vertebrates' and `class` == 'Birds'")["record_id"])
    pool = read_records(genomes / "mldsp_mito_pool.fasta.gz")
    texts = [decode(record.tokens) for record in islice((r for r in pool if r.id in wanted), 200)]
    texts[1::4] = [str(Seq(text).reverse_complement()) for text in texts[1::4]]
    path = tmp_path / "birds.fa"
    path.write_text("".join(f">{number}\n{text}\n" for number, text in enumerate(texts)))
    store = ingest(path, tmp_path / "store", progress=False)
    table = pd.DataFrame({"id": store.ids, "group": store.ids, "split": ["train", "test"] * 100})
    leaks = find_leaks(Collection("birds", table, store, np.arange(200)))
    found = leaks.items.set_index("id")["shared_50mers"].astype(float)
    found = found[found > 0.15]
    words = {name: words_of_both_strands(texts[int(name)]) for name in found.index}
    asked = set().union(*words.values())
    known = set().union(*(asked.intersection(words_of_both_strands(t)) for t in texts[::2]))
    shares = {name: np.mean([word in known for word in own]) for name, own in words.items()}
    assert found.to_dict() == pytest.approx(shares, abs=6e-5)
    counted = leaks.counts.set_index("criterion")["found"]
    assert counted["90% of 50-mers shared"] == sum(share >= 0.9 for share in shares.values()) == 1
    assert counted["30% of 50-mers shared"] == sum(share >= 0.3 for share in shares.values()) == 4


def words_of_both_strands(text):
    turned = str(Seq(text).reverse_complement())
    words = (text[at : at + 50] for at in range(len(text) - 49))
    others = (turned[len(text) - 50 - at :][:50] for at in range(len(text) - 49))
    both = zip(words, others, strict=True)
    return [min(pair) for pair in both if set(pair[0]) <= set("ACGT")]
