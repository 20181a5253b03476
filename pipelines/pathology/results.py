"""What `predict` writes of each case, at once, and of all of them in the end.

predictions.csv .parquet   a row per case: what the model says
survival.parquet           slide_id, (patient_id,) time, survival: the curve of each case
embeddings.parquet         slide_id, embedding: the vector that the model's head reads
tile_scores/SLIDE.zarr     attention and scores of every tile (`tile_scores`)
heatmaps/SLIDE.png .score.png
geojson/SLIDE.geojson      tiles with their scores, for QuPath
top_tiles/SLIDE/*.png      tiles with the highest scores
slides/NAME.json           a finished case, by which the run goes on
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from pipelines.pathology.heatmap import caption
from pipelines.pathology.sequences import Predicted
from pipelines.pathology.slides import SlideError, SlideFile
from pipelines.pathology.store import SlideFeatures, read_slide, slide_folder
from pipelines.pathology.survival import CoxSurvival, DiscreteSurvival, Survival
from pipelines.pathology.tile_scores import (
    TileScores,
    draw_scores,
    left_out,
    tile_scores,
    write_scores,
    write_tile_shapes,
    write_top_tiles,
)
from pipelines.pathology.tiling import TilePlan
from pipelines.shared.asides import aside_of
from pipelines.shared.objective import DECIMALS, Classification, Objective
from pipelines.shared.tables import Failure, write_table


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to write of single slides besides the tables."""

    heatmaps: bool
    geojson: bool
    tile_scores: bool
    top_tiles: int

    @property
    def scores(self) -> bool:
        """Whether anything is said of single tiles."""
        return self.heatmaps or self.geojson or self.tile_scores or self.top_tiles > 0


class Provenances(Protocol):
    """Knows what the features of slides are made from."""

    @property
    def provenances(self) -> dict[str, dict[str, object]]:
        """By slide id."""


@dataclass(frozen=True, slots=True)
class Results:
    """Write and find results in `out`; `slides` are the files, for tiles as pictures.

    `averages` says that the model does nothing but average tiles, with weights.
    """

    out: Path
    objective: Objective
    temperature: float
    by_patient: bool
    averages: bool
    wanted: Wanted
    store: Path
    slides: dict[str, SlideFile]
    plan: TilePlan | None

    def has(self, name: str, slides: tuple[str, ...], source: Provenances) -> bool:
        """Tell whether a case has a result, made from what its slides are now."""
        path = self._file(name)
        if not path.exists():
            return False
        held = json.loads(path.read_text(encoding="utf-8"))["provenances"]
        return bool(held) and all(source.provenances.get(key) == held[key] for key in held)

    def keep(self, case: Predicted, source: Provenances) -> Failure | None:
        """Write everything of a case, its JSON last; return what could not be drawn."""
        failure = None
        all_scores = self._scores(case) if self.wanted.scores else []
        for slide_id, scores in zip(case.slides, all_scores, strict=bool(all_scores)):
            slide = read_slide(slide_folder(self.store, slide_id))
            try:
                self._write_slide(slide, scores, case)
            except SlideError as error:  # the slide was read before: it has changed since
                failure = Failure(slide_id, str(self.store), *_plain(error))
        prediction = case.prediction
        assert prediction.embedding is not None, "networks of slides have one"
        _write_json(
            self._file(case.name),
            {
                "name": case.name,
                "slides": list(case.slides),
                "outputs": prediction.logits.double().tolist(),
                "embedding": prediction.embedding.tolist(),
                "provenances": {name: source.provenances.get(name) for name in case.slides},
            },
        )
        return failure

    def write_tables(self, names: list[str]) -> int:
        """Write the tables of all finished cases and return their number."""
        held = [json.loads(self._file(name).read_text(encoding="utf-8")) for name in names]
        if not held:
            return 0
        table = self._table(held)
        write_table(self.out / "predictions.csv", table)
        _write_parquet(self.out / "predictions.parquet", table)
        if isinstance(self.objective, DiscreteSurvival | CoxSurvival):
            _write_parquet(self.out / "survival.parquet", self._curves(self.objective, held))
        embeddings = pd.DataFrame(
            {
                "slide_id": table["slide_id"],
                "embedding": [np.array(item["embedding"], dtype=np.float32) for item in held],
            }
        )
        _write_parquet(self.out / "embeddings.parquet", embeddings)
        return len(held)

    def _table(self, held: list[dict[str, Any]]) -> pd.DataFrame:
        outputs = np.array([item["outputs"] for item in held], dtype=np.float64)
        table = pd.concat([self._names(held), self.objective.read(outputs)], axis=1)
        if isinstance(self.objective, Classification):
            scaled = self.objective.predictions(outputs / self.temperature, [0] * len(held))
            for column, name in enumerate(self.objective.classes):
                table[f"calibrated_{name}"] = scaled.probabilities[:, column].round(DECIMALS)
        return table

    def _curves(self, objective: Survival, held: list[dict[str, Any]]) -> pd.DataFrame:
        times, survival = objective.curve(np.array([item["outputs"] for item in held]))
        table = self._names(held)
        rows = table.loc[table.index.repeat(len(times))].reset_index(drop=True)
        return rows.assign(
            time=np.tile(times, len(held)), survival=survival.ravel().round(DECIMALS)
        )

    def _names(self, held: list[dict[str, Any]]) -> pd.DataFrame:
        table = pd.DataFrame({"slide_id": [";".join(item["slides"]) for item in held]})
        if self.by_patient:
            table["patient_id"] = [item["name"] for item in held]
        return table

    def _scores(self, case: Predicted) -> list[TileScores]:
        prediction = case.prediction
        assert prediction.contributions is not None, "asked to explain"
        said = self.objective.read(prediction.logits.double().numpy()[None]).iloc[0]
        added = prediction.contributions.double().numpy()
        if self.averages:
            added = left_out(prediction.attention.double().numpy(), added)
        parts = zip(
            case.of_slides(prediction.attention.numpy()), case.of_slides(added), strict=True
        )
        label = str(said.get("prediction", ""))
        return [tile_scores(self.objective, attention, added, label) for attention, added in parts]

    def _write_slide(self, slide: SlideFeatures, scores: TileScores, case: Predicted) -> None:
        wanted, slide_id = self.wanted, slide.slide_id
        if wanted.tile_scores:
            write_scores(self.out / "tile_scores" / f"{slide_id}.zarr", slide, scores)
        if wanted.heatmaps and slide.has_overview:
            said = self.objective.read(case.prediction.logits.double().numpy()[None]).iloc[0]
            title = caption(slide_id, said.to_dict())
            draw_scores(self.out / "heatmaps", slide, scores, title=title)
        if wanted.geojson:
            write_tile_shapes(self.out / "geojson" / f"{slide_id}.geojson", slide, scores)
        if wanted.top_tiles and self.plan is not None:
            file = self.slides[slide_id]
            write_top_tiles(
                self.out / "top_tiles" / slide_id,
                file.path,
                slide,
                scores,
                plan=self.plan,
                mpp=slide.mpp,
                count=wanted.top_tiles,
            )

    def _file(self, name: str) -> Path:
        return self.out / "slides" / f"{name}.json"


def _plain(error: SlideError) -> tuple[str, str, str]:
    return error.status, error.reason, error.remedy


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = aside_of(path)
    aside.write_text(json.dumps(content), encoding="utf-8")
    os.replace(aside, path)


def _write_parquet(path: Path, table: pd.DataFrame) -> None:
    aside = aside_of(path)
    table.to_parquet(aside, index=False)
    os.replace(aside, path)
