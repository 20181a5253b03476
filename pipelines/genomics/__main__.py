"""`python -m pipelines.genomics VERB [KEY=VALUE ...]`; without a verb it lists them."""

from collections.abc import Sequence

from pipelines.shared import cli
from pipelines.shared.cli import Verb

_TRAINING_PATHS = ("sequences", "intervals", "labels", "splits", "out", "store")

VERBS = {
    "ingest": Verb(
        summary="Write sequences of any format into a store; check and count every letter.",
        config="genomics_ingest",
        function="pipelines.genomics.ingest:run",
        path_keys=("sequences", "store"),
        required=("sequences",),
        examples=(
            "sequences=GENOME.fa.gz store=genome",
            "sequences=TABLE.csv columns.sequence=seq dry_run=true",
            "sequences=GUE/prom_core_all store=core reading=lenient",
            "sequences=splice.data columns.label=1 columns.id=2 columns.sequence=3",
        ),
    ),
    "train": Verb(
        summary="Train a network on sequences (classes, labels, numbers, tracks) and score it.",
        config="genomics_train",
        function="pipelines.genomics.train:train",
        path_keys=(*_TRAINING_PATHS, "data_root", "pretrained"),
        selects=dict.fromkeys(
            ("sequences", "intervals", "labels", "splits", "store"), "data=sequences"
        ),
        examples=(
            "",
            "sequences=RECORDS.fa.gz labels=LABELS.tsv out=runs/mine",
            "pattern=bigbird model=base",
            "--multirun pattern=dense,sliding_window",
            "sequences=TABLE.csv columns.label=VALUE task=regression",
            "sequences=RECORDS.fa labels=TABLE.csv task=multilabel task.columns=[A,B]",
            "sequences=GENOME.fa splits=splits.tsv task=tracks task.files=[a.bw,b.bedgraph]",
            "sequences=GENOMES.fa labels=LABELS.tsv experiment=whole_genomes",
            "sequences=POOL.fa.gz labels=TASKS.tsv.gz columns.id=record_id where.task=Vertebrates",
        ),
    ),
    "pretrain": Verb(
        summary="Train a network without labels, on hidden or next bases, beside Markov models.",
        config="genomics_pretrain",
        function="pipelines.genomics.pretrain:pretrain",
        path_keys=("sequences", "out", "store"),
        examples=(
            "sequences=GENOME.fa.gz val=chrIV out=runs/backbone",
            "sequences=GENOMES.fa.gz model=small context=4096 soft_mask_weight=0.1 mask_span=3",
            "sequences=GENOME.fa guess=causal stem=none "
            "pattern.expression='SlidingWindow(radius=64) & Causal()'",
        ),
    ),
    "crossval": Verb(
        summary="Train and test every fold with every seed, compare the models, write a report.",
        config="genomics_crossval",
        function="pipelines.genomics.crossval:crossval",
        path_keys=(*_TRAINING_PATHS, "data_root", "pretrained"),
        selects=dict.fromkeys(
            ("sequences", "intervals", "labels", "splits", "store"), "data=sequences"
        ),
        examples=(
            "sequences=RECORDS.fa.gz labels=LABELS.tsv by=cluster out=runs/folds",
            "sequences=GUE/prom_core_all scheme=given seeds=[0,1,2] overlap=allow",
            "fold=$SLURM_ARRAY_TASK_ID sequences=RECORDS.fa.gz labels=LABELS.tsv",
        ),
    ),
    "evaluate": Verb(
        summary="Score saved predictions, with and without what leaks; write a report.",
        config="genomics_evaluate",
        function="pipelines.genomics.evaluating:evaluate",
        path_keys=("run", "against", "labels", "leaks", "out"),
        required=("run",),
        examples=(
            "run=runs/genomics out=report",
            "run=runs/folds against=runs/other_folds",
            "run=predictions.csv leaks=report/leaks.csv",
        ),
    ),
    "inspect": Verb(
        summary="Report counts, lengths, GC, copies, label conflicts, and leaks between splits.",
        config="genomics_inspect",
        function="pipelines.genomics.inspecting:inspect",
        path_keys=("sequences", "intervals", "labels", "splits", "out", "store"),
        examples=(
            "sequences=GUE/prom_core_all out=report",
            "store=STORE labels=LABELS.tsv splits=splits/splits.tsv",
            "intervals=genomic_benchmarks/datasets",
        ),
    ),
    "split": Verb(
        summary="Split records or intervals so that nothing overlaps between train, val and test.",
        config="genomics_split",
        function="pipelines.genomics.splitting:split",
        path_keys=("sequences", "intervals", "labels", "splits", "out", "store", "test", "val"),
        examples=(
            "sequences=RECORDS.fa.gz labels=LABELS.tsv by=cluster out=splits",
            "intervals=PEAKS.bed by=chromosome test=chr8,chr9 val=chr7",
            "sequences=GENOME.fa by=chromosome test='chr(8|9)'",
            "sequences=GUE/prom_core_all by=given dry_run=true",
        ),
    ),
    "predict": Verb(
        summary="Predict records or intervals with a trained model.",
        config="genomics_predict",
        function="pipelines.genomics.predict:predict",
        path_keys=("sequences", "ckpt", "out", "store", "intervals"),
        required=("ckpt",),
        examples=(
            "sequences=RECORDS.fa.gz ckpt=runs/genomics/model.ckpt out=predictions",
            "sequences=GENOME.fa intervals=PEAKS.narrowPeak width=500 ckpt=MODEL.ckpt",
            "sequences=GENOME.fa ckpt=MODEL.ckpt outputs=[tsv,parquet,embeddings,bigwig]",
        ),
    ),
    "embed": Verb(
        summary="Turn sequences into vectors with a trained or pretrained network.",
        config="genomics_embed",
        function="pipelines.genomics.embedding:embed",
        path_keys=("sequences", "intervals", "ckpt", "out", "store"),
        required=("ckpt",),
        examples=(
            "sequences=RECORDS.fa.gz ckpt=runs/backbone/model.ckpt out=vectors",
            "sequences=GENOME.fa intervals=GENES.bed per=base ckpt=MODEL.ckpt",
        ),
    ),
    "variants": Verb(
        summary="Score the variants of a VCF with a trained model: a table, and the VCF again.",
        config="genomics_variants",
        function="pipelines.genomics.effects:variants",
        path_keys=("sequences", "variants", "ckpt", "out", "store"),
        required=("variants", "ckpt"),
        examples=(
            "sequences=GENOME.fa variants=CALLS.vcf.gz ckpt=runs/genomics/model.ckpt out=scores",
            "store=STORE variants=CALLS.vcf ckpt=MODEL.ckpt check_ref=warn",
        ),
    ),
    "saliency": Verb(
        summary="Map which bases a score hangs on: mutagenesis, gradients, sequence logos.",
        config="genomics_saliency",
        function="pipelines.genomics.saliency:saliency",
        path_keys=("sequences", "intervals", "ckpt", "out", "store"),
        required=("ckpt",),
        examples=(
            "sequences=PROMOTERS.fa ckpt=runs/genomics/model.ckpt out=maps",
            "sequences=GENOME.fa intervals=PEAKS.narrowPeak width=500 focus=100 ckpt=MODEL.ckpt",
        ),
    ),
    "export": Verb(
        summary="Write sequences, intervals cut from them, or checked variants as files.",
        config="genomics_export",
        function="pipelines.genomics.exporting:export",
        path_keys=("sequences", "out", "store", "intervals", "variants"),
        examples=(
            "store=runs/ingest/store out=fasta",
            "sequences=GENOME.fa.gz intervals=GENES.gff.gz feature=CDS out=coding",
            "sequences=GENOME.fa.gz variants=CALLS.vcf.gz out=checked",
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return cli.main("genomics", VERBS, argv)


if __name__ == "__main__":
    raise SystemExit(main())
