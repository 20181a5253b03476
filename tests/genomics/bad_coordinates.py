"""Rows of test_bad_input.py about intervals, contigs, variants, tokenizers and exports."""

import gzip
from collections.abc import Callable
from pathlib import Path

from Bio.bgzf import BgzfWriter

GENOME = ">chr1\nACGTTGCAACGGTCATTAGC\n>chr2\nACGTNACGTN\n"

Make = Callable[[Path], Path]


def beside(content: str | bytes, name: str, *, genome: str = GENOME) -> Make:
    """Write a file of coordinates, and a genome beside it."""

    def make(folder: Path) -> Path:
        (folder / "genome.fa").write_text(genome)
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def bed(content: str | bytes) -> Make:
    return beside(content, "bad.bed")


def gff(*rows: str) -> Make:
    text = "\n".join("\t".join(row.split()) for row in rows)
    return beside(f"##gff-version 3\n{text}\n", "bad.gff")


def vcf(*rows: str) -> Make:
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    text = "".join("\t".join(row.split()) + "\n" for row in rows)
    return beside(head + text, "bad.vcf")


def genbank(location: str, *, end: str = "//\n") -> Make:
    text = (
        "LOCUS       chr1                      20 bp    DNA     linear   BCT 01-JAN-2026\n"
        "VERSION     chr1\nFEATURES             Location/Qualifiers\n"
        '     CDS             3..8\n                     /gene="good"\n'
        f'     CDS             {location}\n                     /gene="odd"\n'
        f"ORIGIN\n        1 acgttgcaac ggtcattagc\n{end}"
    )
    return beside(text, "bad.gb")


def cut_between_blocks(folder: Path) -> Path:
    """Block gzip without its end: what is left unpacks without an error."""
    path = bed("")(folder)
    with BgzfWriter(str(path)) as file:
        file.write(b"chr1\t0\t5\n" * 20_000)
    path.write_bytes(path.read_bytes()[:-28])
    return path


def cut_in_a_block(folder: Path) -> Path:
    path = bed("")(folder)
    text = b"".join(b"chr1\t%d\t20\n" % (number % 19) for number in range(9_999))
    path.write_bytes(gzip.compress(text)[:-99])
    return path


def model(change: Callable[[dict[str, object]], None] | None = None) -> Make:
    """Write an untrained model, its metadata changed."""

    def make(folder: Path) -> Path:
        from pipelines.genomics.model import DnaClassifier
        from pipelines.genomics.tokenizers import BaseTokenizer, digest
        from pipelines.shared.checkpoint import save_model
        from pipelines.shared.objective import Classification

        (folder / "genome.fa").write_text(GENOME)
        pattern = "SlidingWindow(radius=4) | GlobalTokens(1)"
        network = DnaClassifier(dim=8, depth=1, num_heads=1, pattern=pattern, num_classes=2)
        tokenizer = BaseTokenizer()
        metadata: dict[str, object] = {
            "task": Classification(("0", "1")).plain(),
            "context": 16,
            "overlap": 4,
            "tokenizer": tokenizer.config,
            "tokenizer_digest": digest(tokenizer),
        }
        if change is not None:
            change(metadata)
        save_model(folder / "model.ckpt", network, task="genomics", metadata=metadata)
        return folder / "model.ckpt"

    return make


def another_digest(metadata: dict[str, object]) -> None:
    metadata["tokenizer_digest"] = "0" * 64


def another_alphabet(metadata: dict[str, object]) -> None:
    metadata["tokenizer"] = {"kind": "base", "letters": "ACGT"}


def words_of_three(metadata: dict[str, object]) -> None:
    from pipelines.genomics.tokenizers import KmerTokenizer, digest

    tokenizer = KmerTokenizer(3, stride=3)
    metadata |= {"tokenizer": tokenizer.config, "tokenizer_digest": digest(tokenizer)}


CUT = ["export", "sequences={folder}/genome.fa", "intervals={input}"]
CHECK = ["export", "sequences={folder}/genome.fa", "variants={input}"]
PREDICT = ["predict", "sequences={folder}/genome.fa", "ckpt={input}"]
LATE = "chr1\t0\t5\nchr1\t15\t25\n"

