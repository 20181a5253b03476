"""Rows of test_bad_input.py about files, records, characters, tables and settings of reading."""

import bz2
import gzip
import lzma
import os
import random
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import openpyxl
from Bio import bgzf

from pipelines.genomics.ingest import ingest

ROOT = Path(__file__).resolve().parents[2]
Row = tuple[str, Callable[[Path], Path] | str, list[str], int, list[str]]


def text(content: str | bytes, name: str = "bad.fa") -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


def table(*lines: str, name: str = "bad.csv") -> Callable[[Path], Path]:
    return text("\n".join(lines) + "\n", name)


def folder(**files: str) -> Callable[[Path], Path]:
    """A folder of files; `__` in a name is a step down, `_csv` at its end an ending."""

    def make(place: Path) -> Path:
        for name, content in files.items():
            path = place / "data" / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return place / "data"

    return make


def nothing(place: Path) -> Path:
    return place / "absent.fa"


def workbook(place: Path) -> Path:
    book = openpyxl.Workbook()
    for row in (["sequence", "label"], ["ACGT", 1], ["AC!T", 0]):
        book.active.append(row)
    book.save(place / "table.xlsx")
    return place / "table.xlsx"


def zipped(place: Path) -> Path:
    with zipfile.ZipFile(place / "genome.fa.zip", "w") as archive:
        archive.writestr("genome.fa", ">a\nACGT\n")
    return place / "genome.fa.zip"


def tarred(place: Path) -> Path:
    (place / "a.fa").write_text(">a\nACGT\n")
    with tarfile.open(place / "genome.tar.gz", "w:gz") as archive:
        archive.add(place / "a.fa", "a.fa")
    return place / "genome.tar.gz"


LETTERS = "".join(random.Random(0).choices("ACGT", k=300_000))


