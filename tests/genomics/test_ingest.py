"""Formats into stores, what the report counts, and what an interruption leaves."""

import gzip
import io
import itertools
import json
import multiprocessing
import os
import struct
import sys
import threading

import numpy as np
import openpyxl
import pandas as pd
import pytest
import yaml
from Bio import bgzf
from hypothesis import given
from hypothesis import strategies as st

from pipelines.genomics import batches as batches_module
from pipelines.genomics import ingest as ingest_module
from pipelines.genomics.__main__ import main
from pipelines.genomics.alphabet import decode
from pipelines.genomics.batches import COUNTED, NO_RUNS, parse_batch
from pipelines.genomics.genome import Place, RawRecord, read_records
from pipelines.genomics.ingest import ingest, provide_store, read_report
from pipelines.genomics.letters import Reading
from pipelines.genomics.sequence_tables import ROLES, Columns
from pipelines.genomics.store import SequenceStore
from pipelines.shared.conf_tree import conf_folder
from pipelines.shared.errors import InputError
from tests.benchmarks.kill_ingest import kill_again_and_again, write_records

GENBANK = """LOCUS       X1                        12 bp    DNA     circular BCT 01-JAN-2000
DEFINITION  a plasmid.
ACCESSION   X1
VERSION     X1.1
FEATURES             Location/Qualifiers
     source          1..12
ORIGIN
        1 acgtnnnnry ga
//
"""


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def twobit(sequences):
    """A 2bit file as UCSC describes it: packed bases, runs of N, runs of lower case."""
    names = [name.encode() for name in sequences]
    offset = 16 + sum(1 + len(name) + 4 for name in names)
    index, blocks = b"", b""
    for name, letters in zip(names, sequences.values(), strict=True):
        index += bytes([len(name)]) + name + struct.pack("<I", offset + len(blocks))
        n_runs = runs_of(letters, lambda sign: sign in "Nn")
        masked = runs_of(letters, str.islower)
        codes = ["TCAG".index(sign) if sign in "TCAG" else 0 for sign in letters.upper()]
        codes += [0] * (-len(codes) % 4)
        packed = bytes(
            codes[i] << 6 | codes[i + 1] << 4 | codes[i + 2] << 2 | codes[i + 3]
            for i in range(0, len(codes), 4)
        )
        blocks += struct.pack("<I", len(letters)) + listed(n_runs) + listed(masked)
        blocks += struct.pack("<I", 0) + packed
    return struct.pack("<4I", 0x1A412743, 0, len(names), 0) + index + blocks


