"""`python -m pipelines.genomics {train,predict} [KEY=VALUE ...]`."""

from collections.abc import Sequence

from pipelines.shared import cli
from pipelines.shared.cli import Verb

VERBS = {
    "train": Verb(
        summary="Train a sequence classifier on your sequences, or on built-in DNA, and score it.",
        config="genomics_train",
        function="pipelines.genomics.train:train",
        path_keys=("sequences", "labels", "out", "store", "data_root"),
        selects=dict.fromkeys(("sequences", "labels", "store"), "data=sequences"),
        examples=(
            "",
            "sequences=RECORDS.fa.gz labels=LABELS.tsv out=runs/mine",
            "pattern=bigbird model=base",
            "--multirun pattern=dense,sliding_window",
            "sequences=GENOMES.fa labels=LABELS.tsv experiment=whole_genomes",
            "sequences=POOL.fa.gz labels=TASKS.tsv.gz columns.id=record_id where.task=Vertebrates",
        ),
    ),
    "predict": Verb(
        summary="Predict the records of a file with a trained model.",
        config="genomics_predict",
        function="pipelines.genomics.predict:predict",
        path_keys=("sequences", "ckpt", "out", "store"),
        required=("ckpt",),
        examples=("sequences=RECORDS.fa.gz ckpt=runs/genomics/model.ckpt out=predictions",),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return cli.main("genomics", VERBS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
