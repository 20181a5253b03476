"""`python -m pipelines.pathology VERB [KEY=VALUE ...]`."""

from pipelines.shared.cli import Verb, main

VERBS = {
    "train": Verb(
        summary="Train a slide classifier on your slides, or on built-in ones, and score it.",
        config="pathology_train",
        function="pipelines.pathology.train:train",
        path_keys=(
            "slides",
            "root",
            "labels",
            "splits",
            "out",
            "features",
            "tiles",
            "data_root",
            "encoder.weights",
        ),
        selects={"slides": "data=slides", "labels": "data=slides"},
        examples=(
            "",
            "slides=SLIDES labels=SLIDES/labels.csv out=runs/mine",
            "features=runs/pathology_import/features labels=LABELS.csv out=runs/imported",
            "slides=SLIDES labels=LABELS.csv encoder=stats_grey pattern=bigbird model=small",
            "features=FEATURES labels=LABELS.csv task=survival_cox unit=patient splits=SPLITS.csv",
            "features=FEATURES labels=LABELS.csv model=abmil baselines=[mean,clam_sb]",
            "data=synthetic_far --multirun pattern=sliding_window,window_global",
            "'pattern.expression=SlidingWindow(radius=3) | GlobalTokens(first=2)'",
        ),
    ),
    "split": Verb(
        summary="Split patients into train, validation and test: tables for train and crossval.",
        config="pathology_split",
        function="pipelines.pathology.splitting:split",
        path_keys=("labels", "slides", "splits", "features", "out"),
        required=("labels",),
        examples=(
            "labels=LABELS.csv dry_run=true",
            "labels=LABELS.csv scheme=site site=hospital folds=4 out=splits",
            "labels=LABELS.csv scheme=monte_carlo folds=10 external.cohort=later out=splits",
            "labels=LABELS.csv splits=CLAM/splits/task_1_100 out=splits",
        ),
    ),
    "crossval": Verb(
        summary="Train and test on every fold beside the baselines; intervals and a report.",
        config="pathology_crossval",
        function="pipelines.pathology.crossval:crossval",
        path_keys=(
            "slides",
            "root",
            "labels",
            "out",
            "features",
            "tiles",
            "splits",
            "data_root",
            "encoder.weights",
        ),
        selects={"slides": "data=slides", "labels": "data=slides"},
        examples=(
            "experiment=arrangement_near",
            "features=FEATURES labels=LABELS.csv folds=5 out=runs/folds",
            "features=FEATURES labels=LABELS.csv splits=CLAM/splits/task_1_100 out=runs/clam",
            "slides=SLIDES labels=LABELS.csv subgroups=[site,sex] external.cohort=later",
            "features=FEATURES labels=LABELS.csv fold=$SLURM_ARRAY_TASK_ID out=SHARED",
        ),
    ),
    "evaluate": Verb(
        summary="Score saved predictions: intervals, differences, subgroups, calibration, report.",
        config="pathology_evaluate",
        function="pipelines.pathology.evaluating:evaluate",
        path_keys=("run", "against", "labels", "out"),
        required=("run",),
        examples=(
            "run=runs/folds labels=LABELS.csv subgroups=[site,sex] out=runs/scores",
            "run=runs/folds against=runs/other_folds out=runs/compared",
            "run=predictions.csv score_by=slide",
        ),
    ),
    "predict": Verb(
        summary="Predict a folder of slides: a table, heatmaps, and a list of what failed.",
        config="pathology_predict",
        function="pipelines.pathology.predict:predict",
        path_keys=("slides", "root", "ckpt", "out", "features", "tiles", "patients"),
        required=("ckpt",),
        examples=(
            "slides=SLIDES ckpt=runs/pathology/model.ckpt out=predictions",
            "features=runs/pathology_import/features ckpt=runs/imported/model.ckpt out=predictions",
        ),
    ),
    "heatmap": Verb(
        summary="Draw the tile scores that predict kept: any class, one scale, sharper pictures.",
        config="pathology_heatmap",
        function="pipelines.pathology.drawing:draw",
        path_keys=("predictions", "features", "slides", "out"),
        required=("predictions",),
        examples=(
            "predictions=predictions scores=[attention] same_scale=true out=heatmaps",
            "predictions=predictions slides=SLIDES mpp=2 only=[SLIDE] out=heatmaps",
        ),
    ),
    "tile": Verb(
        summary="Find the tissue of slides and lay tiles over it; previews, outlines for QuPath.",
        config="pathology_tile",
        function="pipelines.pathology.tile:tile",
        path_keys=("slides", "root", "out", "outlines"),
        required=("slides",),
        examples=(
            "slides=SLIDES dry_run=true",
            "slides=SLIDES.xlsx columns.slide_id=Case tile_um=256 mpp=1.142857 out=tiles",
            "slides=SLIDES out=tiles outlines=EDITED leave_out=[pen,dark,blur]",
        ),
    ),
    "embed": Verb(
        summary="Turn slides into tile features; several machines may share the work.",
        config="pathology_embed",
        function="pipelines.pathology.embed:embed",
        path_keys=("slides", "root", "out", "features", "tiles", "encoder.weights"),
        required=("slides",),
        examples=(
            "slides=SLIDES dry_run=true",
            "slides=SLIDES encoder=uni encoder.weights=UNI/pytorch_model.bin out=runs/uni",
            "slides=SLIDES.csv columns.slide_id=Case mpp=0.25 features=SHARED worker=2/4",
            "slides=SLIDES --multirun encoder=stats,stats_grey",
        ),
    ),
    "import": Verb(
        summary="Import tile features of TRIDENT, CLAM, STAMP, GigaPath or slide2vec.",
        config="pathology_import",
        function="pipelines.pathology.importing:import_features",
        path_keys=("source", "out", "features", "patches", "slides", "mpps"),
        required=("source",),
        examples=(
            "source=trident_job/20x_256px_0px_overlap/features_uni_v1 mpps=mpp.csv dry_run=true",
            "source=CLAM/FEATURES slides=SLIDES encoder_name=resnet50 snap=true",
            "source=features.h5 unit=level0_px tile=512 mpp=0.25",
        ),
    ),
    "export": Verb(
        summary="Export stored slides: TRIDENT's HDF5, tensors, or tiles for QuPath.",
        config="pathology_export",
        function="pipelines.pathology.exporting:export_features",
        path_keys=("features", "out"),
        required=("features",),
        examples=(
            "features=runs/mine/features out=exported",
            "features=runs/mine/features format=geojson out=qupath",
        ),
    ),
    "scale": Verb(
        summary="Time a training step and its memory against the number of tiles of a slide.",
        config="pathology_scale",
        function="pipelines.pathology.scale:scale",
        path_keys=("out", "features"),
        examples=("", "trainer=cpu model=tiny tiles=[500,1000] num_features=64"),
    ),
}

HEALTH = "pipelines.pathology.health"

if __name__ == "__main__":
    raise SystemExit(main("pathology", VERBS))
