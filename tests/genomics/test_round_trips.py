"""Real genomes and their annotations: what is cut is what the files say stands there."""

import pytest
from Bio.Seq import Seq

from pipelines.genomics.alphabet import decode
from pipelines.genomics.ingest import ingest
from pipelines.genomics.intervals import read_intervals
from pipelines.genomics.placing import fetch, place
from pipelines.genomics.variants import check_reference, read_vcf
from pipelines.shared.errors import InputError

pytestmark = pytest.mark.real_data

STOPS = ("TAA", "TAG", "TGA")


@pytest.fixture(scope="module")
def genomes(real_data):
    return real_data / "genomes"


@pytest.fixture(scope="module")
def stored(genomes, tmp_path_factory):
    """Make the store of a file of the genomes' folder, once."""
    folder, stores = tmp_path_factory.mktemp("stores"), {}

    def make(name):
        if name not in stores:
            stores[name] = ingest(genomes / name, folder / name, progress=False)
        return stores[name]

    return make


def coding(genomes, stored, sequences, annotation):
    """The coding sequences of an annotation, spliced, with their attributes."""
    file = read_intervals(genomes / annotation, feature="CDS")
    store = stored(sequences)
    placement = place(file, store)
    return [(item, decode(fetch(store, item))) for item in placement.placed], placement


def protein(item, text):
    attributes = item.interval.attributes
    table = int(attributes.get("transl_table", 1))
    codons = text[item.interval.phase or 0 :]
    return str(Seq(codons).translate(table=table)).removesuffix("*")


def test_the_coding_sequences_of_yeast_are_spliced(genomes, stored):
    """The GFF has 6,316 CDS lines of 5,989 IDs, and every one of them is counted.

    Its contigs are accessions that its own `region` lines call I to XVI; it annotates no
    mitochondrion. 317 features have several lines: 270 introns', and 47 that slip (exception=
    ribosomal slippage, skipping or repeating a base), whose frames are open once spliced. Six hold
    a stop within, as SGD's notes on some of them say: blocked reading frames of this strain,
    which have no protein.
    """
    found, placement = coding(
        genomes,
        stored,
        "yeast_R64-1-1.dna.toplevel.fa.gz",
        "yeast_GCA_000146045.2.gff.gz",
    )
    assert len(found) == 5_989
    assert placement.failures == ()
    assert placement.contigs.renamed["BK006935.2"] == "I"
    assert len(placement.contigs.renamed) == 16
    assert sum(len(item.parts) for item, _ in found) == 6_316
    slipped = [item for item, _ in found if "exception" in item.interval.attributes]
    assert len(slipped) == 47
    assert all(text.startswith("ATG") for _, text in found)
    assert all(text[-3:] in STOPS for _, text in found)
    assert all(len(text) % 3 == 0 for _, text in found)
    assert sum(len(item.parts) > 1 for item, _ in found) == 317
    blocked = {item.interval.name for item, text in found if "*" in protein(item, text)}
    without_protein = {
        item.interval.name for item, _ in found if "protein_id" not in item.interval.attributes
    }
    assert len(blocked) == 6
    assert blocked == without_protein


@pytest.mark.parametrize(
    ("sequences", "annotation", "count"),
    [
        ("phix174_NC_001422.gbk", "phix174_NC_001422.gbk", 11),
        ("phix174_NC_001422.fna", "phix174_NC_001422.gbk", 11),
        ("biopython_NC_005816.fna", "biopython_NC_005816.gb", 10),
        ("biopython_NC_000932.gb.bgz", "biopython_NC_000932.gb.bgz", 85),
        ("biopython_arab1.gb", "biopython_arab1.gb", 18),
    ],
)
def test_genbank_coding_sequences_translate_to_their_proteins(
    sequences, annotation, count, genomes, stored
):
    found, placement = coding(genomes, stored, sequences, annotation)
    assert len(found) == count
    assert placement.failures == ()
    edited = 0
    for item, text in found:
        written = item.interval.attributes["translation"].replace(" ", "")
        if "exception" in item.interval.attributes:  # RNA editing: the protein is not the DNA's
            edited += 1
            continue
        # whatever its first codon, a protein begins with methionine
        assert "M" + protein(item, text)[1:] == "M" + written[1:], item.interval.name
    assert edited == ("NC_000932" in annotation)


def test_sars_cov_2_frames_are_open(genomes, stored):
    """Its GenBank file gives no proteins; ORF1a ends, and ORF1b begins, where ribosomes slip."""
    found, placement = coding(genomes, stored, "sarscov2_MN908947.fasta", "sarscov2_MN908947.gb")
    texts = {item.interval.attributes["gene"]: text for item, text in found}
    assert len(texts) == len(found) == 12
    assert placement.failures == ()
    for gene, text in texts.items():
        assert len(text) % 3 == 0, gene
        assert (text[-3:] in STOPS) == (gene != "ORF1a"), gene
        assert "*" not in str(Seq(text[:-3]).translate()), gene
        assert text.startswith("ATG") == (gene != "ORF1b"), gene


