"""BED, narrowPeak, tables, GFF3, GTF and GenBank become intervals that count from 0, half-open."""

import gzip
from pathlib import Path

import pytest
from Bio.bgzf import BgzfWriter

from pipelines.genomics.intervals import Part, read_intervals
from pipelines.shared.errors import InputError


@pytest.fixture
def write(tmp_path):
    def make(text: str, name: str = "file.bed") -> Path:
        path = tmp_path / name
        path.write_bytes(text.encode())
        return path

    return make


def only(path, **settings):
    (interval,) = read_intervals(path, **settings)
    return interval


def test_bed_of_three_columns(write):
    found = only(write("chr1\t0\t10\n"))
    assert (found.contig, found.start, found.end, found.strand) == ("chr1", 0, 10, ".")
    assert found.name == "chr1:0-10"
    assert found.source.endswith("file.bed: line 1")


def test_what_is_no_interval_is_passed_over_and_lines_keep_their_numbers(write):
    lines = ["\ufeffbrowser position", "track name=x", "# comment", "", "chr1\t5\t9\tpeak\t12.5\t-"]
    found = only(write("\r\n".join([*lines, "", ""])))
    assert (found.name, found.score, found.strand) == ("peak", 12.5, "-")
    assert found.source.endswith("line 5")


@pytest.mark.parametrize("pack", [gzip.open, BgzfWriter], ids=["gzip", "bgzf"])
def test_packed_files_are_told_by_content(pack, tmp_path):
    path = tmp_path / "packed.bed"
    with pack(path, "wb") as file:
        file.write(b"chr1\t0\t10\n")
    assert only(path).end == 10


def test_blocks_are_parts_in_reading_order(write):
    line = "chr1\t100\t200\tgene\t0\t{}\t100\t200\t0\t3\t10,20,30,\t0,40,70,\n"
    forward, backward = (only(write(line.format(strand))) for strand in "+-")
    assert forward.parts == (Part(100, 110, "+"), Part(140, 160, "+"), Part(170, 200, "+"))
    assert backward.parts == (Part(170, 200, "-"), Part(140, 160, "-"), Part(100, 110, "-"))
    assert forward.length == 60


def test_a_narrow_peak_has_a_summit(write):
    file = read_intervals(write("chr1\t100\t300\t.\t0\t.\t182.1\t5.0\t4.2\t50\n"))
    assert file.format == "narrowPeak"
    assert file.intervals[0].summit == 150
    assert only(write("chr1\t100\t300\t.\t0\t.\t182.1\t5.0\t4.2\t-1\n")).summit is None


def test_a_header_says_what_columns_are(write):
    text = "chrom\tstart\tend\tclass\tsplit\tstrand\nchr1\t5\t9\tenhancer\ttest\t-\n"
    found = only(write(text), columns={"label": "class"})
    assert (found.label, found.split, found.strand) == ("enhancer", "test", "-")
    commented = only(write("#" + text), columns={"label": "class"})
    assert (commented.label, commented.split) == ("enhancer", "test")


def test_a_table_by_commas(write):
    found = only(write("id,region,start,end,strand\n77,chrX,5,9,-\n", "intervals.csv"))
    assert (found.name, found.contig, found.start, found.end) == ("77", "chrX", 5, 9)


def test_columns_without_header_go_by_number(write):
    found = only(write("chr1\t5\t9\tp\tenhancer\t-\ttest\n"), columns={"label": "5", "split": "7"})
    assert (found.label, found.split, found.score, found.strand) == ("enhancer", "test", None, "-")


