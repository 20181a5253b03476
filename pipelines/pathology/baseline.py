"""What models are compared with; what colour alone tells."""

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pipelines.pathology.store import SlideFeatures

BASELINES = {
    "mean": "mean pooling",
    "max": "max pooling",
    "abmil": "attention pooling (ABMIL)",
    "gated_abmil": "gated attention pooling (ABMIL)",
    "clam_sb": "CLAM, single branch",
    "dense": "same encoder, every tile sees every tile",
    "no_attention": "same encoder, attention off",
    "shuffled": "same encoder, positions shuffled",
    "window": "same encoder, window alone",
    "colour": "slide colour, logistic regression",
}

CLASSES_ONLY = ("clam_sb", "colour")
"""Of the baselines: no numbers and no survival."""


def colour_numbers(slide: SlideFeatures) -> NDArray[np.float64]:
    """Mean and spread of R, G and B over the slide's tissue, from its overview [6]."""
    pixels = slide.overview()[slide.tissue_mask()].astype(np.float64)
    return np.concatenate([pixels.mean(0), pixels.std(0)])


def fit_colour_baseline(
    train: list[list[SlideFeatures]],
    targets: list[int],
    test: list[list[SlideFeatures]],
    *,
    num_classes: int,
) -> NDArray[np.float64]:
    """Logistic regression on `colour_numbers`; return a probability per test case and class.

    A case is a slide, or a patient's slides, whose numbers are averaged.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5_000))
    model.fit(_numbers_of(train), targets)
    found = model.predict_proba(_numbers_of(test))
    probabilities = np.zeros((len(test), num_classes))
    probabilities[:, model.classes_] = found
    return probabilities


def _numbers_of(cases: list[list[SlideFeatures]]) -> NDArray[np.float64]:
    return np.stack([np.mean([colour_numbers(slide) for slide in case], 0) for case in cases])
