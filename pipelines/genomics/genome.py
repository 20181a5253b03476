"""Records of DNA from a file of any format, stdin, or a folder of them; one held at a time."""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

from Bio import SeqIO
from jaxtyping import Int64, UInt8
from numpy import ndarray

from pipelines.genomics.alphabet import encode
from pipelines.genomics.fasta import split_records
from pipelines.genomics.folders import Part, list_parts
from pipelines.genomics.formats import TABLES, WANTED, Format, tell_format
from pipelines.genomics.genbank import split_genbank
from pipelines.genomics.letters import LetterError, Letters, Reading, read_letters
from pipelines.genomics.opening import STDIN, Source, open_source, reading_errors
from pipelines.genomics.sequence_tables import Columns, read_rows
from pipelines.shared.errors import InputError

HEADER_LABEL = r"\|([^|\s]+)\s*$"
"""Where the label stands in FASTA headers of a folder by splits: after the last bar."""


class RecordError(InputError):
    """A record that cannot be read, while others of its file can."""

    def __init__(self, raw: "RawRecord", problem: str, remedy: str) -> None:
        super().__init__(f"{raw.where}{problem}; {remedy}")
        self.id, self.file = raw.id, raw.place.file
        self.problem, self.remedy = problem.removeprefix(":").strip(), remedy


class Place(NamedTuple):
    """Where a record stands: its file, and its number from 1 there."""

    file: str
    number: int
    unit: Literal["record", "row"] = "record"
    """Rows are those of a table, its header being row 1."""


@dataclass(slots=True)
class RawRecord:
    """One record as it stands in its file, its characters not looked at."""

    place: Place
    id: str
    description: str
    letters: bytes | memoryview
    circular: bool = False
    label: str | None = None
    group: str | None = None
    split: str | None = None
    problem: str | None = None
    """Why the letters cannot be used, where the format says so."""

    @property
    def where(self) -> str:
        """File, number and id, for messages."""
        name = f" ({self.id!r})" if self.id else ""
        return f"{self.place.file}: {self.place.unit} {self.place.number:,}{name}"


@dataclass
class Record:
    """One record of DNA; `number` counts from 1 in its file."""

    id: str
    description: str
    letters: Letters
    number: int
    circular: bool = False
    """Whether its end joins its beginning: only GenBank says so."""
    label: str | None = None
    group: str | None = None
    split: str | None = None
    place: Place | None = None
    """Where it stands, for messages."""

    @cached_property
    def tokens(self) -> UInt8[ndarray, "T"]:
        """The letters as tokens of `alphabet`."""
        return encode(self.letters.text.tobytes())

    @property
    def mask(self) -> Int64[ndarray, "R 2"]:
        """Runs of letters that stood in lower case, 0-based half-open."""
        return self.letters.mask

    @property
    def lower(self) -> int:
        """Letters that stood in lower case."""
        return self.letters.counts.get("lower", 0)

    @property
    def uracil(self) -> int:
        """U letters, read as T."""
        return self.letters.counts.get("uracil", 0)


def read_records(
    path: str | Path, *, reading: Reading | None = None, columns: Columns | None = None
) -> Generator[Record]:
    """Yield the records of a file, of stdin (`-`) or of a folder by splits.

    The format is told by what the file holds: FASTA, GenBank, 2bit, a table (CSV, TSV, workbook,
    Parquet) with a sequence column; plain, gzip or BGZF. Raises InputError, naming file, record or
    row, position and remedy, for a file that is missing, empty, cut short, damaged or of another
    format, and for a record that cannot be read; with `bad_records="skip"` such a record is left
    out.
    """
    reading = reading or Reading()
    names = Ids(reading)
    for raw in read_raw_records(path, columns=columns, label_pattern=reading.label_pattern):
        try:
            record = parse_record(raw, reading)
            if not names.admit(record):
                continue
        except RecordError:
            if reading.bad_records == "error":
                raise
            continue
        yield record


def read_raw_records(
    path: str | Path,
    *,
    columns: Columns | None = None,
    label_pattern: str | None = None,
    opened: Callable[[Source, Format], None] | None = None,
) -> Generator[RawRecord]:
    """Yield the records as they stand in the file or folder; `opened` is told of each file."""
    folder = Path(path)
    is_folder = str(path) != STDIN and folder.is_dir()
    parts = list_parts(folder) if is_folder else [Part(folder)]
    if is_folder and label_pattern is None:
        label_pattern = HEADER_LABEL
    opened = opened or (lambda source, kind: None)
    for part in parts:
        if part.id is not None:
            yield _read_text(part)
            continue
        with open_source(path if not is_folder else part.path, wanted=WANTED) as source:
            kind = tell_format(source)
            opened(source, kind)
            if columns and columns.where and kind not in TABLES:
                raise InputError(f"{source.name} is {kind}: where= chooses among rows of a table")
            found = _read_source(source, kind, columns or Columns(), label_pattern)
            with closing(_named_errors(found, source.name)) as records:
                for raw in records:
                    if part.split is not None:
                        raw.split = part.split
                        raw.id = f"{part.split}:{raw.id}" if raw.place.unit == "row" else raw.id
                    yield raw


