"""The record as Markdown."""

from collections.abc import Iterable, Sequence
from math import exp, log

from sparse_core.bench.cases import Case
from sparse_core.bench.layouts import layout_lines
from sparse_core.bench.record import (
    OURS,
    Direction,
    Figure,
    Record,
    relative_cost,
    speedup,
)

DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def markdown(record: Record, cases: Sequence[Case]) -> str:
    """Write every case that has figures, a row each."""
    known = [case for case in cases if case.name in record.figures]
    sections = [
        _machines(record),
        _times(record, known),
        _costs(record, known),
        _others(record, known),
        _comparisons(record, known),
        summary(record, known),
        layout_lines(record.layouts) if record.layouts else [],
        _failures(record, known),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def summary(record: Record, cases: Iterable[Case]) -> list[str]:
    """Average the ratios to FlexAttention geometrically, one weight a case."""
    logs: dict[Direction, list[float]] = {"forward": [], "backward": []}
    for case in cases:
        figures = record.figures.get(case.name, {})
        pair = [speedup(figures.get(OURS), figures.get("flex"), d) for d in DIRECTIONS]
        if None not in pair:
            for direction, found in zip(DIRECTIONS, pair, strict=True):
                logs[direction].append(log(found or 1))
    count = len(logs["forward"])
    if not count:
        return ["No ratio to FlexAttention from one process."]
    means = [exp(sum(logs[d]) / count) for d in DIRECTIONS]
    both = (means[0] * means[1]) ** 0.5
    return [
        f"FlexAttention's time over ours, geometric mean of {count} cases: forward {means[0]:.2f}, "
        f"backward {means[1]:.2f}, both {both:.2f}."
    ]


def progress(figures: dict[str, Figure]) -> str:
    """Say in a line what a case gave."""
    ours = figures[OURS]
    if ours.failure:
        return f"FAILED: {ours.failure}"
    cells = [f"{ours.engine} {_ms(ours.forward_ms)} + {_ms(ours.backward_ms)} ms"]
    for name, figure in figures.items():
        if name != OURS:
            ratios = " / ".join(_times_text(speedup(ours, figure, d)) for d in DIRECTIONS)
            cells.append(f"{name} failed" if figure.failure else f"{name} {ratios}")
    return ", ".join(cells)


def _machines(record: Record) -> list[str]:
    lines = []
    for run, machine in record.used_runs().items():
        parts = [f"{name} {value}" for name, value in machine.items() if name != "gpu"]
        lines.append(f"- run {run}: {machine['gpu']}, {', '.join(parts)}")
    return [
        "Medians in milliseconds, batch 1, random inputs, every result checked in float64 on "
        "sampled rows. A ratio is FlexAttention's time over ours in the same process.",
        "",
        *lines,
    ]


def _times(record: Record, cases: list[Case]) -> list[str]:
    lines = _head(
        "case", "tokens", "heads x dim", "dtype", "engine", "forward", "backward",
        "Flex forward", "Flex backward", "forward ratio", "backward ratio", "run", left=5,
    )  # fmt: skip
    for case in cases:
        figures = record.figures[case.name]
        ours, flex = figures.get(OURS), figures.get("flex")
        cells = [
            case.name,
            f"{case.tokens:,}",
            _heads(case),
            str(case.shape()["dtype"]),
            ours.engine if ours else "",
            *(_ms_cell(ours, d) for d in DIRECTIONS),
            *(_ms_cell(flex, d) for d in DIRECTIONS),
            *(_times_text(speedup(ours, flex, d)) for d in DIRECTIONS),
            ours.run if ours else "",
        ]
        lines.append(_row(cells))
    return lines


def _costs(record: Record, cases: list[Case]) -> list[str]:
    lines = _head(
        "case", "pattern", "layout ms", "Flex mask ms", "layout MB", "peak GiB", "Flex peak GiB",
        "TFLOP/s on visited pairs", "Flex TFLOP/s", "visited pairs", "visited / kept",
        "largest error", "Flex error", left=2,
    )  # fmt: skip
    for case in cases:
        figures = record.figures[case.name]
        ours, flex = figures.get(OURS), figures.get("flex")
        cells = [
            case.name,
            _pattern(case),
            _ms(ours.layout_ms if ours else None),
            _ms(flex.layout_ms if flex else None),
            _scaled(ours.layout_bytes if ours else None, 1e6, 1),
            _scaled(ours.peak_bytes if ours else None, 2**30, 2),
            _scaled(flex.peak_bytes if flex else None, 2**30, 2),
            _rates(case, ours),
            _rates(case, flex),
            f"{ours.visited_pairs:,}" if ours and ours.visited_pairs else "-",
            _visited_per_kept(ours),
            _error(ours),
            _error(flex),
        ]
        lines.append(_row(cells))
    return lines


def _others(record: Record, cases: list[Case]) -> list[str]:
    lines = _head(
        "case", "beside", "forward", "backward", "forward ratio", "backward ratio", "TFLOP/s",
        "error", left=2,
    )  # fmt: skip
    empty = len(lines)
    for case in cases:
        figures = record.figures[case.name]
        for name, figure in figures.items():
            if name in (OURS, "flex"):
                continue
            cells = [
                case.name,
                name,
                *(_ms_cell(figure, d) for d in DIRECTIONS),
                *(_times_text(speedup(figures.get(OURS), figure, d)) for d in DIRECTIONS),
                _rates(case, figure),
                _error(figure),
            ]
            lines.append(_row(cells))
    return lines if len(lines) > empty else []


def _comparisons(record: Record, cases: list[Case]) -> list[str]:
    lines = _head("our time of", "over that of", "per", "forward", "backward", left=3)
    empty = len(lines)
    for case in cases:
        if case.against is None:
            continue
        ours = record.figures[case.name].get(OURS)
        base = record.figures.get(case.against, {}).get(OURS)
        ratios = (relative_cost(ours, base, d, case.per) for d in DIRECTIONS)
        lines.append(_row([case.name, case.against, case.per, *map(_times_text, ratios)]))
    return lines if len(lines) > empty else []


def _failures(record: Record, cases: list[Case]) -> list[str]:
    return [
        f"- {case.name}, {name}: {figure.failure}"
        for case in cases
        for name, figure in record.figures[case.name].items()
        if figure.failure
    ]


def _head(*names: str, left: int) -> list[str]:
    return [_row(names), "|" + "---|" * left + "--:|" * (len(names) - left)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _heads(case: Case) -> str:
    kv_heads = f" ({case.kv_heads} of keys)" if case.kv_heads else ""
    return f"{case.heads} x {case.head_dim}{kv_heads}"


def _pattern(case: Case) -> str:
    text = repr(case.pattern).replace("|", "or")
    text = text if len(text) <= 100 else f"{text[:97]}..."
    return text if case.place == "sequence" else f"{text}, {case.place}"


def _ms_cell(figure: Figure | None, direction: Direction) -> str:
    if figure is not None and figure.failure:
        return "FAILED"
    return _ms(figure.ms(direction) if figure else None)


def _ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def _times_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f} x"


def _scaled(number: int | None, unit: float, digits: int) -> str:
    return "-" if number is None else f"{number / unit:.{digits}f}"


def _rates(case: Case, figure: Figure | None) -> str:
    """Count 4 operations a visited pair and channel forward, 2.5 times as many backward."""
    if figure is None or not (figure.visited_pairs and figure.forward_ms and figure.backward_ms):
        return "-"
    work = 4e-9 * figure.visited_pairs * case.head_dim * case.heads
    return f"{work / figure.forward_ms:.0f} / {2.5 * work / figure.backward_ms:.0f}"


def _visited_per_kept(figure: Figure | None) -> str:
    if figure is None or not (figure.visited_pairs and figure.kept_pairs):
        return "-"
    return f"{figure.visited_pairs / figure.kept_pairs:.2f}"


def _error(figure: Figure | None) -> str:
    if figure is None or not figure.errors:
        return "-"
    name, largest = max(figure.errors.items(), key=lambda item: item[1])
    return f"{largest:.1e} ({name})"
