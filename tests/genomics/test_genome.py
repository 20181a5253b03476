import gzip
import re

import pytest
from Bio import bgzf

from pipelines.genomics.alphabet import decode
from pipelines.genomics.genome import read_records
from pipelines.shared.errors import InputError

FASTA = b">one first record\nACGTNacgt\nRYSWK\n>two\nUuTT\n"
RECORDS = [("one", "first record", "ACGTNACGTRYSWK", 1, 4, 0), ("two", "", "TTTT", 2, 1, 2)]
BGZF_END = 28


def read(path):
    return [
        (r.id, r.description, decode(r.tokens), r.number, r.lower, r.uracil)
        for r in read_records(path)
    ]


def write(tmp_path, content, name="x.fa"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


def write_bgzf(path, content=FASTA):
    with bgzf.BgzfWriter(str(path), "wb") as handle:
        handle.write(content)
        handle.flush()
    return path


def refusal(path):
    with pytest.raises(InputError) as caught:
        list(read_records(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        FASTA,
        FASTA.replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + FASTA,
        b"\n\n" + FASTA + b"\n\n",
        FASTA.rstrip(b"\n"),
        FASTA.replace(b"RYSWK\n", b"\nRYS WK\n\n"),
        FASTA.replace(b"\n", b"\r"),
    ],
    ids=["plain", "crlf", "bom", "blank lines", "no last newline", "gaps", "cr"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_records_are_read(tmp_path, content, packed):
    content = gzip.compress(content) if packed else content
    assert read(write(tmp_path, content)) == RECORDS


@pytest.mark.parametrize("name", ["x.fa.bgz", "x.fa.gz", "x.fa"])
def test_block_gzip_is_read_under_any_name(tmp_path, name):
    assert read(write_bgzf(tmp_path / name)) == RECORDS


def test_plain_text_named_gz_is_read(tmp_path):
    assert read(write(tmp_path, FASTA, "x.fa.gz")) == RECORDS


def test_ids_may_hold_any_utf8(tmp_path):
    path = write(tmp_path, ">größe|1 ü\nACGT\n".encode())
    assert [(r.id, r.description) for r in read_records(path)] == [("größe|1", "ü")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (gzip.compress(b"", mtime=0), "empty once unpacked"),
        (b"\n \n", "no records"),
        (b"; comment\n" + FASTA, "line 1 has text before the first record: '; comment'"),
        (b"\n\nACGT\n" + FASTA, "line 3 has text before"),
        (b">\nACGT\n", "record 1 has no id"),
        (b">a\nAC\n>  \nACGT\n", "record 2 has no id"),
        (b">one\n", "record 1 ('one') has a header but no sequence"),
        (b">a\nAC\n>b\n>c\nAC\n", "record 2 ('b') has a header but no sequence"),
        (b">a\nAC\n>b\nAC\n>a x\nAC\n", "records 1 and 3 have the same id 'a'"),
        (b">a\nAC\n>b\nACG\nT1C\n", "record 2 ('b'): '1' at position 5"),
        (b">a\nAC-GT\n", "'-' at position 3 is no DNA letter; remove gaps"),
        (b">a\nAC>b\nGT\n", "'>' at position 3 is no DNA letter; put a line break"),
        (">a\nACéGT\n".encode(), "'é' at position 3"),
        (b">p1\nMKVLAAGIFPEQLLNERW\n>p2\nMKV\n", "record 1 ('p1') looks like protein"),
        (b">a\nAC\xff\xfeGT\n", "at position 3 is no DNA letter; remove it: only ASCII"),
        (b">a\xff\nACGT\n", "no UTF-8 text before the first record"),
        (b"\x00\x01\x02" * 50, "binary data"),
        (b"PK\x03\x04rest", "zip"),
        (b"BZh91AY", "bzip2"),
        (b"@read1\nACGT\n+\nIIII\n", "FASTQ"),
        (b"LOCUS       SCU49845", "record 1 cannot be read as GenBank"),
    ],
)
def test_unusable_text_is_refused(tmp_path, content, message):
    assert message in refusal(write(tmp_path, content))


def test_missing_file_and_folder_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.fa")
    assert "holds nothing" in refusal(tmp_path)


def test_records_before_a_fault_are_yielded_one_by_one(tmp_path):
    records = read_records(write(tmp_path, b">a\nAC\n>b\nA!\n"))
    assert next(records).id == "a"
    with pytest.raises(InputError, match="record 2"):
        next(records)


LONG = b"".join(b">r%d\n%s\n" % (i, b"ACGTTGCANN" * 20) for i in range(2000))


@pytest.mark.parametrize("kept", [12, 600, -9, -1])
def test_gzip_cut_short_is_refused(tmp_path, kept):
    message = refusal(write(tmp_path, gzip.compress(LONG)[:kept], "x.fa.gz"))
    assert "cut short" in message
    assert "copy or compress it again" in message


def test_gzip_cut_short_says_how_far_reading_came(tmp_path):
    packed = gzip.compress(b"".join(LONG.replace(b"r", b"%dr" % i) for i in range(9)))
    message = refusal(write(tmp_path, packed[: -len(packed) // 4]))
    assert re.search(r"after record [\d,]+ \('\d+r\d+'\)", message)


def test_gzip_with_a_wrong_checksum_is_refused(tmp_path):
    packed = bytearray(gzip.compress(LONG))
    packed[-8] ^= 1
    assert "damaged gzip" in refusal(write(tmp_path, bytes(packed)))


def test_gzip_with_garbage_inside_is_refused(tmp_path):
    packed = bytearray(gzip.compress(LONG))
    packed[200:260] = bytes(range(60))
    assert "gzip data" in refusal(write(tmp_path, bytes(packed)))


def block_starts(path):
    with path.open("rb") as handle:
        return [block[0] for block in bgzf.BgzfBlocks(handle)]


@pytest.mark.parametrize("name", ["x.bgz", "x.fa.gz"])
def test_block_gzip_cut_at_a_block_boundary_is_refused(tmp_path, name):
    path = write_bgzf(tmp_path / name, LONG)
    start = block_starts(path)[2]
    path.write_bytes(path.read_bytes()[:start])
    assert gzip.decompress(path.read_bytes())  # without a look at the end marker it passes
    assert "block gzip without its end marker" in refusal(path)


def test_block_gzip_cut_elsewhere_is_refused(tmp_path):
    path = write_bgzf(tmp_path / "x.bgz", LONG)
    packed = path.read_bytes()
    for kept in (20, len(packed) // 2, len(packed) - BGZF_END, len(packed) - 1):
        path.write_bytes(packed[:kept])
        assert "cut short" in refusal(path)
