"""Which format a file has, told by what it holds and never by its name; others refused by name."""

import io
import zipfile
from typing import BinaryIO, Literal

from pipelines.genomics.alphabet import LETTERS
from pipelines.genomics.opening import Source
from pipelines.shared.errors import InputError

Format = Literal["fasta", "genbank", "2bit", "table", "workbook", "parquet"]
TABLES: tuple[Format, ...] = ("table", "workbook", "parquet")
DELIMITERS = "\t,;"

WANTED = "FASTA, GenBank, 2bit, a table with a sequence column, or a folder of them by split"

_NUCLEOTIDES = f"{LETTERS}U".encode()
_UTF8_BOM = b"\xef\xbb\xbf"
_CONVERT = "convert it to FASTA"
_UNPACK = "unpack it or compress with gzip"
_REFERENCE = "it places things on sequences: give those as sequences="

_BINARY = {
    b"BZh": f"bzip2; {_UNPACK}",
    b"\xfd7zXZ": f"xz; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"zstd; {_UNPACK}",
    b"7z\xbc\xaf\x27\x1c": f"7-zip; {_UNPACK}",
    b"Rar!": f"a RAR archive; {_UNPACK}",
    b"\x1f\x8b": "gzip inside gzip; unpack it once",
    b"\x1f\x9d": f"compress (.Z); {_UNPACK}",
    b"BAM\1": f"BAM; {_CONVERT} with samtools fasta",
    b"CRAM": f"CRAM; {_CONVERT} with samtools fasta",
    b"BCF": f"BCF; {_REFERENCE}",
    b"\x26\xfc\x8f\x88": f"bigWig; {_REFERENCE}",
    b"\xeb\xf2\x89\x87": f"bigBed; {_REFERENCE}",
    b"\x89HDF": "HDF5; export its sequences as FASTA or CSV",
    b"\x93NUMPY": "a NumPy array; export its sequences as FASTA or CSV",
    b"SQLite format 3": "an SQLite database; export its sequences as FASTA or CSV",
    b"%PDF": "a PDF; save its sequences as text",
    b"\xd0\xcf\x11\xe0": "an old Office file; save it as .xlsx or CSV",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
    b"ABIF": f"a chromatogram (ABI); {_CONVERT}",
}

_TEXT = {
    b"@HD\t": f"SAM; {_CONVERT} with samtools fasta",
    b"@SQ\t": f"SAM; {_CONVERT} with samtools fasta",
    b"@": f"FASTQ; {_CONVERT} with seqtk seq -A",
    b"ID   ": f"EMBL or Swiss-Prot; {_CONVERT} or GenBank",
    b"##gff": f"GFF; {_REFERENCE}",
    b"##gtf": f"GTF; {_REFERENCE}",
    b"##fileformat=VCF": f"VCF; {_REFERENCE}",
    b"##maf": f"a multiple alignment (MAF); {_CONVERT}",
    b"track": f"a browser track; {_REFERENCE}",
    b"browser": f"a browser track; {_REFERENCE}",
    b"fixedStep": f"wiggle; {_REFERENCE}",
    b"variableStep": f"wiggle; {_REFERENCE}",
    b"CLUSTAL": f"a Clustal alignment; {_CONVERT} without gaps",
    b"# STOCKHOLM": f"a Stockholm alignment; {_CONVERT} without gaps",
    b"#NEXUS": f"a Nexus alignment; {_CONVERT} without gaps",
    b"{\\rtf": "a word processor's file; save it as plain text",
    b"<": "a web page or XML; download the file itself",
    b"{": "JSON; save its sequences as FASTA or CSV",
    b"[": "JSON; save its sequences as FASTA or CSV",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with git lfs pull",
}


