"""Both verbs, through the command line, on small real files."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
from Bio import bgzf

from pipelines.genomics.__main__ import main

QUICK = ["logger=none", "trainer.progress=false", "epochs=1"]
SMALL = ["data.num_train=24", "data.num_val=8", "data.num_test=12", *QUICK]


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dna")
    code = run("train", f"out={folder / 'run'}", f"data_root={folder / 'data'}", *SMALL)
    assert code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def records(trained: Path) -> tuple[Path, Path]:
    folder = trained.parent / "data" / "genomics" / "synthetic"
    return next(folder.glob("*.fa")), next(folder.glob("*.tsv"))


def test_default_makes_its_records_and_compares(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert set(metrics["scores"]) == {
        "model", "majority", "kmer", "cnn", "window", "shuffled",
    }  # fmt: skip
    assert metrics["engine"] == "blockwise"
    assert "predict sequences=FILE" in (trained / "summary.txt").read_text()
    table = pd.read_csv(trained / "predictions.csv", dtype=str)
    assert table["split"].value_counts().to_dict() == {"test": 12, "val": 8}
    card = (trained / "model_card.md").read_text()
    assert "balanced accuracy" in card
    assert "strands: augment" in card


@pytest.mark.parametrize("kind", ["fa", "fa.gz", "fa.bgz"])
def test_own_records_and_predictions_in_input_order(
    kind: str, records: tuple[Path, Path], tmp_path: Path
) -> None:
    text = records[0].read_bytes()
    fasta = tmp_path / f"mine.{kind}"
    opener = {"fa": open, "fa.gz": gzip.open, "fa.bgz": bgzf.open}[kind]
    with opener(fasta, "wb") as file:
        file.write(text)
    code = run(
        "train", f"sequences={fasta}", f"labels={records[1]}", f"out={tmp_path / 'run'}",
        "context=200", "window_overlap=50", "baselines=[]", *QUICK,
    )  # fmt: skip
    assert code == 0
    code = run(
        "predict", f"sequences={fasta}", f"ckpt={tmp_path / 'run' / 'model.ckpt'}",
        f"out={tmp_path / 'out'}",
    )  # fmt: skip
    assert code == 0
    table = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t")
    names = [line[1:].split()[0] for line in text.decode().splitlines() if line[0] == ">"]
    assert table["id"].tolist() == names
    assert (table["num_windows"] == 2).all()
    ours = pd.read_csv(tmp_path / "run" / "predictions.csv", dtype={"id": str}).set_index("id")
    again = table.set_index("id").loc[ours.index]
    columns = [column for column in ours if column.startswith("probability")]
    assert (ours[columns] - again[columns]).abs().to_numpy().max() < 1e-5
    assert ours["prediction"].astype(str).tolist() == again["prediction"].astype(str).tolist()


def test_tokens_of_several_bases_and_a_standardised_head(
    records: tuple[Path, Path], tmp_path: Path
) -> None:
    code = run(
        "train", f"sequences={records[0]}", f"labels={records[1]}", f"out={tmp_path / 'run'}",
        "stem_stride=3", "model.pooling=mean+max", "model.head_norm=batch", "baselines=[window]",
        *QUICK,
    )  # fmt: skip
    assert code == 0
    ckpt = tmp_path / "run" / "model.ckpt"
    code = run("predict", f"sequences={records[0]}", f"ckpt={ckpt}", f"out={tmp_path / 'out'}")
    assert code == 0
    ours = pd.read_csv(tmp_path / "run" / "predictions.csv", dtype={"id": str}).set_index("id")
    again = pd.read_csv(tmp_path / "out" / "predictions.tsv", sep="\t").set_index("id")
    columns = [column for column in ours if column.startswith("probability")]
    assert (ours[columns] - again.loc[ours.index, columns]).abs().to_numpy().max() < 1e-5


def test_partnerless_records_are_listed(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.read_csv(records[1], sep="\t", dtype=str)
    lonely = table["id"].iloc[0]
    table["id"] = table["id"].replace(lonely, "nowhere")
    table.to_csv(tmp_path / "labels.tsv", sep="\t", index=False)
    code = run(
        "train", f"sequences={records[0]}", f"labels={tmp_path / 'labels.tsv'}",
        f"out={tmp_path / 'run'}", "baselines=[]", *QUICK,
    )  # fmt: skip
    assert code == 3
    failures = pd.read_csv(tmp_path / "run" / "failures.csv").set_index("id")
    assert failures["status"].to_dict() == {lonely: "no_label", "nowhere": "no_record"}


@pytest.fixture(scope="module")
def pool(records: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Records of two tasks in one file, two of the first copied; columns with other names."""
    folder = tmp_path_factory.mktemp("pool")
    table = pd.read_csv(records[1], sep="\t", dtype=str)
    table = table[["id", "label"]].rename(columns={"id": "record", "label": "kind"})
    lines = records[0].read_text().split(">")[1:]
    one, two = (lines[i].split("\n", 1) for i in (0, 1))
    copies = f">copy1\n{one[1].lower()}>copy2\n{two[1]}"
    (folder / "pool.fa").write_text(records[0].read_text() + copies)
    kinds = table.set_index("record")["kind"]
    rows = [["copy1", kinds[one[0]]], ["copy2", "10"[int(kinds[two[0]])]]]
    table = pd.concat([table, pd.DataFrame(rows, columns=table.columns)])
    other = table.iloc[:3].assign(kind="odd (x)")
    table = pd.concat([table.assign(task="motif, or not"), other.assign(task="other")])
    table.to_csv(folder / "tasks.tsv.gz", sep="\t", index=False)
    return folder / "pool.fa", folder / "tasks.tsv.gz"


