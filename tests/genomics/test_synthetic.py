from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pipelines.genomics.alphabet import decode, encode, reverse_complement
from pipelines.genomics.baseline import fit_kmer_baseline
from pipelines.genomics.genome import read_records
from pipelines.genomics.synthetic import MotifPlan, check_motifs, make_records, write_dataset
from pipelines.shared.errors import InputError

PLAN = MotifPlan()


def opposite(text):
    return decode(reverse_complement(encode(text)))


def locate(plan, sequence):
    """Start of each motif's copies on the strand where they read forwards; None elsewhere."""
    sites = [motif * plan.copies for motif in plan.motifs]
    strands = [s for s in (sequence, opposite(sequence)) if sites[0] in s]
    assert len(strands) == 1
    assert all(strands[0].count(motif) == plan.copies for motif in plan.motifs)
    assert not any(opposite(motif) in strands[0] for motif in plan.motifs)
    return tuple(strands[0].index(site) for site in sites)


@pytest.mark.parametrize(
    "plan",
    [
        PLAN,
        replace(PLAN, wrong_gap_share=0.0, reverse_share=0.0),
        replace(PLAN, copies=1, length=500, reverse_share=1.0),
    ],
)
def test_order_and_distance_decide_the_class_on_either_strand(plan):
    size = plan.motif_bases // 2
    for record in make_records(plan, num_pairs=200, seed=1):
        first, second = locate(plan, record.sequence)
        gap = abs(first - second) - size
        right = plan.right_gap[0] <= gap <= plan.right_gap[1]
        assert record.label == (first < second and right)
        assert right or plan.wrong_gap[0] <= gap <= plan.wrong_gap[1]
        assert gap > 2 * plan.reach
        assert min(first, second) > plan.reach
        assert plan.length - max(first, second) - size > plan.reach
        assert len(record.sequence) == plan.length


def test_records_of_a_pair_hold_the_same_letters():
    records = make_records(PLAN, num_pairs=50, seed=2)
    for positive, negative in zip(records[::2], records[1::2], strict=True):
        assert positive.pair == negative.pair
        assert (positive.label, negative.label) == (1, 0)
        assert Counter(positive.sequence) == Counter(negative.sequence)
        backgrounds = [strip_motifs(r.sequence) for r in (positive, negative)]
        assert backgrounds[0] == backgrounds[1]


def strip_motifs(sequence):
    forward = sequence if PLAN.motifs[0] in sequence else opposite(sequence)
    for motif in PLAN.motifs:
        forward = forward.replace(motif * PLAN.copies, "")
    return forward


def test_shares_of_negatives_and_strands_are_as_planned():
    records = make_records(PLAN, num_pairs=1000, seed=3)
    positions = [locate(PLAN, record.sequence) for record in records]
    too_far = np.mean([a < b for (a, b), r in zip(positions, records, strict=True) if not r.label])
    forward = np.mean([PLAN.motifs[0] in record.sequence for record in records])
    assert abs(too_far - PLAN.wrong_gap_share) < 0.05
    assert abs(forward - 0.5) < 0.06


@pytest.mark.parametrize(
    "motifs",
    [
        ("AACCGGTT", "GAAGGAGA"),  # its own reverse complement
        ("CCAACACC", "GGTGTTGG"),  # each other's
        ("CCAACACC", "AACA"),  # holds the other
        ("CCAACACC", "TGTT"),  # holds the other's reverse complement
        ("CCAACACC", "CACCGGAA"),  # overlaps the other
        ("CCAACACC", "CCAACACC"),
        ("CCAACANC", "GAAGGAGA"),
        ("CCAACACC", ""),
    ],
)
def test_motifs_that_can_be_confused_are_refused(motifs):
    with pytest.raises(ValueError, match="motifs"):
        check_motifs(motifs)


def test_default_motifs_cannot_be_confused():
    check_motifs(PLAN.motifs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reach": 42}, "two reaches"),
        ({"right_gap": (130, 84)}, "two reaches|not be empty"),
        ({"wrong_gap": (170, 169)}, "not be empty"),
        ({"wrong_gap": (120, 228)}, "above right ones"),
        ({"length": 300}, "382 bases"),
        ({"copies": 0}, "at least once"),
    ],
)
def test_plans_that_give_the_class_away_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **changes)


