"""What came out: a table and a picture."""

from pathlib import Path
from statistics import mean

from sparse_core.recall.training import Result, Settings


def write_table(found: dict[str, list[Result]], settings: Settings, out: Path) -> None:
    """Write accuracy by distance, mean over seeds and the range, beside the cost."""
    task = settings.task
    distances = [f"{d:,}" for d in task.distances]
    seeds = max(map(len, found.values()))
    lines = [
        f"Share of questions answered, by distance in tokens; {seeds} seed(s), sequences "
        f"of {task.length:,} tokens, {settings.steps} steps. "
        f"Guessing gives {1 / task.num_values:.3f}.",
        "",
        "| pattern | keys a query | s a step | " + " | ".join(distances) + " |",
        "|---|--:|--:|" + "--:|" * len(distances),
    ]
    for name, results in found.items():
        cells = [f"{mean(r.keys_per_query for r in results):,.0f}"]
        cells.append(f"{mean(r.seconds_per_step for r in results):.3f}")
        for distance in map(str, task.distances):
            shares = [r.accuracy[distance] for r in results]
            spread = f" ({min(shares):.2f} to {max(shares):.2f})" if len(shares) > 1 else ""
            cells.append(f"{mean(shares):.2f}{spread}")
        text = results[0].pattern.replace("|", "\\|")
        lines.append(f"| {name}: `{text}` | " + " | ".join(cells) + " |")
    aside = out / ".recall.md.tmp"
    aside.write_text("\n".join(lines) + "\n")
    aside.replace(out / "recall.md")


def draw(found: dict[str, list[Result]], settings: Settings, out: Path) -> None:
    """Draw accuracy against distance, and against cost."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    by_distance, by_cost = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    distances = settings.task.distances
    for number, (name, results) in enumerate(found.items()):
        shares = [[r.accuracy[str(d)] for r in results] for d in distances]
        colour, marker = f"C{number}", "osD^vPX"[number % 7]
        means = [mean(s) for s in shares]
        by_distance.plot(distances, means, color=colour, marker=marker, label=name)
        by_distance.fill_between(
            distances, [min(s) for s in shares], [max(s) for s in shares], color=colour, alpha=0.15
        )
        cost = mean(r.keys_per_query for r in results)
        by_cost.scatter([cost], [mean(means)], color=colour, marker=marker, label=name, s=50)
    for axes in (by_distance, by_cost):
        axes.axhline(1 / settings.task.num_values, color="grey", linestyle=":", linewidth=1)
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.25)
    guessing = (distances[0], 1 / settings.task.num_values + 0.02)
    by_distance.annotate("guessing", guessing, fontsize=8, color="grey")
    by_distance.set_xscale("log", base=2)
    by_distance.set_xticks(distances, [f"{d:,}" for d in distances], fontsize=8)
    by_distance.set_xlabel("distance between pair and question, tokens")
    by_distance.set_ylabel("questions answered")
    by_distance.legend(fontsize=8, loc="center", framealpha=0.9)
    by_cost.set_xscale("log")
    by_cost.xaxis.set_major_formatter("{x:,.0f}")
    by_cost.xaxis.set_minor_formatter("{x:,.0f}")
    by_cost.tick_params(axis="x", which="both", labelsize=8)
    by_cost.set_xlabel("keys visited for a query, a layer")
    by_cost.set_title("mean over distances", fontsize=9)
    aside = out / ".recall.tmp.png"
    figure.savefig(aside, dpi=120)
    aside.replace(out / "recall.png")