NAMES = ["columns.id=record", "columns.label=kind", "where.task=motif, or not"]


def test_a_task_of_a_pool_is_trained_without_copies(
    pool: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"sequences={pool[0]}", f"labels={pool[1]}", f"store={tmp_path / 'store'}"]
    tables = []
    for out in (tmp_path / "one", tmp_path / "two"):
        code = run(
            "train", *given, f"out={out}", *NAMES, "overlap=remove", "baselines=[kmer]", *QUICK
        )
        assert code == 0
        tables.append((out / "splits.tsv").read_text())
    shown = capsys.readouterr().out
    assert "tasks.tsv.gz: id is 'record', label is 'kind'" in shown
    assert "rows where task is 'motif, or not'" in shown
    assert tables[0] == tables[1]
    splits = pd.read_csv(tmp_path / "one" / "splits.tsv", sep="\t", dtype=str)
    assert list(splits.columns) == ["id", "label", "split", "group"]
    copies = pd.read_csv(tmp_path / "one" / "duplicates.csv").set_index("id")
    assert len(copies) == 3  # copy1, and copy2 with what it contradicts
    assert {"copy1", "copy2"} < set(copies.index)
    assert set(copies["status"]) == {"duplicate"}
    assert not set(copies.index) & set(splits["id"])
    assert len(pd.read_csv(tmp_path / "one" / "failures.csv")) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["where.task=motif"], ["tasks.tsv.gz", "'motif' in column 'task'", "'other' (3 rows)"]),
        (["where.tusk=other"], ["tasks.tsv.gz", "no column 'tusk'", "'task'"]),
        (["columns.id=name"], ["tasks.tsv.gz", "no column 'name'", "columns.id=NAME"]),
        (["overlap=drop"], ["error, remove, allow", "'drop'"]),
        (["columns.nme=x"], ["columns.nme", "columns.label"]),
    ],
    ids=lambda x: x[0],
)
def test_wrong_names_of_columns_and_rows_are_named(
    arguments: list[str],
    words: list[str],
    pool: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [f"sequences={pool[0]}", f"labels={pool[1]}", f"out={tmp_path / 'out'}"]
    code = run("train", *given, *NAMES, *arguments, *QUICK)
    error = capsys.readouterr().err
    assert code == 2, error
    for word in words:
        assert word in error


def cut_at_a_block(path: Path) -> None:
    """Drop whole blocks from the end of a BGZF file: what is left still decompresses."""
    with open(path, "rb") as file:
        starts = [start for start, *_ in bgzf.BgzfBlocks(file)]
    path.write_bytes(path.read_bytes()[: starts[len(starts) // 2]])


BAD_FASTA = {
    "missing": (None, ["absent.fa"]),
    "empty": (b"", ["empty"]),
    "header only": (b">a\n", ["'a'"]),
    "leading text": (b"hello\n>a\nACGT\n", ["line 1"]),
    "duplicate ids": (b">a\nACGT\n>b\nAC\n>a\nGGTT\n", ["'a'", "1", "3"]),
    "protein": (b">mystery\nMKVLEFPQILEFPQ\n", ["protein", "mystery"]),
    "digits": (b">a\nACGT\n>b\nAC1GT\n", ["'b'", "3"]),
    "binary": (bytes(range(256)) * 4, [""]),
}


def test_records_without_labels_are_named(
    records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", f"sequences={records[0]}", f"out={tmp_path / 'o'}", *QUICK) == 2
    assert "labels=TABLE" in capsys.readouterr().err


def test_a_store_alone_is_enough(trained: Path, records: tuple[Path, Path], tmp_path: Path) -> None:
    store = f"store={trained / 'store'}"
    code = run("train", store, f"labels={records[1]}", f"out={tmp_path / 'o'}", "baselines=[]",
               *QUICK)  # fmt: skip
    assert code == 0
    ckpt = f"ckpt={tmp_path / 'o' / 'model.ckpt'}"
    assert run("predict", store, ckpt, f"out={tmp_path / 'p'}") == 0
    assert len(pd.read_csv(tmp_path / "p" / "predictions.tsv", sep="\t")) == 44


@pytest.mark.parametrize("case", BAD_FASTA, ids=str)
@pytest.mark.parametrize("verb", ["train", "predict"])
def test_bad_fasta_is_named(
    case: str,
    verb: str,
    trained: Path,
    records: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content, words = BAD_FASTA[case]
    fasta = tmp_path / ("absent.fa" if content is None else "bad.fa")
    if content is not None:
        fasta.write_bytes(content)
    given = (
        [f"labels={records[1]}", *QUICK] if verb == "train" else [f"ckpt={trained / 'model.ckpt'}"]
    )
    code = run(verb, f"sequences={fasta}", *given, f"out={tmp_path / 'out'}")
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ")
    assert fasta.name in error
    for word in words:
        assert word in error


@pytest.mark.parametrize("kind", ["gz", "bgz", "bgz at a block boundary"])
def test_truncated_files_are_named(
    kind: str,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import numpy as np

    letters = np.random.default_rng(0).choice(list("ACGT"), 300_000)
    text = f">a\n{''.join(letters)}\n".encode()
    path = tmp_path / f"cut.fa.{kind[:3].strip()}"
    with (bgzf.open if kind.startswith("bgz") else gzip.open)(path, "wb") as file:
        file.write(text)
    if kind.endswith("boundary"):
        cut_at_a_block(path)
    else:
        path.write_bytes(path.read_bytes()[:-1000])
    code = run(
        "predict", f"sequences={path}", f"ckpt={trained / 'model.ckpt'}", f"out={tmp_path / 'out'}"
    )
    error = capsys.readouterr().err
    assert code == 2, error
    assert path.name in error
    assert "truncated" in error or "cut" in error.replace(path.name, "") or "end" in error


def test_out_that_is_a_file_is_named(
    trained: Path, records: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(
        "predict", f"sequences={records[0]}", f"ckpt={trained / 'model.ckpt'}", f"out={records[1]}"
    )
    assert code == 2
    assert "is a file" in capsys.readouterr().err


def test_checkpoint_of_the_other_pipeline_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.pathology.__main__ import VERBS as SLIDES
    from pipelines.shared import cli

    code = cli.main(
        "pathology", SLIDES, ["predict", f"slides={tmp_path}", f"ckpt={trained / 'model.ckpt'}"]
    )
    assert code == 2
    error = capsys.readouterr().err
    assert "genomics" in error
    assert "python -m pipelines.genomics predict" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pattern=longformer"], ["longformer", "window_global"]),
        (["model=huge"], ["huge", "tiny"]),
        (["baselines=[lstm]"], ["lstm", "kmer"]),
        (["rc=both"], ["none, augment, average, equivariant", "'both'"]),
        (["rc=equivariant"], ["GlobalTokens(first=4)", "before the first base", "rc=average"]),
        (["rc=equivariant", "pattern=causal"], ["Causal()", "one side only"]),
        (["rc=equivariant", "tokenizer=kmer"], ["tokenizer=base", "cut differently"]),
        (["rc=average", "tokenizer=bpe"], ["tokenizer=base", "rc=augment"]),
        (
            ["rc=equivariant", "pattern=sliding_window", "stem_stride=3"],
            ["multiples of it", "272 bases"],
        ),
        (["labels=x.tsv"], ["sequences=FILE"]),
        (["data=sequences"], ["sequences=FILE", "store=FOLDER"]),
        (["window_overlap=500"], ["window_overlap"]),
        (["data.right_gap=[2,4]"], ["gaps must exceed"]),
        (["pattern.expression=SlidingWindow((2,3))"], ["2 radii", "1 axes"]),
        (["model.num_heads=3"], ["multiple of num_heads"]),
        (["model.pooling=median"], ["attention, mean, max", "'median'"]),
        (["model.head_norm=group"], ["layer or batch", "'group'"]),
        (["stem_stride=0"], ["stride", "at least 1"]),
        (["stem=cnn"], ["convolution or none", "'cnn'"]),
        (["stem=none", "stem_stride=2"], ["stem_stride=2", "stem=none need stem_stride=1"]),
    ],
    ids=lambda x: x[0],
)
def test_bad_commands_are_named(
    arguments: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("sequences", "labels")
    settings = QUICK if any(key in arguments[0] for key in given) else SMALL
    where = [f"out={tmp_path / 'o'}", f"data_root={tmp_path / 'd'}"]
    code = run("train", *arguments, *where, *settings)
    error = capsys.readouterr().err
    assert code == 2, error
    for word in words:
        assert word in error