def cut_gzip(place: Path) -> Path:
    packed = gzip.compress(f">a\nACGT\n>b\n{LETTERS}\n".encode())
    return text(packed[: len(packed) // 2], "cut.fa.gz")(place)


def cut_bgzf(place: Path) -> Path:
    """Cut between two blocks: what is left unpacks without an error."""
    path = place / "cut.fa.bgz"
    with bgzf.open(str(path), "wb") as file:
        file.write(f">a\n{LETTERS}\n".encode())
    with path.open("rb") as file:
        starts = [start for start, *_ in bgzf.BgzfBlocks(file)]
    path.write_bytes(path.read_bytes()[: starts[3]])
    return path


def flipped_gzip(place: Path) -> Path:
    packed = bytearray(gzip.compress(f">a\n{LETTERS}\n".encode()))
    packed[-6] ^= 1
    return text(bytes(packed), "damaged.fa.gz")(place)


def cut_real(name: str, share: float) -> Callable[[Path], Path]:
    """A real file, cut short; `{data}` among the arguments finds it."""

    def make(place: Path) -> Path:
        content = (REAL / name).read_bytes()
        return text(content[: int(len(content) * share)], f"cut_{name}")(place)

    return make


def a_store(place: Path) -> Path:
    ingest(text(">a\nACGT\n", "a.fa")(place), place / "made")
    return place / "made"


def old_store(place: Path) -> Path:
    import zarr

    zarr.create_group(place / "old").attrs["schema"] = "gigasparse-sequences/1"
    return place / "old"


REAL = Path(os.environ.get("GIGASPARSE_REAL_DATA", ROOT.parent / "shared" / "data")) / "genomes"

INGEST = ["ingest", "sequences={input}"]
SKIP = [*INGEST, "reading.bad_records=skip"]
LENIENT = [*INGEST, "reading=lenient"]
GENBANK = "LOCUS       X1 8 bp DNA linear\nDEFINITION  d.\nACCESSION   X1\nVERSION     X1.1\n"
FEATURES = "FEATURES             Location/Qualifiers\n     source          1..8\n"

ROWS_B: list[Row] = [
    # files
    ("missing file", nothing, INGEST, 2, ["absent.fa", "no such file"]),
    ("empty file", text(""), INGEST, 2, ["{input}", "is empty", "FASTA"]),
    ("empty gzip", text(gzip.compress(b"", mtime=0)), INGEST, 2, ["empty once unpacked"]),
    ("only blank lines", text("\n  \n"), INGEST, 2, ["{input}", "no records"]),
    ("gzip cut short", cut_gzip, INGEST, 2, ["cut.fa.gz", "cut short after record 1 ('a')"]),
    ("BGZF cut between blocks", cut_bgzf, INGEST, 2, ["cut.fa.bgz", "end marker", "again"]),
    ("gzip with a wrong checksum", flipped_gzip, INGEST, 2, ["damaged.fa.gz", "damaged gzip"]),
    ("gzip in gzip", text(gzip.compress(gzip.compress(b">a\nAC\n"))), INGEST, 2,
     ["unpack it once"]),
    ("zip", zipped, INGEST, 2, ["genome.fa.zip", "a zip archive; unpack it"]),
    ("tar", tarred, INGEST, 2, ["genome.tar.gz", "a tar archive; unpack it"]),
    ("xz", text(lzma.compress(b">a\nACGT\n")), INGEST, 2, ["{input}", "xz"]),
    ("bzip2", text(bz2.compress(b">a\nACGT\n")), INGEST, 2, ["{input}", "bzip2"]),
    ("zstd", text(b"\x28\xb5\x2f\xfd rest"), INGEST, 2, ["{input}", "zstd"]),
    ("BAM", text(gzip.compress(b"BAM\1" + bytes(40))), INGEST, 2, ["BAM", "samtools fasta"]),
    ("CRAM", text(b"CRAM\3\0"), INGEST, 2, ["CRAM", "samtools fasta"]),
    ("FASTQ", text("@read1\nACGT\n+\nIIII\n"), INGEST, 2, ["FASTQ", "seqtk seq -A"]),
    ("SAM", text("@HD\tVN:1.6\n@SQ\tSN:1\tLN:9\n"), INGEST, 2, ["SAM", "samtools fasta"]),
    ("VCF", text("##fileformat=VCFv4.2\n#CHROM\tPOS\n"), INGEST, 2, ["VCF", "sequences="]),
    ("BED", text("chr1\t10\t20\tpeak\n"), INGEST, 2, ["BED", "sequences="]),
    ("GTF without a header", text('1\tx\tgene\t5\t9\t.\t+\t.\tgene_id "a"\n'), INGEST, 2, ["GTF"]),
    ("EMBL", text("ID   X56734; SV 1; linear; mRNA\n"), INGEST, 2, ["EMBL"]),
    ("a web page", text("<!DOCTYPE html><html>"), INGEST, 2, ["a web page", "download"]),
    ("UTF-16", text(">a\nACGT\n".encode("utf-16")), INGEST, 2, ["UTF-16", "save it as UTF-8"]),
    ("a Git LFS pointer", text("version https://git-lfs.github.com/spec/v1\n"), INGEST, 2, ["lfs"]),
    ("letters without a header", text("ACGTACGT\nACGT\n"), INGEST, 2, ["'>name'"]),
    ("prose", text("Dear all\nthe genome\n"), INGEST, 2, ["line 1", "'Dear all'"]),
    ("other binary", text(bytes(range(1, 200)) + bytes(90)), INGEST, 2, ["binary"]),
    ("half a 2bit", text(b"\x43\x27\x41\x1a" + bytes(3)), INGEST, 2, ["{input}", "no records"]),
    ("a packed 2bit", text(gzip.compress(b"\x43\x27\x41\x1a" + bytes(40))), INGEST, 2, ["2bit"]),
    ("a store as sequences", a_store, INGEST, 2, ["made is a store", "store="]),
    ("sequences as a store", text(">a\nACGT\n"), ["ingest", "sequences={input}", "store={input}"],
     2, ["is no sequence store; remove it or name another"]),
    ("no store here", nothing, ["export", "store={input}"], 2, ["is no sequence store", "ingest"]),
    ("a store of another version", old_store, ["export", "store={input}"], 2,
     ["gigasparse-sequences/1", "ingest it again"]),
    # records
    ("a header only", text(">one\n"), INGEST, 2, ["record 1 ('one')", "no sequence"]),
    ("an empty record among others", text(">a\nAC\n>b\n>c\nAC\n"), INGEST, 2, ["record 2 ('b')"]),
    ("no id", text(">a\nAC\n>\nAC\n"), INGEST, 2, ["record 2 has no id"]),
    ("an id twice", text(">a\nAC\n>b\nAC\n>a x\nGG\n"), INGEST, 2,
     ["records 1 and 3 have the same id 'a'", "duplicate_ids"]),
    ("text before the first record", text("hello\n>a\nACGT\n"), INGEST, 2, ["line 1", "'hello'"]),
    ("a comment before it", text("; v1\n>a\nACGT\n"), INGEST, 2, ["line 1", "'; v1'"]),
    ("a lost line break", text(">a\nACGT>b\nACGT\n"), INGEST, 2,
     ["'>' at position 5", "line break"]),
    ("a lost line break, lenient", text(">a\nACGT>b\nACGT\n>c\nAC\n"), LENIENT, 3,
     ["'>' at position"]),
    ("too short", text(">a\nACGT\n>b\nAC\n"), [*INGEST, "reading.min_length=3"], 2,
     ["record 2 ('b')", "2 bases, fewer than reading.min_length=3"]),
    ("a title that is no UTF-8", text(b">a\nAC\n>\xff\nAC\n"), INGEST, 2, ["no UTF-8", "record 1"]),
    ("bad records, left out", text(">a\nACGT\n>b\n>c\nA!\n>d\nGG\n"), SKIP, 3,
     ["b,", "no sequence", "c,", "'!' at position 2", "2 records could not be read"]),
    ("nothing but bad records", text(">b\n>c\nA!\n"), SKIP, 2, ["none of 2 records", "'b'"]),
    # characters
    ("a digit", text(">a\nAC\n>b\nACG\nT1C\n"), INGEST, 2, ["record 2 ('b')", "'1' at position 5"]),
    ("a gap", text(">a\nAC-GT\n"), INGEST, 2, ["'-' at position 3", "reading.gaps=strip"]),
    ("a stop", text(">a\nACG*\n"), INGEST, 2, ["'*' at position 4", "reading.gaps=strip"]),
    ("protein", text(">p1\nMKVLAAGIFPEQLLNERW\n"), INGEST, 2, ["record 1 ('p1')", "protein"]),
    ("protein, lenient", text(">a\nACGT\n>p1\nMKVLAAGIFPEQLLNERW\n"), LENIENT, 3,
     ["p1", "protein"]),
    ("X", text(">a\nACXT\n"), INGEST, 2, ["'X' at position 3", "reading.others=n"]),
    ("an accent", text(">a\nACéT\n"), INGEST, 2, ["'é' at position 3", "ASCII"]),
    ("RNA where it is refused", text(">a\nACGU\n"), [*INGEST, "reading.uracil=error"], 2,
     ["'U' at position 4", "reading.uracil=t"]),
    ("RNA", text(">a\nACGU\n"), INGEST, 0, ["1 U were read as T"]),
    ("T and U", text(">a\nACGUT\n"), INGEST, 0, ["1 records hold T as well as U"]),
    ("gaps left out", text(">a\nAC--G.T*\n"), LENIENT, 0, ["4 gaps were left out", "4 bases"]),
    ("digits left out", text(">a\n1 ACGT 5\n"), LENIENT, 0, ["2 digits were left out"]),
    ("signs as N", text(">a\nACXX!T\n"), LENIENT, 0, ["3 unknown signs were read as N", "3 N"]),
    ("ambiguity codes as N", text(">a\nACRYT\n"), [*INGEST, "reading.iupac=n"], 0,
     ["2 ambiguity codes were read as N"]),
    ("only the first of an id", text(">a\nAC\n>a\nGGT\n"),
     [*INGEST, "reading.duplicate_ids=first"], 0,
     ["1 ids stood twice", "1 records, 2 bases"]),
    # GenBank
    ("GenBank without sequence", text(f"{GENBANK}{FEATURES}CONTIG      Y:1..8\n//\n"), INGEST, 2,
     ["record 1 ('X1.1')", "no sequence (no ORIGIN)"]),
    ("GenBank without anything", text(f"{GENBANK}//\n"), INGEST, 2,
     ["record 1 cannot be read as GenBank"]),
    ("GenBank without its end", text(f"{GENBANK}ORIGIN\n        1 acgtacgt\n", "x.gb"), INGEST, 2,
     ["x.gb", "'//'", "cut short"]),
    ("GenBank of another length", text(f"{GENBANK}ORIGIN\n        1 acgtac\n//\n"), INGEST, 2,
     ["record 1 ('X1.1')", "another length than its LOCUS line says"]),
    # tables and folders
    ("a table without sequences", table("id,label", "a,1"), INGEST, 2,
     ["no column 'sequence'", "'id', 'label'", "columns.sequence=NAME"]),
    ("a ragged table", table("sequence,label", "ACGT,1", "ACGT,1,2"), INGEST, 2,
     ["row 3", "3 fields", "header has 2"]),
    ("a bad letter in a table", table("sequence\tlabel", "ACGT\t1", "AC!T\t0"), INGEST, 2,
     ["bad.csv: row 3 ('row3')", "'!' at position 3"]),
    ("an empty cell", table("sequence,label", ",1"), INGEST, 2, ["row 2", "has no sequence"]),
    ("a bad letter in a workbook", workbook, INGEST, 2, ["table.xlsx: row 3", "'!' at position 3"]),
    ("a split of another name", table("sequence,split", "ACGT,holdout"), INGEST, 2,
     ["row 2", "'holdout'", "train, test, val"]),
    ("a column that is not there", table("sequence,label", "ACGT,1"),
     [*INGEST, "columns.label=y"], 2,
     ["no column 'y'"]),
    ("rows that are not there", table("sequence,task", "ACGT,a"), [*INGEST, "where.task=b"], 2,
     ["no records that where.task=b keeps"]),
    ("where= without a table", text(">a\nACGT\n"), [*INGEST, "where.task=b"], 2,
     ["rows of a table"]),
    ("conflicting labels", table("sequence,label", "ACGT,1", "acgt,0"), INGEST, 0,
     ["1 of them with different labels"]),
    ("a folder of other things", folder(readme_txt="hello"), INGEST, 2, ["readme.txt", "train"]),
    ("an empty folder", lambda place: place, INGEST, 2, ["holds nothing"]),
    ("a split twice", folder(dev_csv="sequence\nA", val_csv="sequence\nA"), INGEST, 2,
     ["the split val twice", "dev.csv and val.csv"]),
    ("a bad split of a folder", folder(train_csv="sequence,label\nAC,1", test_csv="x,label\nAC,1"),
     INGEST, 2, ["test.csv", "no column 'sequence'"]),
    ("a bad text of a folder", folder(train__a__1_txt="AC", train__b__1_txt="A!"), INGEST, 2,
     ["train/b/1", "'!' at position 2"]),
    # settings
    ("a reading of another name", text(">a\nAC\n"), [*INGEST, "reading.gaps=keep"], 2,
     ["reading.gaps must be error or strip", "'keep'"]),
    ("a pattern without a group", text(">a\nAC\n"), [*INGEST, r"reading.label_pattern='\w+'"], 2,
     ["label_pattern", "group"]),
    ("a study of stores", text(">a\nAC\n"), [*INGEST, "-m", "num_workers=1,2"], 2, ["no out="]),
    ("no sequences", nothing, ["ingest"], 2, ["sequences= is missing"]),
    ("labels that did not come", text(">a\nACGT\n"), ["train", "sequences={input}"], 2,
     ["holds no labels", "labels=TABLE"]),
    # real files
    ("signs in contigs", "messy_quast_incorrect_chars_in_sequence.fasta", INGEST, 2,
     ["record 1 ('contig1')", "'f' at position 74"]),
    ("signs in contigs, lenient", "messy_quast_incorrect_chars_in_sequence.fasta", LENIENT, 0,
     ["3 records", "unknown signs were read as N", "digits were left out"]),
    ("a contig of N", "messy_quast_only_Ns_in_sequence.fasta", INGEST, 0, ["616 bases, 616 N"]),
    ("a protein's GenBank", "biopython_blank_seq.gb", INGEST, 2, ["NP_001832.1", "is a protein"]),
    ("a GenBank file without its end", "biopython_no_end_marker.gb", INGEST, 2,
     ["AB070938.1", "'//'"]),
    ("the index for the genome", "human_hg38_1m.fa.gz.fai", INGEST, 2, ["an index (.fai)"]),
    ("the block index for the genome", "human_hg38_1m.fa.gz.gzi", INGEST, 2, ["binary"]),
    ("variants for sequences", "human_chr20_1mb1kgp.vcf.gz", INGEST, 2, ["VCF", "sequences="]),
    ("features for sequences", "yeast_GCA_000146045.2.gff.gz", INGEST, 2, ["GFF", "sequences="]),
    ("intervals for sequences", "nucleus_test_nist.b37_chr20_100kbp_at_10mb.bed", INGEST, 2,
     ["BED"]),
    ("labels for sequences", "mldsp_labels.tsv.gz", INGEST, 2,
     ["no column 'sequence'", "'task', 'class', 'record_id'", "labels="]),
    ("a table without a header", "uci_splice.data", INGEST, 2, ["columns.sequence=3", "no header"]),
    ("its readme", "uci_splice_readme.txt", INGEST, 2, ["no format known here"]),
    ("an E. coli cut short", cut_real("ecoli_quast_reference.fa.gz", 0.5), [*INGEST, "{data}"], 2,
     ["cut_ecoli_quast_reference.fa.gz", "cut short"]),
    ("a 2bit cut short", cut_real("jbrowse_T_ko.2bit", 0.5), [*INGEST, "{data}"], 2,
     ["cut_jbrowse_T_ko.2bit", "2bit"]),
]  # fmt: skip
