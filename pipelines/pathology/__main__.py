"""`python -m pipelines.pathology {train,predict,scale} [KEY=VALUE ...]`."""

from pipelines.shared.cli import Verb, main

VERBS = {
    "train": Verb(
        summary="Train a slide classifier on your slides, or on built-in ones, and score it.",
        config="pathology_train",
        function="pipelines.pathology.train:train",
        path_keys=("slides", "labels", "out", "features", "data_root", "encoder.weights"),
        selects={"slides": "data=slides"},
        examples=(
            "",
            "slides=SLIDES labels=SLIDES/labels.csv out=runs/mine",
            "slides=SLIDES labels=LABELS.csv encoder=stats_grey pattern=bigbird model=small",
            "data=synthetic_far --multirun pattern=sliding_window,window_global",
            "'pattern.expression=SlidingWindow(radius=3) | GlobalTokens(first=2)'",
        ),
    ),
    "predict": Verb(
        summary="Predict a folder of slides: a table, heatmaps, and a list of what failed.",
        config="pathology_predict",
        function="pipelines.pathology.predict:predict",
        path_keys=("slides", "ckpt", "out", "features"),
        required=("slides", "ckpt"),
        examples=("slides=SLIDES ckpt=runs/pathology/model.ckpt out=predictions",),
    ),
    "scale": Verb(
        summary="Time a training step and its memory against the number of tiles of a slide.",
        config="pathology_scale",
        function="pipelines.pathology.scale:scale",
        path_keys=("out", "features"),
        examples=("", "trainer=cpu model=tiny tiles=[500,1000] num_features=64"),
    ),
}

if __name__ == "__main__":
    raise SystemExit(main("pathology", VERBS))