def runs_of(letters, chosen):
    marks = [False, *map(chosen, letters), False]
    edges = [i for i in range(len(letters) + 1) if marks[i] != marks[i + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def listed(runs):
    starts, sizes = [a for a, _ in runs], [b - a for a, b in runs]
    return struct.pack(f"<I{len(runs)}I{len(runs)}I", len(runs), *starts, *sizes)


def contents(store):
    """Ids with their letters, lower case where they are masked."""
    found = {}
    for record, name in enumerate(store.ids):
        letters = np.array(list(decode(store.read(record))), dtype="U1")
        masked = store.mask(record)
        letters[masked] = np.char.lower(letters[masked])
        found[name] = "".join(letters)
    return found


MASKED = {"chr1": "NNacgtACGTnnACGTTGA", "chr2": "ACGT", "chr3": "gg", "chr4": "NNN"}
FASTA = "".join(f">{name}\n{letters}\n" for name, letters in MASKED.items())


@pytest.mark.parametrize("kind", ["fasta", "gz", "bgz", "2bit"])
def test_formats_of_genomes_give_one_store(tmp_path, kind):
    path = tmp_path / "genome"
    if kind == "bgz":
        with bgzf.open(str(path), "wb") as file:
            file.write(FASTA.encode())
    else:
        content = twobit(MASKED) if kind == "2bit" else FASTA.encode()
        path.write_bytes(gzip.compress(content) if kind == "gz" else content)
    store = ingest(path, tmp_path / "store")
    assert contents(store) == MASKED
    assert store.fingerprint == ingest(put(tmp_path / "x.fa", FASTA), tmp_path / "s").fingerprint


def test_genbank_says_what_is_circular_and_lower_case_means_nothing(tmp_path):
    text = GENBANK + GENBANK.replace("X1", "X2").replace("circular", "linear  ")
    store = ingest(put(tmp_path / "x", text), tmp_path / "store")
    assert contents(store) == {"X1.1": "ACGTNNNNRYGA", "X2.1": "ACGTNNNNRYGA"}
    assert store.descriptions == ("a plasmid", "a plasmid")
    assert store.circular.tolist() == [True, False]
    assert store.counts.lower == 0


ROWS = [["ACGT", "1", "train"], ["GGTA", "0", "test"], ["TTAN", "", "dev"]]


@pytest.mark.parametrize("kind", [",", "\t", ";", "xlsx", "parquet"])
@pytest.mark.parametrize("packed", [False, True])
def test_tables_of_any_kind(tmp_path, kind, packed):
    frame = pd.DataFrame(ROWS, columns=["sequence", "label", "split"])
    buffer = io.BytesIO()
    if kind == "xlsx":
        frame.to_excel(buffer, index=False)
    elif kind == "parquet":
        frame.to_parquet(buffer, index=False)
    else:
        frame.to_csv(buffer, index=False, sep=kind)
    content = buffer.getvalue()
    if packed and kind == "xlsx":
        pytest.skip("a workbook is packed already")
    path = put(tmp_path / "any.name", gzip.compress(content) if packed else content)
    store = ingest(path, tmp_path / "store")
    assert contents(store) == {"row2": "ACGT", "row3": "GGTA", "row4": "TTAN"}
    assert store.labels == ("1", "0", None)
    assert store.splits == ("train", "test", "val")
    table = store.label_table()
    assert table.to_numpy().tolist() == [
        ["row2", "1", "row2", "train"], ["row3", "0", "row3", "test"],
    ]  # fmt: skip
    assert list(table.columns) == ["id", "label", "group", "split"]


def test_columns_have_other_names_and_rows_are_chosen(tmp_path):
    text = "name,dna,kind,task,family\na,ACGT,x,one,f\nb,GG,y,two,f\nc,TT,y,one,g\n"
    names = {"id": "name", "sequence": "dna", "label": "kind", "group": "family"}
    columns = Columns(names, {"task": "one"})
    store = ingest(put(tmp_path / "t.csv", text), tmp_path / "store", columns=columns)
    assert contents(store) == {"a": "ACGT", "c": "TT"}
    assert store.label_table()["group"].tolist() == ["f", "g"]


def test_a_table_without_header_has_columns_by_place(tmp_path):
    path = put(tmp_path / "t", "EI,  A-1,   ACGT\nN ,  B-2,   GGTN\n")
    columns = Columns({"label": "1", "id": "2", "sequence": "3"})
    store = ingest(path, tmp_path / "store", columns=columns)
    assert contents(store) == {"A-1": "ACGT", "B-2": "GGTN"}
    assert store.labels == ("EI", "N")


def test_sequences_of_a_table_may_be_long(tmp_path):
    letters = "ACGT" * 50_000
    path = put(tmp_path / "t.csv", f'sequence,label\n"{letters}",1\n')
    assert ingest(path, tmp_path / "store").lengths.tolist() == [200_000]


def test_a_folder_of_tables_by_split(tmp_path):
    for name in ("train", "dev", "test"):
        put(tmp_path / "gue" / f"{name}.csv", f"sequence,label\n{name[0].upper()}ACGTN,1\n".replace(
            "D", "A"))  # fmt: skip
    put(tmp_path / "gue" / "notes.md", "not read")
    store = ingest(tmp_path / "gue", tmp_path / "store")
    assert store.ids == ("train:row2", "val:row2", "test:row2")
    assert store.splits == ("train", "val", "test")


def test_a_folder_of_fasta_by_split_has_labels_at_the_end_of_headers(tmp_path):
    put(tmp_path / "nt" / "train.fna", ">s1 chr1|0\nACGT\n>s2|x|1\nGG\n")
    put(tmp_path / "nt" / "test.fna", ">s3 no label\nTT\n")
    store = ingest(tmp_path / "nt", tmp_path / "store")
    assert (store.labels, store.splits) == (("0", "1", None), ("train", "train", "test"))
    single = Reading(label_pattern=r"class=(\w+)")
    path = put(tmp_path / "x.fa", ">a class=up\nAC\n")
    assert ingest(path, tmp_path / "t", reading=single).labels == ("up",)


def test_a_folder_of_texts_by_class(tmp_path):
    for place, letters in {"train/pos/1": "AC", "train/neg/1": "GG", "test/pos/7": "TT\n"}.items():
        put(tmp_path / "gb" / f"{place}.txt", letters)
    store = ingest(tmp_path / "gb", tmp_path / "store")
    assert contents(store) == {"train/neg/1": "GG", "train/pos/1": "AC", "test/pos/7": "TT"}
    assert store.labels == ("neg", "pos", "pos")


@pytest.mark.parametrize("packed", [False, True])
def test_stdin(tmp_path, monkeypatch, packed):
    content = gzip.compress(FASTA.encode()) if packed else FASTA.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert contents(ingest("-", tmp_path / "store")) == MASKED


def blocks(path):
    """The blocks of a block gzip file; the last one is the end marker."""
    packed, parts = path.read_bytes(), []
    while packed:
        size = struct.unpack("<H", packed[16:18])[0] + 1
        parts.append(packed[:size])
        packed = packed[size:]
    return parts


def test_block_gzip_from_stdin_must_be_whole(tmp_path, monkeypatch):
    text = "".join(f">r{number}\n{'ACGTTGCA' * 20}\n" for number in range(2000))
    with bgzf.open(str(tmp_path / "x"), "wb") as file:
        file.write(text.encode())
    parts = blocks(tmp_path / "x")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"".join(parts))))
    assert len(ingest("-", tmp_path / "whole")) == 2000
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"".join(parts[:3]))))
    with pytest.raises(InputError, match="stdin: gzip data cut short"):
        ingest("-", tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_a_named_pipe_is_read_once(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=pipe.write_bytes, args=(FASTA.encode(),))
    writer.start()
    assert contents(ingest(pipe, tmp_path / "store")) == MASKED
    writer.join()


@pytest.mark.parametrize("verb", ["export", "inspect", "split"])
def test_intervals_from_a_pipe_are_refused(tmp_path, verb, capsys):
    os.mkfifo(pipe := tmp_path / "pipe")
    given = [f"sequences={put(tmp_path / 'x.fa', FASTA)}", f"intervals={pipe}"]
    assert main([verb, *given, f"out={tmp_path / 'out'}"]) == 2
    assert f"intervals={pipe} is a pipe" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["export", "inspect", "split"])