def test_plans_take_lists_as_configuration_gives_them():
    assert replace(PLAN, right_gap=[84, 130], motifs=list(PLAN.motifs)) == PLAN


def test_dataset_is_written_alike_each_time(tmp_path):
    sizes = {"num_train": 20, "num_val": 4, "num_test": 6}
    fasta, labels = write_dataset(tmp_path / "a", seed=5, **sizes)
    again = write_dataset(tmp_path / "b", seed=5, **sizes)
    other = write_dataset(tmp_path / "c", seed=6, **sizes)
    assert fasta.read_bytes() == again[0].read_bytes() != other[0].read_bytes()
    assert labels.read_bytes() == again[1].read_bytes()

    table = pd.read_csv(labels, sep="\t", dtype=str)
    assert list(table.columns) == ["id", "label", "split", "group"]
    assert [record.id for record in read_records(fasta)] == table["id"].tolist()
    assert table["split"].value_counts().to_dict() == {"train": 20, "test": 6, "val": 4}
    pairs = table.groupby("group")
    assert (pairs["split"].nunique() == 1).all()
    assert (pairs["label"].agg(lambda labels: "".join(sorted(labels))) == "01").all()
    # neither place in the file nor id tells the class
    assert 2 < (table["label"].iloc[:15] == "1").sum() < 13


def test_odd_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="even"):
        write_dataset(tmp_path, num_train=3)


@pytest.mark.parametrize("k", [4, 6])
@pytest.mark.parametrize("both_strands", [False, True])
def test_word_counts_stay_at_chance(k, both_strands):
    records = make_records(PLAN, num_pairs=700, seed=4)
    tokens = [encode(record.sequence) for record in records]
    labels = np.array([record.label for record in records])
    prediction = fit_kmer_baseline(
        tokens[:1000], labels[:1000], tokens[1000:], k=k, both_strands=both_strands
    )
    assert abs((prediction.predicted == labels[1000:]).mean() - 0.5) < 0.08


def test_local_words_are_shared_within_a_pair():
    """Whatever stands within one reach around a letter, but where motif and background meet."""
    records = make_records(replace(PLAN, wrong_gap_share=0.0), num_pairs=20, seed=6)
    for positive, negative in zip(records[::2], records[1::2], strict=True):
        words = [
            Counter(r.sequence[i : i + 8] for i in range(PLAN.length - 7))
            for r in (positive, negative)
        ]
        # 2 sites with 2 edges and 7 words across each
        assert (words[0] - words[1]).total() <= 28


def test_motifs_are_planted_into_real_dna_of_each_split(tmp_path):
    """Without its motifs a record is a stretch of the part of the genome that serves its split."""
    generator = np.random.default_rng(0)
    genome = {f"chr{n}": decode(generator.integers(1, 5, 6_000, np.uint8)) for n in range(3)}
    genome["chr1"] = genome["chr1"][:2_000] + "N" * 100 + genome["chr1"][2_100:]
    file = tmp_path / "genome.fa"
    file.write_text("".join(f">{name}\n{text}\n" for name, text in genome.items()))
    sizes = {"num_train": 40, "num_val": 20, "num_test": 20}
    fasta, labels = write_dataset(tmp_path / "a", PLAN, seed=7, background=[file], **sizes)
    split = pd.read_csv(labels, sep="\t").set_index("id")["split"]
    parts = {"train": (0, 3_600), "val": (3_600, 4_800), "test": (4_800, 6_000)}
    seen = set()
    for record in read_records(fasta):
        background = strip_motifs(decode(record.tokens))
        low, high = parts[split[record.id]]
        both = (background, opposite(background))
        found = {name for name, text in genome.items() for one in both if one in text[low:high]}
        assert len(found) == 1
        seen |= found
    assert seen == set(genome)
    again, _ = write_dataset(tmp_path / "b", PLAN, seed=7, background=[file], **sizes)
    assert again.read_bytes() == fasta.read_bytes()


def test_too_short_a_genome_is_named(tmp_path):
    file = tmp_path / "short.fa"
    file.write_text(">a\n" + "ACGT" * 380 + "\n")
    with pytest.raises(InputError, match=r"short\.fa has no 312 bases .* 20% .* serve val"):
        write_dataset(tmp_path / "o", PLAN, background=[file])
