"""GenBank records without their features (those are `intervals.py`'s): id, definition, letters."""

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from Bio import BiopythonParserWarning
from Bio.GenBank.Scanner import GenBankScanner
from Bio.Seq import UndefinedSequenceError
from Bio.SeqRecord import SeqRecord

from pipelines.genomics.opening import as_text
from pipelines.shared.errors import InputError


@dataclass(frozen=True, slots=True)
class GenBankRecord:
    """One record; `problem` says why its letters cannot be used."""

    title: str
    """Accession with version, then the definition."""
    letters: bytes
    """Upper case: in GenBank's text lower case says nothing."""
    circular: bool
    problem: str | None


def split_genbank(stream: io.BufferedReader, name: str) -> Iterator[GenBankRecord]:
    """Yield the records of a GenBank file.

    Raises InputError, naming the file, where the text ends within a record or cannot be parsed.
    """
    with as_text(stream) as text:
        records = GenBankScanner(debug=0).parse_records(text, do_features=False)
        for number in count(1):
            found = _next(records, name, number)
            if found is None:
                return
            yield found


def _next(records: Iterator[SeqRecord], name: str, number: int) -> GenBankRecord | None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", BiopythonParserWarning)
        try:
            record = next(records, None)
        except (ValueError, AssertionError, IndexError) as error:
            raise InputError(
                f"{name}: record {number:,} cannot be read as GenBank ({error}); download it again"
            ) from error
    if record is None:
        return None
    said = [str(warning.message) for warning in caught]
    if any("Premature end" in text for text in said):
        raise InputError(
            f"{name}: record {number:,} ({record.id!r}) ends without its '//': the file is cut "
            "short; download it again, or add the line if it is whole"
        )
    problem = next((text for text in said if text.startswith("Expected sequence length")), None)
    return _convert(record, problem and f"has another length than its LOCUS line says ({problem})")


def _convert(record: SeqRecord, problem: str | None) -> GenBankRecord:
    try:
        letters = bytes(record.seq)
    except UndefinedSequenceError:
        letters = b""
        problem = "has no sequence (no ORIGIN); download the full record, not its annotation alone"
    if record.annotations.get("molecule_type") == "protein":
        problem = "is a protein, not DNA; give nucleotide records"
    return GenBankRecord(
        title=f"{record.id} {record.description}",
        letters=letters,
        circular=record.annotations.get("topology") == "circular",
        problem=problem,
    )
