"""`ingest`: sequences of any format into the store that everything else reads.

A store appears when it is complete: it is written beside its place and renamed. An ingest that was
interrupted, killed too, leaves nothing that matters; the same command starts anew. One that finds
its store made from equal bytes with equal settings ends at once.
"""

import atexit
import getpass
import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock
from google_crc32c import extend as crc32c

from pipelines.genomics.batches import BATCH_BYTES, Batch, parse_batch
from pipelines.genomics.folders import list_parts
from pipelines.genomics.formats import TABLES, Format
from pipelines.genomics.genome import Ids, RawRecord, RecordError, read_raw_records
from pipelines.genomics.ingest_report import Tally, notes_of
from pipelines.genomics.letters import Reading
from pipelines.genomics.opening import STDIN, Source, is_pipe
from pipelines.genomics.progress import Progress
from pipelines.genomics.sequence_tables import ROLES, Columns
from pipelines.genomics.store import SCHEMA, SequenceStore, open_group, read_schema
from pipelines.genomics.store_writer import StoreWriter
from pipelines.shared.errors import InputError
from pipelines.shared.tables import Failure, write_failures

REPORT = "ingest_report.json"
FAILURES = "failures.csv"

_MOST_WORKERS = 8
_BLOCK_BYTES = 1 << 20
_MOST_BYTES = 1 << 28


def run(config: dict[str, Any]) -> int:
    """Ingest as the verb says; 0, or 3 if records could not be read and were left out."""
    columns = Columns(config["columns"], config["where"])
    reading = Reading.from_config(config["reading"])
    sequences = config["sequences"]
    if config["dry_run"]:
        checked = _check(sequences, reading, columns, progress=config["progress"])
        print(f"{checked.tally.counts()}\n{config['store']} would be written; nothing was")
        return 3 if checked.failures else 0
    store = ingest(
        sequences,
        config["store"],
        reading=reading,
        columns=columns,
        num_workers=config["num_workers"],
        progress=config["progress"],
    )
    report = read_report(store)
    print(f"{store.counts}\nstore        {store.path}\nreport       {store.path / REPORT}")
    if report["failures"]:
        print(f"{report['failures']:,} records could not be read: {store.path / FAILURES}")
    return 3 if report["failures"] else 0


def require_input(config: Mapping[str, Any]) -> None:
    """Raise InputError where neither `sequences` nor `store` is given."""
    if config["sequences"] is None and config["store"] is None:
        raise InputError("sequences= is missing: give sequences=FILE, or store=FOLDER of ingest")


def provide_store(
    config: Mapping[str, Any], out: Path, *, with_labels: bool = False
) -> SequenceStore:
    """Return the store that a verb works on, made first where it is missing.

    `sequences` is ingested into `store`, or into OUT/store; `store` alone is taken as it is. In a
    dry run what is missing goes to a temporary folder that ends with the process. With
    `with_labels`, labels that stand beside the sequences are taken along. Raises InputError for
    what `ingest` refuses.
    """
    if config["sequences"] is None:
        store = SequenceStore(config["store"])
    else:
        names = dict(config["columns"])
        if not with_labels:
            names = {role: names[role] for role in ("id", "sequence")}
        store = ingest(
            config["sequences"],
            config["store"] or out / "store",
            reading=Reading.from_config(config["reading"]),
            columns=Columns(names, config.get("where", {}) if with_labels else {}),
            elsewhere=_temporary() if config.get("dry_run") else None,
        )
    return store