def test_a_dry_run_leaves_nothing(tmp_path, verb):
    given = [f"sequences={put(tmp_path / 'x.fa', FASTA)}", f"out={tmp_path / 'out'}"]
    assert main([verb, *given, "dry_run=true"]) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.fa"]
    store = ingest(tmp_path / "x.fa", tmp_path / "out" / "store")
    written = (store.path / "zarr.json").stat().st_mtime_ns
    assert main([verb, *given, "dry_run=true", "reading.min_length=2"]) == 0
    assert main([verb, *given, "dry_run=true"]) == 0
    assert (store.path / "zarr.json").stat().st_mtime_ns == written


def test_fewer_than_no_threads_are_refused(tmp_path):
    with pytest.raises(InputError, match="num_workers"):
        ingest(put(tmp_path / "x.fa", FASTA), tmp_path / "s", num_workers=-1)


records = st.lists(
    st.text("ACGTacgtNnRUu\n-", max_size=40).filter(lambda text: text.strip("\n-")),
    min_size=1,
    max_size=12,
)


@given(records, st.lists(st.integers(1, 5), min_size=12, max_size=12))
def test_what_is_found_does_not_depend_on_the_batch(texts, sizes):
    reading = Reading(gaps="strip", min_length=2)
    raws = [
        RawRecord(Place("x", number), f"r{number}", "", text.encode())
        for number, text in enumerate(texts, start=1)
    ]
    alone = [parse_batch([raw], reading) for raw in raws]
    bounds = [0, *np.cumsum(sizes)]
    several = [parse_batch(raws[a:b], reading) for a, b in itertools.pairwise(bounds)]
    expected = [record for batch in alone for record in summaries(batch)]
    for batches in (several, [parse_batch(raws, reading)]):
        assert [record for batch in batches for record in summaries(batch)] == expected
        readable = [batch.only([p for p in range(len(batch.raws)) if p not in batch.errors])
                    for batch in batches]  # fmt: skip
        assert [record for batch in readable for record in summaries(batch)] == [
            record for record in expected if not isinstance(record, str)
        ]


def summaries(batch):
    """All that is known of each record; of one that could not be read, why."""
    for place, raw in enumerate(batch.raws):
        if place in batch.errors:
            yield str(batch.errors[place])
        else:
            others, mask = batch.others.get(place, NO_RUNS), batch.masks.get(place, NO_RUNS)
            counts = dict(zip(COUNTED, batch.counts[place].tolist(), strict=True))
            yield (raw.id, int(batch.lengths[place]), bytes(batch.bases[place]), others.tolist(),
                   mask.tolist(), counts, batch.digests[place])  # fmt: skip