def parse_record(raw: RawRecord, reading: Reading) -> Record:
    """Read a record's characters; raises RecordError where it cannot be used."""
    if not raw.id:
        raise RecordError(raw, " has no id", "write one, in FASTA after its '>'")
    if raw.problem is not None:
        problem, _, remedy = raw.problem.partition("; ")
        raise RecordError(raw, f" {problem}", remedy or "correct or remove it")
    try:
        letters = read_letters(raw.letters, reading)
    except LetterError as error:
        raise RecordError(raw, str(error), error.remedy) from None
    if letters.text.size == 0:
        raise RecordError(raw, *_NOTHING[raw.place.unit])
    if letters.text.size < reading.min_length:
        raise RecordError(
            raw,
            f" has {letters.text.size:,} bases, fewer than reading.min_length={reading.min_length}",
            "remove it, or leave such records out with reading.bad_records=skip",
        )
    return Record(
        raw.id,
        raw.description,
        letters,
        raw.place.number,
        raw.circular,
        raw.label,
        raw.group,
        raw.split,
        raw.place,
    )


_NOTHING = {
    "record": (" has a header but no sequence", "remove it or add its letters"),
    "row": (" has no sequence", "fill it in or drop the row"),
}


class Ids:
    """The ids that were seen, and what is done with one that stands twice."""

    def __init__(self, reading: Reading) -> None:
        self._policy = reading.duplicate_ids
        self._seen: dict[str, Place | None] = {}
        self.repeated: list[tuple[str, str]] = []
        """Each repeated id, and the two places where it stands."""

    def admit_all(self, records: Sequence[RawRecord]) -> bool:
        """Admit many records, if no id of theirs stands twice; otherwise none."""
        places = {record.id: record.place for record in records}
        if len(places) < len(records) or not self._seen.keys().isdisjoint(places):
            return False
        self._seen.update(places)
        return True

    def admit(self, record: Record | RawRecord) -> bool:
        """Tell whether the record stays, under another id maybe; raises InputError if refused."""
        if record.id not in self._seen:
            self._seen[record.id] = record.place
            return True
        places = _two_places(self._seen[record.id], record.place)
        self.repeated.append((record.id, places))
        if self._policy == "error":
            raise InputError(
                f"{places} have the same id {record.id!r}; give each record its own id, or use "
                "reading.duplicate_ids=first or suffix"
            )
        if self._policy == "first":
            return False
        numbered = (f"{record.id}.{number}" for number in count(2))
        record.id = next(name for name in numbered if name not in self._seen)
        self._seen[record.id] = record.place
        return True


def _two_places(first: Place | None, second: Place | None) -> str:
    assert first is not None, "a record that was read has a place"
    assert second is not None, "a record that was read has a place"
    if (first.file, first.unit) == (second.file, second.unit):
        return f"{first.file}: {first.unit}s {first.number:,} and {second.number:,}"
    places = [f"{place.unit} {place.number:,} of {place.file}" for place in (first, second)]
    return " and ".join(places)


def _named_errors(records: Iterator[RawRecord], name: str) -> Generator[RawRecord]:
    last: RawRecord | None = None

    def where() -> str:
        if last is None:
            return "before the first record was read"
        return f"after {last.place.unit} {last.place.number:,} ({last.id!r})"

    with reading_errors(name, where):
        for raw in records:
            last = raw
            yield raw


def _read_source(
    source: Source, kind: Format, columns: Columns, label_pattern: str | None
) -> Iterator[RawRecord]:
    if kind == "fasta":
        return _read_fasta(source, label_pattern)
    if kind == "genbank":
        return _read_genbank(source)
    if kind == "2bit":
        return _read_twobit(source)
    return _read_table(source, kind, columns)


def _read_fasta(source: Source, label_pattern: str | None) -> Iterator[RawRecord]:
    pattern = label_pattern and re.compile(label_pattern)
    for number, (title, letters) in enumerate(split_records(source.stream), start=1):
        name, _, description = title.partition(" ") if "\t" not in title else _split_title(title)
        match = pattern.search(title) if pattern else None
        label = match[1] if match else None
        place = Place(source.name, number)
        yield RawRecord(place, name, description.strip(), letters, label=label)


def _split_title(title: str) -> tuple[str, str, str]:
    words = title.split(maxsplit=1)
    return words[0] if words else "", "", words[1] if len(words) > 1 else ""


def _read_genbank(source: Source) -> Iterator[RawRecord]:
    for number, record in enumerate(split_genbank(source.stream, source.name), start=1):
        name, _, description = record.title.partition(" ")
        yield RawRecord(
            Place(source.name, number),
            name,
            description,
            record.letters,
            circular=record.circular,
            problem=record.problem,
        )


def _read_twobit(source: Source) -> Iterator[RawRecord]:
    if source.compression != "none" or source.size is None:
        raise InputError(f"{source.name} is packed or piped 2bit; give the 2bit file itself")
    try:
        for number, record in enumerate(SeqIO.parse(source.stream, "twobit"), start=1):
            yield RawRecord(Place(source.name, number), record.id, "", bytes(record.seq))
    except (ValueError, EOFError, RuntimeError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{source.name} is a damaged or unknown 2bit file ({error}); copy it again"
        ) from error


def _read_table(source: Source, kind: Format, columns: Columns) -> Iterator[RawRecord]:
    for row in read_rows(source, kind, columns):
        yield RawRecord(
            Place(source.name, row.number, "row"),
            row.id,
            "",
            row.sequence.encode("utf-8"),
            label=row.label,
            group=row.group,
            split=row.split,
        )


def _read_text(part: Part) -> RawRecord:
    try:
        letters = part.path.read_bytes()
    except OSError as error:
        raise InputError(f"{part.path} cannot be read: {error.strerror}") from error
    return RawRecord(
        Place(str(part.path), 1), part.id or "", "", letters, label=part.label, split=part.split
    )