BAD_BED = {
    "two columns": ("chr1\t5\n", ["line 1", "2 columns"]),
    "no number": ("chr1\t0\t9\nchr1\t1,000\t2,000\n", ["line 2", "'1,000'", "no commas"]),
    "no bases": ("chr1\t5\t5\n", ["line 1", "no bases", "from 0, half-open"]),
    "the wrong way round": ("chr1\t9\t5\n", ["line 1", "start 9", "end 5"]),
    "no contig": ("\t5\t9\n", ["line 1", "contig is empty"]),
    "a strand of another kind": ("chr1\t5\t9\tp\t0\tforward\n", ["line 1", "'forward'"]),
    "a score that is a word": ("chr1\t5\t9\tp\thigh\n", ["line 1", "'high'", "columns.label=5"]),
    "a line of another width": ("chr1\t5\t9\tp\nchr1\t5\t9\n", ["line 2", "3 columns", "4"]),
    "blocks past the end": (
        "chr1\t0\t99\tg\t0\t+\t0\t99\t0\t2\t10,10,\t0,50,\n", ["line 1", "blocks"]),
    "blocks that are not counted": (
        "chr1\t0\t99\tg\t0\t+\t0\t99\t0\t3\t10,10,\t0,89,\n", ["line 1", "3 blocks", "2 sizes"]),
    "only comments": ("# nothing\ntrack x\n", ["no intervals"]),
    "VCF": ("##fileformat=VCFv4.2\n", ["VCF", "variants="]),
    "FASTA": (">a\nACGT\n", ["FASTA", "sequences="]),
    "binary": ("chr1\0\t5", ["binary"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_BED)
def test_bad_bed_is_named(case, write):
    text, words = BAD_BED[case]
    path = write(text)
    with pytest.raises(InputError) as caught:
        read_intervals(path)
    for word in [str(path), *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": "class"}, "no header"),
        ({"label": "9"}, "there are 4 columns"),
        ({"colour": "4"}, "columns.colour"),
    ],
)
def test_columns_that_are_not_there_are_named(columns, words, write):
    with pytest.raises(InputError, match=words):
        read_intervals(write("chr1\t5\t9\tp\n"), columns=columns)
    with pytest.raises(InputError, match="no column 'kind'"):
        read_intervals(write("chrom\tstart\tend\nchr1\t5\t9\n"), columns={"label": "kind"})


def gff(*rows: str) -> str:
    return "\n".join(["##gff-version 3", *rows, ""])


def row(kind: str, start: int, end: int, strand: str, phase: str, attributes: str) -> str:
    return f"chr1\tsrc\t{kind}\t{start}\t{end}\t.\t{strand}\t{phase}\t{attributes}"


def test_gff_counts_from_one_and_its_escapes_are_read(write):
    found = only(write(gff(row("gene", 1, 10, "+", ".", "ID=a%3Bb;Note=x%2C y"))))
    assert (found.start, found.end, found.name) == (0, 10, "a;b")
    assert found.attributes["Note"] == "x, y"
    assert found.kind == "gene"


@pytest.mark.parametrize("strand", "+-")
def test_lines_of_one_id_are_one_feature_in_reading_order(strand, write):
    rows = [row("CDS", s, s + 4, strand, p, "ID=c") for s, p in [(31, "1"), (11, "2"), (21, "0")]]
    found = only(write(gff(*rows)))
    starts = [part.start for part in found.parts]
    assert starts == ([10, 20, 30] if strand == "+" else [30, 20, 10])
    assert found.phase == (2 if strand == "+" else 1)
    assert (found.start, found.end) == (10, 35)


def test_parts_of_a_trans_spliced_feature_go_by_their_number(write):
    rows = [
        row("CDS", 11, 15, "+", "0", "ID=c;part=2"),
        row("CDS", 31, 35, "-", "0", "ID=c;part=1"),
    ]
    assert only(write(gff(*rows))).parts == (Part(30, 35, "-"), Part(10, 15, "+"))
    with pytest.raises(InputError, match="changes its strand"):
        read_intervals(write(gff(*(text.partition(";part")[0] for text in rows))))


def test_cds_without_an_id_are_joined_by_parent_and_other_types_are_not(write):
    rows = [row("CDS", 1, 3, "+", "0", "Parent=t1"), row("CDS", 7, 9, "+", "0", "Parent=t1")]
    assert len(read_intervals(write(gff(*rows)))) == 1
    exons = [text.replace("CDS", "exon") for text in rows]
    assert len(read_intervals(write(gff(*exons)))) == 2


def test_gtf_joins_cds_by_transcript(write):
    rows = [
        row("CDS", 1, 3, "-", "0", 'gene_id "g; 1"; transcript_id "t1"; level 2;'),
        row("CDS", 7, 9, "-", "0", 'gene_id "g; 1"; transcript_id "t1"; tag "x"; tag "y";'),
    ]
    found = only(write("\n".join(rows) + "\n", "genes.gtf"), columns={"label": "gene_id"})
    assert [part.start for part in found.parts] == [6, 0]
    assert (found.label, found.name) == ("g; 1", "t1")


def test_the_type_must_be_said_where_there_are_several(write):
    path = write(gff(row("gene", 1, 9, "+", ".", "ID=g"), row("CDS", 1, 9, "+", "0", "ID=c")))
    with pytest.raises(InputError, match=r"gene \(1\), CDS \(1\).*feature=TYPE"):
        read_intervals(path)
    with pytest.raises(InputError, match="no features of type 'cds'"):
        read_intervals(path, feature="cds")
    assert only(path, feature="CDS").name == "c"


def test_a_region_names_its_contig_otherwise_and_may_be_circular(write):
    region = row("region", 1, 99, "+", ".", "ID=r;Name=I;chromosome=I;Is_circular=true")
    file = read_intervals(write(gff(region, row("gene", 5, 9, "+", ".", "ID=g"))))
    assert file.aliases == {"chr1": ("I",)}
    assert file.circular == {"chr1"}


def test_sequence_behind_the_features_is_not_read(write):
    text = gff(row("gene", 5, 9, "+", ".", "ID=g"), "###", "##FASTA", ">chr1", "ACGT\tA")
    assert len(read_intervals(write(text))) == 1


BAD_GFF = {
    "start of 0": (row("gene", 0, 9, "+", ".", "ID=g"), "start is 0; GFF counts from 1"),
    "the wrong way round": (row("gene", 9, 5, "+", ".", "ID=g"), "lies behind the end"),
    "eight columns": ("chr1\tsrc\tgene\t1\t9\t.\t+\t.", "8 columns by tabs where GFF has 9"),
    "no number": (row("gene", 1, 9, "+", ".", "ID=g").replace("\t9\t", "\tnine\t"), "'nine'"),
    "a strand of another kind": (row("gene", 1, 9, "f", ".", "ID=g"), "strand is 'f'"),
    "a phase of 3": (row("CDS", 1, 9, "+", "3", "ID=g"), "phase is '3'"),
    "an attribute without sign": (row("gene", 1, 9, "+", ".", "ID=g;partial"), "no '='"),
    "a score that is a word": (
        row("gene", 1, 9, "+", ".", "ID=g").replace("\t.\t+", "\thigh\t+"), "'high'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_GFF)
def test_bad_gff_is_named(case, write):
    text, words = BAD_GFF[case]
    path = write(gff(row("gene", 1, 9, "+", ".", "ID=first"), text))
    with pytest.raises(InputError) as caught:
        read_intervals(path)
    assert f"{path}: line 3: " in str(caught.value)
    assert words in str(caught.value)


def test_an_attribute_that_no_feature_has_is_named(write):
    path = write(gff(row("gene", 1, 9, "+", ".", "ID=g;biotype=x")))
    assert only(path, columns={"label": "biotype"}).label == "x"
    assert only(path, columns={"label": "type"}).label == "gene"
    with pytest.raises(InputError, match=r"attribute 'kind'.*biotype"):
        read_intervals(path, columns={"label": "kind"})


def test_starts_that_count_from_zero_are_suspected(write):
    rows = [row("CDS", s, s + 3, "+", "0", f"ID=c{s}") for s in (1, 11, 21)]
    (note,) = read_intervals(write(gff(*rows))).notes
    assert "one base longer than whole codons" in note
    rows[0] = row("CDS", 1, 3, "+", "0", "ID=c1")
    assert read_intervals(write(gff(*rows))).notes == ()


GENBANK = """LOCUS       plasmid                   40 bp    DNA     {topology} BCT 01-JAN-2026
DEFINITION  made for a test.
ACCESSION   plasmid
VERSION     plasmid.1
FEATURES             Location/Qualifiers
     source          1..40
                     /organism="none"
{features}ORIGIN
        1 acgtacgtac ggttggttgg aaccaaccaa ttttggggcc
//
"""


def genbank(*locations: str, topology: str = "linear  ", kind: str = "CDS") -> str:
    features = "".join(
        f'     {kind:16}{location}\n                     /gene="g{number}"\n'
        f"                     /codon_start=2\n"
        for number, location in enumerate(locations)
    )
    return GENBANK.format(features=features, topology=topology)


def test_genbank_locations_are_read(write):
    text = genbank("3..10", "complement(join(1..4,7..9))", "<1..>6", topology="circular")
    file = read_intervals(write(text, "p.gb"), columns={"label": "gene", "name": "gene"})
    plain, spliced, partial = file
    assert (plain.contig, plain.start, plain.end, plain.strand) == ("plasmid.1", 2, 10, "+")
    assert (plain.label, plain.phase) == ("g0", 1)
    assert spliced.parts == (Part(6, 9, "-"), Part(0, 4, "-"))
    assert (partial.start, partial.end) == (0, 6)
    assert file.circular == {"plasmid.1"}
    assert file.aliases == {"plasmid.1": ("plasmid",)}


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("one-of(1,4)..9", "one-of"),
        ("order(1..3,7..9)", "order"),
        ("12^13", "between two bases"),
        ("join(1..3,other.1:5..9)", "another record, other.1"),
        ("(2.5)..9", "not exact"),
    ],
)
def test_locations_that_are_no_stretch_are_listed(location, reason, write):
    file = read_intervals(write(genbank("1..3", location), "p.gb"))
    assert len(file) == 1
    (skipped,) = file.skipped
    assert reason in skipped.reason
    assert (skipped.id, skipped.status) == ("g1", "inexact")
    assert "feature 3 (CDS)" in skipped.path


def test_genbank_cut_short_and_protein_are_refused(write):
    whole = genbank("1..3")
    with pytest.raises(InputError, match="lacks its end marker //"):
        read_intervals(write(whole.removesuffix("//\n"), "p.gb"))
    with pytest.raises(InputError, match=r"'plasmid.1' is protein"):
        read_intervals(write(whole.replace("40 bp    DNA    ", "40 aa           "), "p.gb"))
    with pytest.raises(InputError, match="no features"):
        read_intervals(write(GENBANK.format(features="", topology="linear  "), "p.gb"))