ROWS_C = [
    # intervals: the text
    ("bed: two columns", bed("chr1\t5\n"), CUT, 2, ["{input}: line 1: 2 columns"]),
    ("bed: commas in numbers", bed("chr1\t1,000\t2,000\n"), CUT, 2, ["line 1", "'1,000'"]),
    ("bed: a float", bed("chr1\t1.0\t5\n"), CUT, 2, ["line 1", "'1.0'", "whole number"]),
    ("bed: no bases", bed("chr1\t0\t5\nchr1\t5\t5\n"), CUT, 2, ["line 2", "no bases", "half-open"]),
    ("bed: end before start", bed("chr1\t9\t5\n"), CUT, 2, ["line 1", "start 9", "end 5"]),
    ("bed: ragged", bed("chr1\t0\t5\ta\nchr1\t0\t5\n"), CUT, 2, ["line 2", "3 columns", "have 4"]),
    ("bed: strand", bed("chr1\t0\t5\ta\t0\tminus\n"), CUT, 2, ["line 1", "'minus'", "+, - or ."]),
    ("bed: score", bed("chr1\t0\t5\ta\thigh\t+\n"), CUT, 2, ["line 1", "'high'", "columns.label="]),
    ("bed: summit", bed("chr1\t0\t5\ta\t0\t+\t1\t1\t1\t5\n"), CUT, 2,
     ["line 1", "the summit is 5", "interval of 5", "-1"]),
    ("bed: blocks", bed("chr1\t0\t20\ta\t0\t+\t0\t20\t0\t2\t5,5,\t0,9,\n"), CUT, 2,
     ["line 1", "blocks do not reach"]),
    ("bed: empty", bed(""), CUT, 2, ["{input} is empty"]),
    ("bed: comments alone", bed("# none\ntrack name=x\n"), CUT, 2, ["{input} has no intervals"]),
    ("bed: no UTF-8", bed(b"chr1\t0\t5\nchr\xff\t0\t5\n"), CUT, 2, ["{input}", "UTF-8"]),
    ("bed: bigWig", bed(b"\x26\xfc\x8f\x88" + bytes(99)), CUT, 2, ["bigWig", "bigWigToBedGraph"]),
    ("bed: wiggle", bed("fixedStep chrom=chr1\n1\n"), CUT, 2, ["{input}", "wiggle"]),
    ("bed: BGZF cut between blocks", cut_between_blocks, CUT, 2, ["{input} is cut short"]),
    ("bed: gzip cut", cut_in_a_block, CUT, 2, ["{input}", "cut short"]),
    ("bed: missing", lambda folder: bed("")(folder).with_name("none.bed"), CUT, 2,
     ["intervals={input}: no such file"]),
    ("bed: label of no column", bed("chr1\t0\t5\n"), [*CUT, "columns.label=class"], 2,
     ["line 1", "columns.label=class", "no header"]),
    ("bed: feature", bed("chr1\t0\t5\n"), [*CUT, "feature=CDS"], 2, ["feature=CDS", "BED"]),
    # intervals: the genome
    ("past the end is listed", bed(LATE), CUT, 3,
     ["{input}: line 2", "15 to 25 reaches beyond 'chr1', which has 20 bases", "past_end=shift"]),
    ("past the end as an error", bed(LATE), [*CUT, "past_end=error"], 2, ["line 2", "20 bases"]),
    ("past the end, shifted", bed(LATE), [*CUT, "past_end=shift"], 0,
     ["intervals shifted inwards: 1"]),
    ("past the end, padded", bed(LATE), [*CUT, "past_end=pad_n"], 0,
     ["intervals padded with N: 1"]),
    ("below 0", bed("chr1\t0\t5\nchr1\t-5\t5\n"), CUT, 3, ["line 2", "-5 to 5 reaches beyond"]),
    ("below 0, shifted", bed("chr1\t-5\t5\n"), [*CUT, "past_end=shift"], 0,
     ["intervals shifted inwards: 1"]),
    ("longer than its record", bed("chr1\t-5\t25\n"), [*CUT, "past_end=shift"], 2,
     ["no interval is left", "20 bases"]),
    ("past_end of no meaning", bed(LATE), [*CUT, "past_end=clip"], 2, ["drop, error, shift"]),
    ("width of 0", bed("chr1\t0\t5\n"), [*CUT, "width=0"], 2, ["width", "above 0"]),
    ("an unknown contig is listed", bed("chr1\t0\t5\nchr7\t0\t5\n"), CUT, 3,
     ["{input}: line 2", "contig 'chr7' is not in the sequences"]),
    ("only unknown contigs", bed("chr7\t0\t5\n"), CUT, 2, ["none of its contigs (chr7)", "chr1"]),
    ("contigs renamed", bed("1\t0\t5\nNC_000002.12\t0\t5\n"), CUT, 0,
     ["1 is chr1, NC_000002.12 is chr2"]),
    ("a contig that may be two",
     beside("CHR1\t0\t2\n", "bad.bed", genome=">chr1\nACGT\n>1\nGGGG\n"), CUT, 2,
     ["{input}: contig 'CHR1' may be any of chr1, 1"]),
    ("two contigs that are one", bed("1\t0\t5\nCHR1\t0\t5\n"), CUT, 2,
     ["contigs '1' and 'CHR1' would both be 'chr1'"]),
    # GFF and GenBank
    ("gff: start of 0", gff("chr1 s CDS 0 9 . + 0 ID=a"), CUT, 2, ["line 2", "counts from 1"]),
    ("gff: eight columns", gff("chr1 s CDS 1 9 . + 0"), CUT, 2, ["line 2", "8 columns"]),
    ("gff: phase", gff("chr1 s CDS 1 9 . + 5 ID=a"), CUT, 2, ["line 2", "phase is '5'"]),
    ("gff: attributes", gff("chr1 s CDS 1 9 . + 0 gene"), CUT, 2, ["line 2", "'gene' has no '='"]),
    ("gff: strands mixed", gff("chr1 s CDS 1 3 . + 0 ID=a", "chr1 s CDS 7 9 . - 0 ID=a"), CUT, 2,
     ["line 3", "'a' (from line 2) changes its strand", "part=1"]),
    ("gff: several types", gff("chr1 s gene 1 9 . + . ID=a", "chr1 s CDS 1 9 . + 0 ID=b"), CUT, 2,
     ["gene (1), CDS (1)", "feature=TYPE"]),
    ("gff: a type it has not", gff("chr1 s gene 1 9 . + . ID=a"), [*CUT, "feature=exon"], 2,
     ["no features of type 'exon'", "gene (1)"]),
    ("genbank: no end marker", genbank("9..11", end=""), CUT, 2, ["{input}", "end marker //"]),
    ("genbank: one-of", genbank("one-of(9,10)..12"), CUT, 3,
     ["record 'chr1', feature 2 (CDS)", "one-of", "odd"]),
    ("genbank: other record", genbank("join(9..10,J1.1:1..2)"), CUT, 3, ["another record, J1.1"]),
    # variants
    ("vcf: REF differs", vcf("chr1 2 . C G . . .", "chr1 3 . T G . . ."), CHECK, 2,
     ["{input}: 1 of 2 REF alleles", "line 4: chr1:3 has REF T, where the sequences have G",
      "check_ref=warn"]),
    ("vcf: REF differs, noted", vcf("chr1 3 . T G . . ."), [*CHECK, "check_ref=warn"], 0,
     ["0 of 1 REF alleles match"]),
    ("vcf: symbolic", vcf("chr1 2 . C <DEL>,*,G . . ."), CHECK, 3,
     ["{input}: line 3", "symbolic allele (<DEL>)", "(*)"]),
    ("vcf: POS", vcf("chr1 two . C G . . ."), CHECK, 2, ["line 3", "POS is 'two'"]),
    ("vcf: gap for ALT", vcf("chr1 2 . C - . . ."), CHECK, 2, ["line 3", "ALT is '-'"]),
    ("vcf: no header", beside("chr1\t2\t.\tC\tG\n", "bad.vcf"), CHECK, 2, ["##fileformat=VCFv4"]),
    ("vcf: past the end", vcf("chr1 2 . C G . . .", "chr1 25 . C G . . ."), CHECK, 3,
     ["line 4", "reaches beyond 'chr1', which has 20 bases"]),
    ("vcf: no variants", vcf(), CHECK, 2, ["{input} has no variants"]),
    ("vcf: policy of no meaning", vcf("chr1 2 . C G . . ."), [*CHECK, "check_ref=skip"], 2,
     ["error, warn, use_vcf"]),
    ("intervals and variants at once", bed("chr1\t0\t5\n"), [*CUT, "variants={input}"], 2,
     ["give one of them"]),
    # models and outputs
    ("another tokenizer", model(), [*PREDICT, "tokenizer=kmer"], 2,
     ["{input} was trained with tokenizer=base", "leave tokenizer= out"]),
    ("a tokenizer of another digest", model(another_digest), PREDICT, 2, ["{input}", "00000000"]),
    ("another alphabet", model(another_alphabet), PREDICT, 2, ["'ACGT'", "train again"]),
    ("a network of another vocabulary", model(words_of_three), PREDICT, 2, ["{input}", "80"]),
    ("an output there is not", model(), [*PREDICT, "outputs=[bam]"], 2, ["parquet", "got bam"]),
    ("variants of the other verb", model(), [*PREDICT, "variants={input}"], 2, ["variants"]),
    ("width without intervals", model(), [*PREDICT, "width=5"], 2, ["width= goes with intervals="]),
    # real files
    ("real: pyfaidx's malformed BED", "pyfaidx_malformed.bed",
     ["export", "sequences={data}/human_MT.fa", "intervals={input}"], 2, ["line 1: 2 columns"]),
    ("real: alleles swapped", "baskerville_eqtl_flip.vcf",
     ["export", "sequences={data}/human_hg38_1m.fa.gz", "variants={input}"], 2,
     ["8 of 8 REF alleles", "in 8 of them ALT stands there", "line 2: chr1:14677"]),
    ("real: symbolic alleles", "human_chr20_1mb1kgp.vcf.gz",
     ["export", "sequences={data}/human_chr20_1mb1kgp.fa.gz", "variants={input}"], 3,
     ["28,998 of 28,998 REF alleles match", "line 597", "<CN0>"]),
    ("real: variants on another chromosome", "nucleus_test_nist.b37_chr20_100kbp_at_10mb.vcf.gz",
     ["export", "sequences={data}/human_hg38_1m.fa.gz", "variants={input}"], 2,
     ["none of its contigs (chr20)", "chr1"]),
    ("real: protein features", "biopython_blank_seq.gb",
     ["export", "sequences={data}/human_MT.fa", "intervals={input}"], 2,
     ["'NP_001832.1' is protein"]),
    ("real: GenBank without end", "biopython_no_end_marker.gb",
     ["export", "sequences={data}/human_MT.fa", "intervals={input}"], 2,
     ["{input}", "end marker //"]),
    ("real: one-of locations", "biopython_one_of.gb",
     ["export", "sequences={input}", "intervals={input}", "feature=exon"], 2,
     ["{input}", "one-of(1887,1900) is not exact"]),
    ("real: a transcript on another genome", "bcftools_csq_ENST00000520795.gff",
     ["export", "sequences={data}/human_MT.fa", "intervals={input}", "feature=CDS"], 2,
     ["none of its contigs (8)"]),
    ("real: GFF of a lengthened circle", "phix174_NC_001422.gff",
     ["export", "sequences={data}/phix174_NC_001422.fna", "intervals={input}"], 3,
     ["count starts from 0", "{input}: line 9", "reaches beyond 'NC_001422.1'", "5,386 bases"]),
    ("real: GFF of many types", "yeast_GCA_000146045.2.gff.gz",
     ["export", "sequences={data}/human_MT.fa", "intervals={input}"], 2,
     ["22 types", "CDS (6,316)", "feature=TYPE"]),
    ("real: regions on another chromosome", "nucleus_test_nist.b37_chr20_100kbp_at_10mb.bed",
     ["export", "sequences={data}/human_hg38_1m.fa.gz", "intervals={input}"], 2,
     ["none of its contigs (chr20)", "chr1"]),
    ("real: sequences for intervals", "lambda_virus.fa",
     ["export", "sequences={input}", "intervals={input}"], 2, ["{input} is no", "sequences=FILE"]),
    ("real: variants for intervals", "baskerville_eqtl.vcf",
     ["export", "sequences={data}/human_MT.fa", "intervals={input}"], 2, ["variants=FILE"]),
    ("real: 2bit for intervals", "jbrowse_T_ko.2bit",
     ["export", "sequences={data}/human_MT.fa", "intervals={input}"], 2, ["{input} holds binary"]),
    ("real: a list of genes for intervals", "ecoli_quast_genes.txt.gz",
     ["export", "sequences={data}/human_MT.fa", "intervals={input}"], 2,
     ["{input}: line 986", "lies behind the end"]),
]  # fmt: skip