def _temporary() -> Path:
    folder = tempfile.mkdtemp(prefix="gigasparse-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder) / "store"


def ingest(
    sequences: str | Path,
    store: str | Path,
    *,
    reading: Reading | None = None,
    columns: Columns | None = None,
    num_workers: int = 0,
    progress: bool = True,
    elsewhere: Path | None = None,
) -> SequenceStore:
    """Write the records of a file, a folder or stdin into a store, or reuse an equal one.

    `num_workers` threads pack and write (0: one per core, at most eight); the store is the same
    for any number. With `elsewhere`, `store` is only reused, and a new one written there. Raises
    InputError for what `read_records` refuses, where no record is left, and when the store cannot
    be written or something else stands in its place.
    """
    if num_workers < 0:
        raise InputError(f"num_workers is a number of threads, 0 for one a core; got {num_workers}")
    store = Path(store)
    if store.exists() and read_schema(store) is None:
        raise InputError(f"{store} exists and is no sequence store; remove it or name another")
    job = _Job(sequences, reading or Reading(), columns or Columns(), progress)
    records = job.records()
    first = next(records, None)  # refuses what cannot be opened before anything is written
    with _alone(store):
        if store.exists() and _is_current(store, job.checksum(), job.settings):
            records.close()
            return SequenceStore(store)
        store = elsewhere or store
        aside, outdated = _beside(store, "partial"), _beside(store, "old")
        for stale in (aside, outdated):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            _write(job, aside, chain([first] if first else [], records), num_workers)
            if store.exists():
                os.replace(store, outdated)
            os.replace(aside, store)
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(
                f"store={store} cannot be written ({reason}); free space or give another folder"
            ) from error
        finally:
            records.close()
            shutil.rmtree(aside, ignore_errors=True)
            shutil.rmtree(outdated, ignore_errors=True)
    return SequenceStore(store)


def read_report(store: SequenceStore) -> dict[str, Any]:
    """Read the report of the ingest that wrote a store."""
    report: dict[str, Any] = json.loads((store.path / REPORT).read_text(encoding="utf-8"))
    return report


@dataclass(slots=True)
class _Job:
    """One ingest: what is read and how, and what has been found so far."""

    sequences: str | Path
    reading: Reading
    columns: Columns
    progress: bool
    names: Ids = field(init=False)
    tally: Tally = field(default_factory=Tally)
    failures: list[Failure] = field(default_factory=list)
    formats: dict[str, None] = field(default_factory=dict)
    """Formats and compressions, in the order of their first file."""
    bar: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.names = Ids(self.reading)
        self.bar = Progress(shown=self.progress)

    @property
    def name(self) -> str:
        """The file or folder, without what is above it."""
        return "stdin" if str(self.sequences) == STDIN else Path(self.sequences).name

    @property
    def settings(self) -> dict[str, Any]:
        """What the store depends on beside the sequences: columns only where there is a table."""
        is_table = any(kind.split(",")[0] in TABLES for kind in self.formats)
        names = {role: self.columns.name(role) for role in ROLES}
        columns = {"names": names, "where": dict(self.columns.where)}
        return {"reading": asdict(self.reading), "columns": columns if is_table else {}}

    def records(self) -> Iterator[RawRecord]:
        """The records as they stand in the input."""
        return read_raw_records(
            self.sequences,
            columns=self.columns,
            label_pattern=self.reading.label_pattern,
            opened=self._opened,
        )

    def _opened(self, source: Source, kind: Format) -> None:
        packed = "" if source.compression == "none" else f", {source.compression}"
        self.formats[f"{kind}{packed}"] = None
        self.bar.open(source)

    def accept(self, batch: Batch) -> Batch:
        """Choose the records that go into the store; count them, and list what does not."""
        if batch.errors or not self.names.admit_all(batch.raws):
            batch = batch.only(
                [p for p, raw in enumerate(batch.raws) if self._admit(raw, p, batch)]
            )
        self.tally.add(batch)
        self.bar.update(len(self.tally.ids))
        return batch

    def _admit(self, raw: RawRecord, place: int, batch: Batch) -> bool:
        error = batch.errors.get(place)
        if error is not None:
            self._fail(error)
            return False
        return self.names.admit(raw)

    def _fail(self, error: RecordError) -> None:
        if self.reading.bad_records == "error":
            raise error
        name = error.id or error.file
        self.failures.append(Failure(name, error.file, "bad_record", error.problem, error.remedy))

    def checksum(self) -> dict[str, int | str] | None:
        """Bytes and CRC32C of the file, or of the files of a folder; None for a pipe.

        They tell whether the input has changed; what identifies the records is their digest.
        """
        if is_pipe(self.sequences):
            return None
        path = Path(self.sequences)
        files = [part.path for part in list_parts(path)] if path.is_dir() else [path]
        size, checksum = 0, 0
        for file in files:
            checksum = crc32c(checksum, str(file.relative_to(path)).encode())
            with file.open("rb") as handle:
                while block := handle.read(_BLOCK_BYTES):
                    size, checksum = size + len(block), crc32c(checksum, block)
        return {"bytes": size, "crc32c": f"{checksum:08x}"}

    def report(self, digests: list[bytes], source: dict[str, Any], digest: str) -> dict[str, Any]:
        """Everything that is known once all records are read."""
        return {
            "schema": SCHEMA,
            "digest": digest,
            "source": source,
            "settings": self.settings,
            "failures": len(self.failures),
            **self.tally.report(digests, self.names),
        }


def _write(
    job: _Job,
    aside: Path,
    records: Iterable[RawRecord],
    num_workers: int,
) -> None:
    num_workers = num_workers or min(os.cpu_count() or 1, _MOST_WORKERS)
    with ThreadPoolExecutor(num_workers) as workers:
        try:
            checksum = workers.submit(job.checksum)
            writer = StoreWriter(aside, workers, num_workers=num_workers)
            for batch in _parsed(job, records, workers, num_workers):
                writer.append(job.accept(batch))
            _require_records(job)
            writer.close()
            source = {
                "name": job.name,
                "formats": list(job.formats),
                "checksum": checksum.result(),
            }
            report = job.report(writer.digests, source, writer.digest)  # while the last is written
            counts = asdict(job.tally.counts())
            writer.finish({"source": source, "settings": job.settings, "counts": counts})
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
        finally:
            job.bar.close()
    (aside / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_failures(aside / FAILURES, job.failures, id_column="id")
    for note in notes_of(report):
        print(f"note: {job.name}: {note}")


def _check(sequences: str, reading: Reading, columns: Columns, *, progress: bool) -> _Job:
    """Read everything and write nothing."""
    job = _Job(sequences, reading, columns, progress)
    for raws in _batches(job.records()):
        job.accept(parse_batch(raws, reading))
    job.bar.close()
    _require_records(job)
    for failure in job.failures:
        print(f"{failure.path}: {failure.reason}; {failure.remedy}")
    return job


def _parsed(
    job: _Job, raws: Iterable[RawRecord], workers: Executor, num_workers: int
) -> Iterator[Batch]:
    """Parse records in batches, by workers; they come back in their order.

    Chromosomes are long: no more of them wait than memory should hold.
    """
    waiting: deque[tuple[int, Future[Batch]]] = deque()
    for batch in _batches(raws):
        size = sum(len(raw.letters) for raw in batch)
        waiting.append((size, workers.submit(parse_batch, batch, job.reading)))
        while len(waiting) > num_workers or sum(size for size, _ in waiting) > _MOST_BYTES:
            yield waiting.popleft()[1].result()
    while waiting:
        yield waiting.popleft()[1].result()


def _batches(raws: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    batch: list[RawRecord] = []
    size = 0
    for raw in raws:
        batch.append(raw)
        size += len(raw.letters)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _require_records(job: _Job) -> None:
    if job.tally.ids:
        return
    if job.failures:
        first = job.failures[0]
        raise InputError(
            f"{job.sequences}: none of {len(job.failures):,} records can be read; the first: "
            f"{first.id!r} {first.reason}; {first.remedy}"
        )
    chosen = ", ".join(f"where.{column}={value}" for column, value in job.columns.where.items())
    kept = f" that {chosen} keeps" if chosen else ""
    raise InputError(f"{job.sequences}: no records{kept}; give a file that holds some")


def _is_current(
    store: Path, checksum: dict[str, int | str] | None, settings: dict[str, Any]
) -> bool:
    if checksum is None or read_schema(store) != SCHEMA:
        return False
    attributes = open_group(store).attrs
    return bool(attributes["source"]["checksum"] == checksum and attributes["settings"] == settings)


def _beside(store: Path, kind: str) -> Path:
    """A place beside the store, one for each machine that may write to a shared disk."""
    return store.with_name(f"{store.name}.{kind}-{platform.node()}")


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Wait until no other process of this machine and user writes the store."""
    name = hashlib.sha256(str(store.absolute()).encode()).hexdigest()[:16]
    place = Path(tempfile.gettempdir()) / f"gigasparse-{getpass.getuser()}-{name}.lock"
    with FileLock(place):
        yield
