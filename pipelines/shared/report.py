"""The report of an assessment: a page that holds everything itself, and lines for a terminal."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from pipelines.shared import plots
from pipelines.shared.asides import aside_of
from pipelines.shared.assessment import HEADLINES, Assessment, Scores
from pipelines.shared.metrics import LOWER_IS_BETTER, TITLES, Score, format_score, format_table
from pipelines.shared.tables import align

NO_BREAK = "\N{NO-BREAK SPACE}"
_TEMPLATE = "report.html"
_MOST_TRACKS = 8


@dataclass(frozen=True, slots=True)
class Words:
    """What a row and a group are called, one and many, and each model's title."""

    rows: str
    groups: str
    models: Mapping[str, str]

    def title(self, model: str) -> str:
        """Return what a model is called where people read it."""
        return self.models.get(model, model)


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the page; `note` stands below it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure of the page."""

    title: str
    uri: str
    note: str = ""


def summarise(found: Assessment, words: Words) -> str:
    """Return what a terminal shows: headline scores, differences, calibration, external test."""
    names = HEADLINES[found.task]
    titled = {words.title(name): scores for name, scores in found.scores.items()}
    parts = [f"{count_rows(found, words)}\n{format_table(titled, names=names)}"]
    if found.differences:
        parts.append(
            f"difference to {words.title(str(found.reference))}, paired\n"
            + _difference_table(found.differences, words, names)
        )
    if found.calibration:
        rows = [["model", "ECE", "ECE after temperature", "temperatures"]]
        rows += [
            [
                words.title(name),
                format_score(item.before),
                format_score(item.after),
                " ".join(f"{value:.2f}" for value in item.temperatures),
            ]
            for name, item in found.calibration.items()
        ]
        parts.append(align(rows))
    if found.external is not None:
        outside = {words.title(name): scores for name, scores in found.external.scores.items()}
        parts.append(
            f"external test, {found.external.count:,} {words.rows}, ensembles of the folds\n"
            + format_table(outside, names=names)
        )
    if len(next(iter(found.by_fold.values()))[names[0]]) > 1:
        rows = [["standard deviation over the folds", *(TITLES[name] for name in names)]]
        rows += [
            [words.title(model), *(_plain(spread_over_folds(scores[name])) for name in names)]
            for model, scores in found.by_fold.items()
        ]
        parts.append(align(rows))
    if found.by_target:
        table = _target_table(found, words)
        cells = [[cell.replace(NO_BREAK, " ") for cell in row] for row in table.rows]
        parts.append(f"{table.title}\n{align([table.header, *cells])}")
    for column, values in found.subgroups.items():
        rows = [[column, words.rows, *(words.title(name) for name in found.scores)]]
        rows += [
            [value, f"{group.count:,}", *(format_score(s[names[0]]) for s in group.scores.values())]
            for value, group in values.items()
        ]
        parts.append(f"{TITLES[names[0]]} by {column}\n{align(rows)}")
    return "\n\n".join(parts)


def count_rows(found: Assessment, words: Words) -> str:
    """Say how much was tested and how intervals came about."""
    folds = len(next(iter(found.tested.values())))
    groups = f" of {found.num_groups:,} {words.groups}" if words.rows != words.groups else ""
    over = f" in {folds} folds; scores within folds, averaged" if folds > 1 else ""
    return f"{found.num_rows:,} {words.rows}{groups}{over}; 95 % intervals over {words.groups}"


def write_report(
    path: Path,
    found: Assessment,
    *,
    title: str,
    words: Words,
    facts: Mapping[str, str],
    notes: list[str],
    beside: Mapping[str, Assessment] | None = None,
) -> None:
    """Write the page aside and rename it: tables and figures, no script, nothing from elsewhere.

    `facts` are shown at the top, `notes` at the end. `beside` holds assessments of the same models
    on a part of the rows, by what it is ("without leaking test records"): tables of their scores,
    differences and subgroups stand behind the first ones.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = environment.get_template(_TEMPLATE).render(
        title=title,
        lead=count_rows(found, words),
        facts=facts,
        tables=_tables(found, words, beside or {}),
        pictures=_pictures(found, words),
        notes=[*notes, *_method(found, words)],
    )
    aside = aside_of(path)
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _tables(found: Assessment, words: Words, beside: Mapping[str, Assessment]) -> list[Table]:
    tables = [_score_table("Scores", found.scores, words)]
    tables += [
        _score_table(f"Scores {part}", other.scores, words) for part, other in beside.items()
    ]
    tables += _difference_tables(found, words)
    for part, other in beside.items():
        tables += _difference_tables(other, words, part=f" {part}")
    if found.external is not None:
        count = f"{found.external.count:,} {words.rows}"
        tables.append(
            _score_table(
                f"External test: {count}", found.external.scores, words,
                note="Predictions of all folds' models, averaged; none has seen these "
                f"{words.groups}.",
            )
        )  # fmt: skip
    if found.calibration:
        rows = [
            [words.title(name), _cell(item.before), _cell(item.after),
             ", ".join(f"{value:.2f}" for value in item.temperatures)]
            for name, item in found.calibration.items()
        ]  # fmt: skip
        header = ["model", "ECE", "ECE after scaling", "temperatures"]
        note = "One temperature per fold, fitted on its validation rows."
        tables.append(Table("Calibration", header, rows, note))
    if found.thresholds:
        rows = [
            [words.title(name), ", ".join(f"{value:.3f}" for value in values)]
            for name, values in found.thresholds.items()
        ]
        what = found.classes[1] if found.classes else "the label"
        tables.append(Table("Thresholds", ["model", f"probability of {what}"], rows))
    if found.by_target:
        tables += [_target_table(found, words), _each_target_table(found, words)]
    for part, other in {"": found, **beside}.items():
        tables += [_subgroup_table(column, other, words, part) for column in other.subgroups]
    tables.append(_fold_table(found, words))
    return tables


