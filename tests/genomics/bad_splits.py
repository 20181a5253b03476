"""Rows of test_bad_input.py about labels, splits, copies, lengths and training."""

from pathlib import Path

QUICK = ["logger=none", "trainer.progress=false", "epochs=1", "baselines=[]"]
SMALL = ["context=32", "window_overlap=0", "max_tokens=512"]
TRAIN = ["train", "sequences={input}", *QUICK, *SMALL]
BOTH = ["train", "sequences={folder}/x.fa", "labels={input}", *QUICK, *SMALL]
LETTERS = "ACGT"


def text_of(seed: int, length: int = 40) -> str:
    """Letters that no two seeds have in common."""
    state, letters = seed + 1, []
    for _ in range(length):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        letters.append(LETTERS[state >> 62])
    return "".join(letters)


def records(folder: Path, *, count: int = 12) -> Path:
    path = folder / "x.fa"
    path.write_text("".join(f">r{n}\n{text_of(n)}\n" for n in range(count)))
    return path


def labels(content: str):
    def make(folder: Path) -> Path:
        records(folder)
        path = folder / "labels.csv"
        path.write_text(content)
        return path

    return make


def rows(column: str = "", *, words=("a", "b"), count: int = 12, missing: str = "") -> str:
    lines = [f"id,label{',' + column if column else ''}"]
    for n in range(count):
        extra = {"": "", "split": f",{('train', 'val', 'test')[n // 2 % 3]}", "group": ",g"}[column]
        label = "" if missing == f"r{n}" else words[n % len(words)]
        lines.append(f"r{n},{label}{extra}")
    return "\n".join(lines) + "\n"


def gue(**tables: list[tuple[str, str]]):
    """A folder of a table for each split."""

    def make(folder: Path) -> Path:
        task = folder / "task"
        task.mkdir()
        for split, content in tables.items():
            lines = [f"{sequence},{label}" for sequence, label in content]
            (task / f"{split}.csv").write_text("\n".join(["sequence,label", *lines]) + "\n")
        return task

    return make


def items(first: int, count: int = 8, words: str = "01") -> list[tuple[str, str]]:
    return [(text_of(first + n), words[n % len(words)]) for n in range(count)]


def interval_folder(folder: Path) -> Path:
    path = folder / "sets"
    path.mkdir()
    (path / "x.csv").write_text("id,region,start,end,strand\n0,chr1,1,9,+\n")
    return path


def splits_table(content: str):
    def make(folder: Path) -> Path:
        records(folder)
        (folder / "labels.csv").write_text(rows())
        path = folder / "splits.tsv"
        path.write_text(content)
        return path

    return make


SPLIT_GIVEN = [
    "train", "sequences={folder}/x.fa", "labels={folder}/labels.csv", "splits={input}",
    *QUICK, *SMALL,
]  # fmt: skip
COPY = [(text_of(500), "0")]
OTHER_STRAND = [(text_of(500)[::-1].translate(str.maketrans("ACGT", "TGCA")), "0")]