def tell_format(source: Source) -> Format:
    """Name the format of an opened file by its first unpacked bytes.

    Raises InputError, naming what it is and what to do, for anything else than sequences.
    """
    start = source.start
    if start.startswith((b"\x1a\x41\x27\x43", b"\x43\x27\x41\x1a")):
        return "2bit"
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"PK\x03\x04"):
        return _zipped(source)
    if start[257:262] == b"ustar":
        raise _other(source, "a tar archive; unpack it")
    _refuse_known(source, start, _BINARY)
    if b"\0" in start:
        raise InputError(f"{source.name} holds binary data, not text; give {WANTED}")
    return _tell_text(source, start.removeprefix(_UTF8_BOM))


def delimiter_of(line: str) -> str:
    """The sign that parts the fields of a table's first line: the most frequent of three."""
    return max(DELIMITERS, key=line.count)


def _zipped(source: Source) -> Format:
    if source.size is not None and source.compression == "none":
        try:
            with zipfile.ZipFile(source.name) as archive:
                if "xl/workbook.xml" in archive.namelist():
                    return "workbook"
        except zipfile.BadZipFile as error:
            raise _other(source, f"a damaged zip archive or workbook ({error})") from error
    raise _other(source, "a zip archive; unpack it")


def _tell_text(source: Source, start: bytes) -> Format:
    lines = start.splitlines()
    number, line = next(((n, t) for n, t in enumerate(lines, 1) if t.strip()), (0, b""))
    if not number:
        raise InputError(f"{source.name}: no records, only blank lines; give {WANTED}")
    if line.startswith(b">"):
        return "fasta"
    if line.startswith(b"LOCUS ") or b"Genetic Sequence Data Bank" in line:
        return "genbank"
    _refuse_known(source, line.lstrip(), _TEXT)
    if any(later.startswith(b">") for later in lines[number:]):
        raise InputError(
            f"{source.name}: line {number} has text before the first record: {_shown(line)}; a "
            "FASTA record begins with '>'; remove what stands before it"
        )
    _refuse_coordinates(source, line)
    if any(sign.encode() in line for sign in DELIMITERS):
        return "table"
    if not line.strip().upper().translate(None, b"ACGTUN"):
        raise _other(source, "letters without a header; write a line '>name' above each sequence")
    if _is_column(lines[number - 1 :]):
        return "table"
    raise InputError(
        f"{source.name}: line {number} is of no format known here: {_shown(line)}; give {WANTED}"
    )


def _is_column(lines: list[bytes]) -> bool:
    """Tell a table of one column: one word, and letters below it."""
    words = [line.split() for line in lines[:3] if line.strip()]
    return (
        len(words) > 1
        and all(len(line) == 1 for line in words)
        and not words[1][0].upper().translate(None, _NUCLEOTIDES)
    )


def _refuse_coordinates(source: Source, line: bytes) -> None:
    """Tell tables of positions from tables of sequences: they have no header to name columns."""
    fields = line.split(b"\t")
    numbers = {number for number, field in enumerate(fields) if field.strip().isdigit()}
    if len(fields) == 9 and {3, 4} <= numbers:
        raise _other(source, f"GFF or GTF; {_REFERENCE}")
    if len(fields) == 5 and {1, 2, 3, 4} <= numbers:
        raise _other(source, "an index (.fai); give the file that it belongs to")
    if len(fields) >= 3 and {1, 2} <= numbers:
        raise _other(source, f"BED; {_REFERENCE}")


def _refuse_known(source: Source, start: bytes, kinds: dict[bytes, str]) -> None:
    for magic, kind in kinds.items():
        if start.startswith(magic):
            raise _other(source, kind)


def _other(source: Source, kind: str) -> InputError:
    return InputError(f"{source.name} is no file of sequences but {kind}")


def _shown(line: bytes) -> str:
    return repr(line[:40].decode("utf-8", errors="replace"))


def seekable(source: Source) -> BinaryIO:
    """The file itself, or its unpacked content in memory: for readers that jump about in it."""
    if source.compression == "none" and source.size is not None:
        return source.stream
    return io.BytesIO(source.stream.read())