def _difference_tables(found: Assessment, words: Words, *, part: str = "") -> list[Table]:
    """Differences to the reference, if there is one; `part` says of which rows."""
    if not found.differences:
        return []
    reference = str(found.reference)
    lower = [TITLES[name] for name in found.scores[reference] if name in LOWER_IS_BETTER]
    note = f"Below zero is better for {', '.join(lower)}." if lower else ""
    title = f"Difference to {words.title(reference)}{part}"
    return [_score_table(title, found.differences, words, signed=True, note=note)]


def _score_table(
    title: str,
    scores: Mapping[str, Scores],
    words: Words,
    *,
    signed: bool = False,
    note: str = "",
) -> Table:
    """A row per score, a column per model: narrow enough for a phone."""
    named = list(next(iter(scores.values())))
    rows = [
        [TITLES.get(name, name), *(_cell(s[name], signed=signed) for s in scores.values())]
        for name in named
    ]
    return Table(title, ["", *(words.title(model) for model in scores)], rows, note)


def _subgroup_table(column: str, found: Assessment, words: Words, part: str) -> Table:
    name = HEADLINES[found.task][0]
    rows = [
        [value, f"{group.count:,}", *(_cell(s[name]) for s in group.scores.values())]
        for value, group in found.subgroups[column].items()
    ]
    header = [column, words.rows, *(words.title(model) for model in found.scores)]
    return Table(f"{TITLES[name]} by {column} {part}".rstrip(), header, rows)


def _target_table(found: Assessment, words: Words) -> Table:
    """A row per label or track."""
    name = HEADLINES[found.task][0]
    rows = [
        [target, *(_cell(scores[name]) for scores in models.values())]
        for target, models in found.by_target.items()
    ]
    kind = _kind(found)
    header = [kind, *(words.title(model) for model in found.scores)]
    return Table(f"{TITLES[name]} by {kind}", header, rows)


def _each_target_table(found: Assessment, words: Words) -> Table:
    """All scores of the first model, a row per label or track."""
    model = next(iter(found.scores))
    each = {target: models[model] for target, models in found.by_target.items()}
    names = list(next(iter(each.values())))
    rows = [[target, *(_cell(scores[name]) for name in names)] for target, scores in each.items()]
    header = [_kind(found), *(TITLES.get(name, name) for name in names)]
    return Table(f"Scores by {_kind(found)}, {words.title(model)}", header, rows)


def _kind(found: Assessment) -> str:
    return "label" if found.task == "multilabel" else "track"