ROWS_D = [
    # labels
    ("no labels at all", lambda f: records(f), TRAIN, 2,
     ["holds no labels", "labels=TABLE"]),
    ("an empty label", labels(rows(missing="r3")), BOTH, 2,
     ["labels.csv", "row 5", "label is empty"]),
    ("one class", labels(rows(words=("a",))), BOTH, 2,
     ["all 12 rows have the label 'a'", "two classes"]),
    ("an id that stands twice", labels(rows() + "r2,b\n"), BOTH, 2,
     ["'r2'", "rows 4, 14"]),
    ("labels of other records", labels(rows().replace("r", "q")), BOTH, 2,
     ["no record has a label", "'r0'", "'q0'"]),
    ("labels without a record", labels(rows() + "nowhere,a\n"), BOTH, 3,
     ["1 labels without a record: 'nowhere'", "no_record"]),
    ("records without a label", labels(rows(count=10)), BOTH, 3,
     ["2 records without a label: 'r10', 'r11'", "no_label"]),
    ("a label column of another name", labels(rows().replace("label", "class")), BOTH, 2,
     ["no column 'label'", "'class'", "columns.label=NAME"]),
    # splits
    ("a split of another word", labels(rows("split").replace("train", "fit")), BOTH, 2,
     ["split of 'r0' is 'fit'", "train, val or test"]),
    ("a group in two splits",
     labels("id,label,split,group\n" + "".join(
         f"r{n},{'ab'[n % 2]},{('train', 'val', 'test')[n // 2 % 3]},g{n // 4}\n"
         for n in range(12))),
     BOTH, 2, ["stand in more than one split", "group 'g0'", "keep all rows of a group"]),
    ("a class that is missing in train",
     labels("id,label,split\n" + "".join(
         f"r{n},{'c' if n == 11 else 'ab'[n % 2]},{'test' if n > 7 else 'train'}\n"
         for n in range(12))),
     BOTH, 2, ["no training row has the label 'c'"]),
    ("too few to split", labels(rows(count=2)), BOTH, 2, ["no row is left for"]),
    ("a copy in train and test", gue(train=[*items(0), *COPY], test=[*items(50), *COPY]), TRAIN, 2,
     ["1 pairs in different splits have the same sequence", "(train) and", "overlap=remove"]),
    ("a copy of the other strand",
     gue(train=[*items(0), *COPY], test=[*items(50), *OTHER_STRAND]), TRAIN, 2,
     ["1 pairs in different splits", "overlap=allow"]),
    ("a split table without all items", splits_table("id\tsplit\nr0\ttrain\n"), SPLIT_GIVEN, 2,
     ["no split for 11 of 12 items", "'r1'"]),
    ("a split table without splits", splits_table("id\tfold\nr0\t1\n"), SPLIT_GIVEN, 2,
     ["splits.tsv", "no column 'split'", "verb split"]),
    ("splits to check that are not there", lambda f: records(f),
     ["split", "sequences={input}", "by=given"], 2, ["has no splits", "by=given"]),
    ("groups that are not there", lambda f: records(f),
     ["split", "sequences={input}", "by=group"], 2, ["by=group needs groups"]),
    ("a way to split that there is not", lambda f: records(f),
     ["split", "sequences={input}", "by=family"], 2, ["by must be record", "'family'"]),
    ("a chromosome that is not there", lambda f: records(f),
     ["split", "sequences={input}", "by=chromosome", "test=chr8"], 2,
     ["test=chr8 matches no chromosome", "r0, r1"]),
    ("a pattern that is none", lambda f: records(f),
     ["split", "sequences={input}", "by=chromosome", "test=r(8"], 2, ["neither a name nor"]),
    ("a chromosome in test and val", lambda f: records(f),
     ["split", "sequences={input}", "by=chromosome", "test=r8", "val=r8,r9"], 2,
     ["'r8' is named by test= and by val="]),
    ("a policy that there is not", lambda f: records(f),
     ["split", "sequences={input}", "overlap=ignore"], 2, ["error, remove, allow", "'ignore'"]),
    # inspect
    ("a folder without intervals by split", interval_folder,
     ["inspect", "intervals={input}"], 2, ["no tables of intervals by split", "train/CLASS.csv"]),
    ("nothing to inspect", lambda f: records(f), ["inspect"], 2, ["sequences="]),
    # lengths and training
    ("windows that share too much", labels(rows()), [*BOTH, "window_overlap=32"], 2,
     ["window_overlap must be", "context=32"]),
    ("an objective that DNA does not have", labels(rows()), [*BOTH, "task=survival_cox"], 2,
     ["task=survival_cox", "task=classification"]),
    ("tokens of words and of strides", labels(rows()),
     [*BOTH, "tokenizer=kmer", "stem_stride=4"], 2, ["stem_stride", "1"]),
    ("words too long", labels(rows()), [*BOTH, "tokenizer=kmer", "tokenizer.k=12"], 2,
     ["tokenizer.k lies in 3 to 8"]),
    # real files
    ("real: a class that no row has", "mldsp_mito_pool.fasta.gz",
     ["split", "sequences={input}", "labels={data}/mldsp_labels.tsv.gz", "columns.id=record_id",
      "columns.label=class", "where.task=Vertebrate"], 2,
     ["'Vertebrate' in column 'task'", "did you mean 'Vertebrates'"]),
    ("real: a benchmark that is not there", "gb_intervals",
     ["inspect", "intervals={input}", "only=human_enhancers"], 2,
     ["only=human_enhancers", "human_enhancers_ensembl"]),
    ("real: intervals without bases to cluster",
     "gb_intervals/human_enhancers_cohn__test__positive.csv.gz",
     ["split", "intervals={input}", "by=cluster"], 2,
     ["intervals have no bases", "sequences=GENOME"]),
    ("real: a chromosome that yeast has not", "yeast_R64-1-1.dna.toplevel.fa.gz",
     ["split", "sequences={input}", "by=chromosome", "test=chrIV"], 2,
     ["test=chrIV matches no chromosome", "II"]),
]  # fmt: skip