def test_a_gene_across_the_origin_of_phix_is_spliced(genomes, stored):
    found, _ = coding(genomes, stored, "phix174_NC_001422.fna", "phix174_NC_001422.gbk")
    across = [item for item, _ in found if len(item.parts) == 2]
    assert [tuple(part.start for part in item.parts) for item in across] == [
        (3980, 0),
        (4496, 0),
        (5074, 0),
    ]


def test_gff_and_genbank_of_phix_agree_but_for_the_starts_that_count_from_zero(genomes, stored):
    """The GFF was written with starts that count from 0: a spare base stands before each gene.

    Two of its eleven frames begin at another start codon than GenBank's (their stops agree). Its
    contig is lengthened by 136 bases; on the circular record its ends wrap.
    """
    ours, _ = coding(genomes, stored, "phix174_NC_001422.gbk", "phix174_NC_001422.gbk")
    found, placement = coding(genomes, stored, "phix174_NC_001422.gbk", "phix174_NC_001422.gff")
    frames, lengths = placement.suspicions
    assert "all 11 coding sequences are one base longer than whole codons" in frames
    assert "NC_001422.1 has 5,522 there and 5,386 here" in lengths
    assert sum("across the origin" in item.flags for item, _ in found) == 2
    known = {text for _, text in ours}
    equal = [text[1:] in known for _, text in found]
    assert (len(found), sum(equal)) == (11, 9)
    ends = {item.parts[-1].end for item, _ in ours}
    assert all(item.parts[-1].end in ends for item, _ in found)


def test_without_a_circle_features_past_the_end_are_listed(genomes, stored):
    _, placement = coding(genomes, stored, "phix174_NC_001422.fna", "phix174_NC_001422.gff")
    assert [failure.status for failure in placement.failures] == ["past_end"] * 2
    assert "5,386 bases" in placement.failures[0].reason


def test_bcftools_transcript_is_read_backwards(genomes, stored):
    found, _ = coding(
        genomes,
        stored,
        "bcftools_csq_ENST00000520795.fa",
        "bcftools_csq_ENST00000520795.gff",
    )
    ((item, text),) = found
    assert [part.start for part in item.parts] == [212_871, 106_142, 94_943]
    assert item.interval.phase == 2
    codons = text[2 : 2 + (len(text) - 2) // 3 * 3]
    assert "*" not in str(Seq(codons).translate())[:-1]


def test_nist_regions_are_cut_from_their_chromosome(genomes, stored):
    file = read_intervals(genomes / "nucleus_test_nist.b37_chr20_100kbp_at_10mb.bed")
    store = stored("nucleus_ucsc.hg19.chr20.unittest.fasta.gz")
    placement = place(file, store, past_end="error")
    texts = [decode(fetch(store, item)) for item in placement.placed]
    assert [len(text) for text in texts] == [item.end - item.start for item in file]
    assert not any("N" in text for text in texts)


@pytest.mark.parametrize(
    ("sequences", "calls", "lines", "alleles", "skipped", "moved"),
    [
        ("human_chr20_1mb1kgp.fa.gz", "human_chr20_1mb1kgp.vcf.gz", 28_998, 29_120, 24, 0),
        (
            "nucleus_ucsc.hg19.chr20.unittest.fasta.gz",
            "nucleus_test_nist.b37_chr20_100kbp_at_10mb.vcf.gz",
            221, 222, 0, 2,
        ),
        ("human_hg38_1m.fa.gz", "baskerville_eqtl.vcf", 8, 8, 0, 0),
    ],
)  # fmt: skip
def test_ref_alleles_match(sequences, calls, lines, alleles, skipped, moved, genomes, stored):
    file = read_vcf(genomes / calls)
    checked = check_reference(file, stored(sequences))
    assert len(file.lines) == checked.num_checked == checked.num_matching == lines
    assert len(checked.placed) == alleles
    assert len(checked.failures) == skipped
    changed = [item for item in checked.placed if item.variant.position != item.written.position]
    assert len(changed) == moved


def test_swapped_alleles_are_reported(genomes, stored):
    file = read_vcf(genomes / "baskerville_eqtl_flip.vcf")
    store = stored("human_hg38_1m.fa.gz")
    with pytest.raises(InputError) as caught:
        check_reference(file, store)
    assert "8 of 8 REF alleles do not match" in str(caught.value)
    assert "in 8 of them ALT stands there" in str(caught.value)
    checked = check_reference(file, store, policy="warn")
    assert (checked.num_checked, checked.num_matching) == (8, 0)
    assert not any(item.ref_match for item in checked.placed)