def test_store_and_digest_do_not_depend_on_batches_or_workers(tmp_path, monkeypatch):
    path = write_records(tmp_path / "x.fa", 0.3)
    stores = []
    for size, workers in ((1 << 22, 1), (1 << 22, 8), (5000, 2), (1, 3)):
        monkeypatch.setattr(ingest_module, "BATCH_BYTES", size)
        monkeypatch.setattr(batches_module, "BATCH_BYTES", size)
        place = tmp_path / f"s{size}-{workers}"
        stores.append(ingest(path, place, num_workers=workers, progress=False))
    assert len({store.fingerprint for store in stores}) == 1
    assert len({(store.path / "bases" / "c" / "0").read_bytes() for store in stores}) == 1
    direct = {record.id: decode(record.tokens) for record in read_records(path)}
    for store in stores:
        found = contents(store)
        assert {name: letters.upper() for name, letters in found.items()} == direct
    assert "".join(found.values()).count("a") > 1000


def test_digest_depends_on_what_the_records_are(tmp_path):
    variants = {
        "same": ">a x\nACGT\n>b\nGG\n", "wrapped": ">a x\nAC\nGT\n>b\nGG\n",
        "letters": ">a x\nACGA\n>b\nGG\n", "id": ">c x\nACGT\n>b\nGG\n",
        "order": ">b\nGG\n>a x\nACGT\n", "mask": ">a x\nACGt\n>b\nGG\n",
        "length": ">a x\nACGTA\n>b\nGG\n", "n": ">a x\nACGN\n>b\nGG\n",
    }  # fmt: skip
    digests = {
        name: ingest(put(tmp_path / f"{name}.fa", text), tmp_path / name).fingerprint
        for name, text in variants.items()
    }
    assert digests["same"] == digests["wrapped"]
    assert len(set(digests.values())) == len(variants) - 1


def test_report_counts_every_letter(tmp_path):
    text = ">a\nACGTNNnacgtu\n>b\nRYKU-\n>c\nacgt\n>d\nACGT\n>a\nGGGGXX1\n"
    reading = Reading(gaps="strip", digits="strip", others="n", duplicate_ids="suffix")
    store = ingest(put(tmp_path / "x.fa", text), tmp_path / "s", reading=reading)
    report = read_report(store)
    assert report["letters"] == {
        "A": 4, "C": 4, "G": 8, "T": 6, "N": 5, "R": 1, "Y": 1, "K": 1,
    }  # fmt: skip
    assert report["read_otherwise"] == {
        "lower_case": 10, "uracil_as_t": 2, "iupac_as_n": 0, "others_as_n": 2,
        "gaps_left_out": 1, "digits_left_out": 1, "blanks_left_out": 0,
    }  # fmt: skip
    assert (report["records"], report["bases"], report["n_runs"]) == (5, 30, 2)
    assert report["t_and_u"] == {"records": 1, "ids": ["a"]}
    assert report["lengths"] == {"min": 4, "median": 4.0, "mean": 6.0, "max": 12, "n50": 6}
    assert report["extremes"]["longest"] == {"id": "a", "value": 12}
    assert report["extremes"]["highest_gc"] == {"id": "a.2", "value": 1.0}
    assert report["extremes"]["most_n"] == {"id": "a.2", "value": pytest.approx(1 / 3, abs=1e-6)}
    assert report["repeated_ids"]["count"] == 1
    assert "records 1 and 5" in report["repeated_ids"]["places"][0]
    assert report["copies"]["ids"] == [["c", "d"]]
    assert store.ids == ("a", "b", "c", "d", "a.2")
    assert report["digest"] == store.fingerprint


def test_conflicts_and_copies_across_splits_are_listed(tmp_path, capsys):
    text = "sequence,label,split\nACGT,1,train\nacgt,0,train\nGG,1,train\nGG,1,test\n"
    report = read_report(ingest(put(tmp_path / "t.csv", text), tmp_path / "s"))
    assert report["conflicts"] == [
        {"ids": ["row2", "row3"], "labels": ["1", "0"], "splits": ["train", "train"]}
    ]
    assert report["copies"]["across_splits"] == 1
    assert report["labels"] == {"train": {"1": 2, "0": 1}, "test": {"1": 1}}
    assert "1 of them with different labels" in capsys.readouterr().out


def test_the_first_of_an_id_stays_and_counts(tmp_path):
    reading = Reading(duplicate_ids="first")
    store = ingest(put(tmp_path / "x.fa", ">a\nAC\n>a\nGGG\n>b\nTn\n>b\nnn\n"), tmp_path / "s",
                   reading=reading)  # fmt: skip
    assert contents(store) == {"a": "AC", "b": "Tn"}
    assert read_report(store)["letters"] == {"A": 1, "C": 1, "T": 1, "N": 1}


