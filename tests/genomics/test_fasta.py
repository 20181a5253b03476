import io

import pytest
from Bio.SeqIO.FastaIO import SimpleFastaParser
from hypothesis import given
from hypothesis import strategies as st

from pipelines.genomics import fasta
from pipelines.genomics.fasta import split_records

title = st.text("ab >ü|", max_size=8).map(str.strip)
sequence = st.lists(st.text("ACGT>", max_size=5).map(lambda line: line.lstrip(">")), max_size=4)


def split(text, block_bytes):
    before = fasta._BLOCK_BYTES
    fasta._BLOCK_BYTES = block_bytes
    try:
        stream = io.BufferedReader(io.BytesIO(text), buffer_size=block_bytes)
        return [
            (title, bytes(letters).replace(b"\n", b"").replace(b"\r", b"").decode())
            for title, letters in split_records(stream)
        ]
    finally:
        fasta._BLOCK_BYTES = before


@given(st.lists(st.tuples(title, sequence), max_size=5), st.integers(4, 40))
def test_records_are_those_of_biopython_wherever_blocks_end(records, block_bytes):
    text = "".join(f">{name}\n" + "".join(f"{line}\n" for line in lines) for name, lines in records)
    expected = [(name.strip(), letters) for name, letters in SimpleFastaParser(io.StringIO(text))]
    assert split(text.encode(), block_bytes) == expected


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block_bytes", [16, 21, 64])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends_marks_and_blank_lines(end, block_bytes, start, last):
    lines = [">one first", "ACGT", "AC", "", ">two > x", "GG"]
    text = start.replace("\n", end) + end.join(lines) + end * last
    expected = [("one first", "ACGTAC"), ("two > x", "GG")]
    assert split(text.encode(), block_bytes) == expected