def _fold_table(found: Assessment, words: Words) -> Table:
    name = HEADLINES[found.task][0]
    each = {model: scores[name] for model, scores in found.by_fold.items()}
    counts = [len(fold) for fold in next(iter(found.tested.values()))]
    rows = [
        [str(number), f"{count:,}", *(_plain(values[number]) for values in each.values())]
        for number, count in enumerate(counts)
    ]
    if len(counts) > 1:
        rows.append(["spread", "", *(_plain(spread_over_folds(v)) for v in each.values())])
    header = ["fold", words.rows, *(words.title(model) for model in each)]
    return Table(f"{TITLES[name]} by fold", header, rows)


def spread_over_folds(values: Sequence[float | None]) -> float | None:
    """Standard deviation of a score over the folds (n - 1); None of fewer than two."""
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 else None


def _pictures(found: Assessment, words: Words) -> list[Picture]:
    titled = {words.title(name): folds for name, folds in found.tested.items()}
    name, folds = next(iter(found.tested.items()))
    first = words.title(name)
    drawn: dict[str, Figure] = {}
    if found.task == "classification":
        drawn = {
            "ROC": plots.draw_roc(titled),
            "Precision and recall": plots.draw_precision_recall(titled),
            f"Confusion, {first}": plots.draw_confusion(folds),
            f"Calibration, {first}": plots.draw_calibration(folds, found.calibrated.get(name, [])),
        }
    elif found.task == "multilabel":
        drawn = {
            "ROC, mean over the labels": plots.draw_roc(titled),
            "Precision and recall, mean over the labels": plots.draw_precision_recall(titled),
        }
    elif found.task == "tracks":
        drawn = {
            f"Predicted and true means of stretches, {target}": plots.draw_values(folds, target)
            for target in list(found.by_target)[:_MOST_TRACKS]
        }
    elif found.task == "survival":
        drawn = {f"Survival by risk, {first}": plots.draw_kaplan_meier(folds)}
    else:
        drawn = {f"Predicted and true, {first}": plots.draw_values(folds)}
    return [Picture(title, plots.data_uri(plots.to_svg(figure))) for title, figure in drawn.items()]


def _method(found: Assessment, words: Words) -> list[str]:
    """Say how the figures came about."""
    notes = [
        f"Scores are computed within each fold, on its own test {words.rows}, and averaged over "
        "the folds. Intervals are percentiles (2.5, 97.5) of resamples of the "
        f"{words.groups}, centred on the value; differences use the same resamples for both "
        f"models. They speak of other {words.groups} under these trained models; the table by "
        "fold shows how models differ."
    ]
    if found.thresholds:
        notes.append(
            "The threshold of each fold has the largest Youden's J (sensitivity + specificity - 1) "
            "on its validation rows, which is the largest balanced accuracy, unless it was given."
        )
    if found.task == "classification":
        notes.append(
            "AUROC, AUPRC and F1 are of the second of two classes, else means over the classes. "
            "ECE: 15 bins of the confidence in the most probable class (Guo et al. 2017)."
        )
    if found.task == "multilabel":
        notes.append(
            "Scores are means over the labels that define them (a label that is on all rows or on "
            "none has no AUROC); exact match is the share of rows with every label right."
        )
    if found.task == "tracks":
        notes.append(
            "Scores of a track are over all bases that it says something of, averaged over the "
            "tracks. Rows are stretches of bases, which is what intervals resample; Spearman's "
            "correlation of a part of them takes the ranks among all."
        )
    if found.task == "survival":
        notes.append(
            "c-index of Harrell by lifelines on the negative risk. Risk groups are cut at the "
            "median risk of the fold's training rows where it is known, else of the test rows."
        )
    return notes


def _difference_table(
    differences: Mapping[str, Scores], words: Words, names: tuple[str, ...]
) -> str:
    rows = [["model", *(TITLES[name] for name in names)]]
    rows += [
        [words.title(model), *(format_score(scores[name], signed=True) for name in names)]
        for model, scores in differences.items()
    ]
    return align(rows)


def _cell(score: Score, *, signed: bool = False) -> str:
    """Return a score that keeps to one line, or a reason that need not."""
    text = format_score(score, signed=signed)
    return text if score.value is None else text.replace(" ", NO_BREAK)


def _plain(value: float | None) -> str:
    return format_score(Score(value, None, None, "undefined"))