def test_other_settings_make_another_store(tmp_path):
    path, place = put(tmp_path / "x.fa", ">a\nACGTRY\n"), tmp_path / "s"
    assert contents(ingest(path, place)) == {"a": "ACGTRY"}
    assert contents(ingest(path, place, reading=Reading(iupac="n"))) == {"a": "ACGTNN"}


def test_the_command_ingests_and_a_dry_run_writes_nothing(tmp_path, capsys):
    path = put(tmp_path / "x.fa", ">a\nACGT\n>b\nAC-GT\n>c\nGG\n")
    given = ["ingest", f"sequences={path}", f"store={tmp_path / 's'}", "progress=false"]
    assert main([*given, "dry_run=true"]) == 2
    assert main([*given, "dry_run=true", "reading.bad_records=skip"]) == 3
    shown = capsys.readouterr().out
    assert "2 records, 6 bases" in shown
    assert "'-' at position 3" in shown
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.fa"]
    assert main([*given, "reading.bad_records=skip"]) == 3
    failures = pd.read_csv(tmp_path / "s" / "failures.csv")
    assert failures[["id", "status"]].to_numpy().tolist() == [["b", "bad_record"]]
    assert main([*given, "reading=lenient", "num_workers=2"]) == 0
    assert SequenceStore(tmp_path / "s").ids == ("a", "b", "c")
    assert json.loads((tmp_path / "s" / "ingest_report.json").read_text())["failures"] == 0


def _ingest_quietly(path, place):
    ingest(path, place, progress=False)


def test_two_at_once_write_one_store(tmp_path):
    path = write_records(tmp_path / "x.fa", 0.3)
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=_ingest_quietly, args=(path, tmp_path / "s"))
    other.start()
    store = ingest(path, tmp_path / "s", progress=False)
    other.join()
    assert other.exitcode == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["s", "x.fa"]
    assert SequenceStore(tmp_path / "s").fingerprint == store.fingerprint


def test_a_full_disk_is_one_message(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ingest_module.StoreWriter, "_put", fail)
    with pytest.raises(InputError, match=r"No space left on device.*another folder"):
        ingest(put(tmp_path / "x.fa", FASTA), tmp_path / "s")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.fa"]


def test_killed_ingests_are_followed_by_whole_ones(tmp_path):
    assert kill_again_and_again(tmp_path, kills=3, megabases=15).killed == 3


def test_a_workbook_keeps_its_first_sheet(tmp_path):
    book = openpyxl.Workbook()
    book.active.append(["id", "sequence"])
    book.active.append([7, "ACGT"])
    book.create_sheet("other").append(["x"])
    book.save(tmp_path / "t.xlsx")
    assert contents(ingest(tmp_path / "t.xlsx", tmp_path / "s")) == {"7": "ACGT"}


def provided(tmp_path, **given):
    strict = yaml.safe_load((conf_folder() / "reading" / "strict.yaml").read_text())
    roles = {role: role for role in ROLES}
    config = {"sequences": None, "store": None, "columns": roles, "reading": strict, "where": {}}
    return provide_store(config | given, tmp_path / "out", with_labels="where" in given)


@pytest.mark.parametrize("kind", ["fasta", "genbank", "2bit", "table"])
def test_verbs_get_a_store_of_any_format_and_reuse_it(tmp_path, kind):
    content = {"fasta": FASTA, "genbank": GENBANK, "2bit": twobit(MASKED),
               "table": "sequence\nACGT\n"}[kind]  # fmt: skip
    path = put(tmp_path / "x", content)
    store = provided(tmp_path, sequences=path)
    assert store.path == tmp_path / "out" / "store"
    written = (store.path / "zarr.json").stat().st_ino
    assert provided(tmp_path, sequences=path).fingerprint == store.fingerprint
    assert provided(tmp_path, store=store.path).ids == store.ids
    assert (store.path / "zarr.json").stat().st_ino == written


def test_verbs_that_need_labels_take_those_of_the_table(tmp_path):
    text = "sequence,label,task\nACGT,1,a\nGG,0,a\nTT,1,b\n"
    store = provided(tmp_path, sequences=put(tmp_path / "t", text), where={"task": "a"})
    assert store.label_table()["label"].tolist() == ["1", "0"]
    with pytest.raises(InputError, match="labels=TABLE"):
        provided(tmp_path, sequences=put(tmp_path / "x.fa", FASTA), where={}).label_table()
