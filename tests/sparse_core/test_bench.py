import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from pipelines.pathology.ordering import hilbert_index as pathology_index
from sparse_core import build_layout
from sparse_core.bench import CASES, Case, measure
from sparse_core.bench.__main__ import Plan, main, run_plan
from sparse_core.bench.ahead import call_once, compile_ahead
from sparse_core.bench.cases import Problem, hilbert_index, make_place, make_problem
from sparse_core.bench.check import (
    choose_rows,
    complaint,
    count_kept_pairs,
    exact_rows,
    row_errors,
)
from sparse_core.bench.contenders import contenders, prepare_ours
from sparse_core.bench.encoder import SETTINGS, StepFigure
from sparse_core.bench.encoder import table as encoder_table
from sparse_core.bench.flex_mask import mask_mod, raster_order
from sparse_core.bench.layouts import LayoutFigure
from sparse_core.bench.long_range import Row, ratios, run_long_range
from sparse_core.bench.record import Figure, Figures, Record, relative_cost, speedup
from sparse_core.bench.tables import markdown, summary
from sparse_core.patterns import (
    BlockList,
    Causal,
    DilatedWindow,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
)

SQUARE = 35 * 35
"""Tokens of a small case: a full grid, and beyond a strided pattern's first period."""
FLEX_CASES = [case for case in CASES if case.flex]
CPU = torch.device("cpu")


def small(case: Case, tokens: int = SQUARE) -> Case:
    kv_heads = 1 if case.kv_heads else None
    return replace(case, tokens=tokens, heads=2, kv_heads=kv_heads, head_dim=8)


def ids(case: Case) -> str:
    return case.name


# the cases


def test_names_are_unique_and_comparisons_exist() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all("," not in name and " " not in name for name in names)
    assert all(case.against is None or case.against in names for case in CASES)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_layout_keeps_what_the_pattern_keeps(case: Case) -> None:
    place = make_place(case.place, SQUARE)
    layout = build_layout(
        case.pattern, place.coords, segments=place.segments, block_size=case.block_size
    )
    assert place.num_tokens == SQUARE
    expected = case.pattern.mask(place.coords, segments=place.segments)
    problem = make_problem(small(case), "cpu")
    assert torch.equal(layout.mask(), expected)
    assert count_kept_pairs(problem) == int(expected.sum())


@pytest.mark.parametrize("case", FLEX_CASES, ids=ids)
def test_mask_mod_keeps_the_same_pairs(case: Case) -> None:
    place = make_place(case.place, SQUARE)
    expected = case.pattern.mask(place.coords)
    found = _written_out(mask_mod(case.pattern, place, "cpu"), SQUARE)
    assert torch.equal(found, expected)
    if case.place == "grid":
        found = _written_out(mask_mod(case.pattern, place, "cpu", raster=True), SQUARE)
        order = raster_order(place)
        assert torch.equal(found, expected[order][:, order])


def test_mask_mod_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="no mask_mod for BlockList"):
        mask_mod(BlockList(((0, 0),)), make_place("sequence", 64), "cpu")
    with pytest.raises(ValueError, match="packed"):
        mask_mod(Causal(), make_place("documents", 640), "cpu")


def test_hilbert_order_is_that_of_the_pathology_pipeline() -> None:
    axis = torch.arange(32)
    cells = torch.cartesian_prod(axis, axis)
    assert hilbert_index(cells).tolist() == pathology_index(cells.numpy()).tolist()
    coords = make_place("grid", 32 * 32).coords
    assert isinstance(coords, Tensor)
    assert (coords.diff(dim=0).abs().sum(1) == 1).all()


def test_documents_are_two_thousand() -> None:
    case = next(case for case in CASES if case.place == "documents")
    place = make_place("documents", case.tokens)
    assert place.segments is not None
    assert place.segments.shape == (2_000,)
    assert int(place.segments.sum()) == case.tokens
    assert int(place.segments.min()) >= 64
    assert int(place.segments.max()) <= 4_096


def test_tissue_fills_two_fifths_of_its_grid() -> None:
    case = next(case for case in CASES if case.place == "tissue")
    coords = make_place("tissue", case.tokens).coords
    assert isinstance(coords, Tensor)
    assert coords.shape[0] == case.tokens
    assert int(coords.max()) <= 511
    assert case.tokens / 512**2 == pytest.approx(0.4, abs=1e-4)


# the check of rows


CHECKED = [
    SlidingWindow(40),
    SlidingWindow(left=60, right=0),
    SlidingWindow(30) | GlobalTokens(3, (200, 411)) | RandomBlocks(2, 16),
    DilatedWindow(9, 5),
]


def problem_of(pattern: Pattern, dtype: torch.dtype, **shape: object) -> Problem:
    case = Case("x", pattern, 500, heads=4, head_dim=16)
    return make_problem(replace(case, **shape), "cpu", dtype=dtype)  # type: ignore[arg-type]


def results_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, dq, dk, dv of the blockwise engine."""
    call = prepare_ours(problem)
    out, lse = call.attend(*call.inputs)
    dq, dk, dv = torch.autograd.grad(out, call.inputs, call.grad_out)
    return out.detach(), lse.detach(), dq, dk, dv


@pytest.mark.parametrize("pattern", CHECKED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [{}, {"kv_heads": 2}, {"place": "documents"}], ids=str)
def test_check_accepts_what_is_right(
    pattern: Pattern, dtype: torch.dtype, shape: dict[str, object]
) -> None:
    problem = problem_of(pattern, dtype, **shape)
    out, lse, dq, dk, dv = results_of(problem)
    rows = choose_rows(problem)
    found = rows.of(out[0], lse[0], dq[0], dk[0], dv[0])
    errors = row_errors(found, exact_rows(problem, rows, out, lse))
    assert set(errors) == {"out", "lse", "dq", "dk", "dv"}
    assert complaint(errors, dtype) is None


@pytest.mark.parametrize("place", range(5), ids=["out", "lse", "dq", "dk", "dv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [0.0, torch.nan, None], ids=["zero", "nan", "off"])
def test_check_rejects_one_wrong_row(place: int, dtype: torch.dtype, value: float | None) -> None:
    problem = problem_of(CHECKED[2], dtype)
    results = list(results_of(problem))
    rows = choose_rows(problem)
    expected = exact_rows(problem, rows, results[0], results[1])
    row = int((rows.keys if place > 2 else rows.queries)[100])
    wrong = results[place].clone()
    at = (0, 1, row) if place == 1 else (0, row, 1)
    wrong[at] = wrong[at] * 1.5 if value is None else value
    results[place] = wrong
    errors = row_errors(rows.of(*(x[0] for x in results)), expected)  # type: ignore[arg-type]
    text = complaint(errors, dtype)
    assert text is not None
    assert ["out", "lse", "dq", "dk", "dv"][place] in text


def test_check_of_keys_notices_a_wrong_sum_over_queries() -> None:
    problem = problem_of(CHECKED[2], torch.float32)
    out, lse, dq, _, _ = results_of(problem)
    rows = choose_rows(problem)
    expected = exact_rows(problem, rows, out, lse)
    other = problem_of(SlidingWindow(29) | CHECKED[2].parts[1], torch.float32)  # type: ignore[attr-defined]
    *_, other_dk, other_dv = results_of(other)
    errors = row_errors(rows.of(out[0], lse[0], dq[0], other_dk[0], other_dv[0]), expected)
    assert errors["dk"] > 1e-3
    assert errors["dv"] > 1e-3


def test_rows_hold_edges_and_global_tokens() -> None:
    problem = problem_of(CHECKED[2], torch.float32, place="documents", tokens=9_000)
    rows = choose_rows(problem)
    assert problem.place.segments is not None
    ends = problem.place.segments.cumsum(0).tolist()
    named = {0, 1, 2, 3, 63, 64, 127, 128, 200, 411, 8_999, ends[0] - 1, ends[0]}
    for chosen in (rows.queries, rows.keys):
        assert named <= set(chosen.tolist())
        assert chosen.shape == (256,)
        assert (chosen.diff() > 0).all()
    assert not torch.equal(rows.queries, rows.keys)


def test_pairs_are_not_counted_where_that_takes_long() -> None:
    problem = problem_of(CHECKED[0], torch.float32)
    assert count_kept_pairs(problem, most=1000) is None


# the record


MACHINE = {"gpu": "a", "torch": "2"}


def figures_of(run: str, ours: float = 1.0, flex: float = 2.0) -> Figures:
    return {
        "ours": Figure(run, "blockwise", ours, 2 * ours, visited_pairs=100, kept_pairs=50),
        "flex": Figure(run, "flex", flex, 3 * flex, visited_pairs=200),
    }


def test_ratio_needs_one_process() -> None:
    one, two = figures_of("one"), figures_of("two", ours=4)
    assert speedup(one["ours"], one["flex"], "forward") == 2
    assert speedup(one["ours"], one["flex"], "backward") == 3
    assert speedup(two["ours"], one["flex"], "forward") is None
    assert speedup(one["ours"], None, "forward") is None
    assert speedup(Figure("one", failure="x"), one["flex"], "forward") is None
    assert relative_cost(two["ours"], one["ours"], "forward", "call") is None
    assert relative_cost(one["flex"], one["ours"], "forward", "call") == 2
    assert relative_cost(one["flex"], one["ours"], "forward", "visited pair") == 1
    assert relative_cost(one["flex"], one["ours"], "forward", "kept pair") is None


def test_record_round_trip_and_merge() -> None:
    case = CASES[0]
    record = Record(runs={"one": MACHINE, "two": MACHINE, "unused": MACHINE})
    record.layouts, record.layouts_run = [LayoutFigure("x", 0.1, 10, 3)], "one"
    record.add(case, figures_of("one"))
    record.add(case, {"ours": figures_of("two")["ours"]})
    again = Record.from_json(record.to_json())
    assert again.figures == record.figures
    assert again.layouts == record.layouts
    assert set(again.runs) == {"one", "two"}
    merged = again.figures[case.name]
    assert (merged["ours"].run, merged["flex"].run) == ("two", "one")
    assert speedup(merged["ours"], merged["flex"], "forward") is None
    with pytest.raises(ValueError, match="not a record"):
        Record.from_json("[]")


def test_a_changed_case_forgets_its_figures() -> None:
    record = Record(runs={"one": MACHINE})
    record.add(CASES[0], figures_of("one"))
    changed = replace(CASES[0], tokens=1_024)
    assert not record.holds(changed, ["ours"], MACHINE)
    record.add(changed, {"ours": figures_of("one")["ours"]})
    assert set(record.figures[changed.name]) == {"ours"}


def test_record_holds_only_whole_cases_of_the_same_machine() -> None:
    record = Record(runs={"one": MACHINE, "two": MACHINE})
    case = CASES[0]
    assert not record.holds(case, ["ours"], MACHINE)
    record.add(case, figures_of("one"))
    assert record.holds(case, ["ours", "flex"], MACHINE)
    assert record.holds(case, ["ours"], MACHINE)
    assert not record.holds(case, ["ours", "flex", "flex max-autotune"], MACHINE)
    assert not record.holds(case, ["ours", "flex"], {**MACHINE, "torch": "3"})
    record.add(case, {"flex": figures_of("two")["flex"]})
    assert not record.holds(case, ["ours", "flex"], MACHINE)
    assert not record.fails(case)
    record.add(case, {"ours": Figure("two", failure="wrong")})
    assert record.holds(case, ["ours", "flex", "flex max-autotune"], MACHINE)
    assert record.fails(case)


def test_markdown_has_a_row_for_every_case() -> None:
    record = Record(runs={"one": MACHINE, "two": {**MACHINE, "gpu": "b"}})
    for case in CASES:
        record.add(case, figures_of("one"))
    record.add(CASES[1], {"ours": Figure("two", "triton", failure="wrong: dq")})
    record.add(CASES[2], {"flex": Figure("two", "flex", failure="out of memory")})
    text = markdown(record, CASES)
    for case in CASES:
        assert text.count(f"\n| {case.name} | ") >= 2
    lines = text.splitlines()
    assert "run one: a" in text
    assert "run two: b" in text
    assert f"- {CASES[1].name}, ours: wrong: dq" in lines
    assert f"- {CASES[2].name}, flex: out of memory" in lines
    widths = {line.count(" | ") for line in lines if line.startswith(f"| {CASES[5].name} ")}
    heads = {line.count(" | ") for line in lines if line.startswith("| case ")}
    assert widths <= heads
    assert next(x for x in lines if x.startswith(f"| {CASES[1].name} ")).count("FAILED") == 2
    assert "2.00 x | 3.00 x" in next(x for x in lines if x.startswith(f"| {CASES[0].name} "))


def test_summary_is_a_geometric_mean() -> None:
    record = Record(runs={"one": MACHINE})
    record.add(CASES[0], figures_of("one", flex=2))
    record.add(CASES[1], figures_of("one", flex=8))
    record.add(CASES[2], {"ours": figures_of("one")["ours"]})
    assert "of 2 cases: forward 4.00, backward 6.00, both 4.90" in summary(record, CASES)[0]
    assert summary(Record(), CASES) == ["No ratio to FlexAttention from one process."]


# the command


def test_contenders() -> None:
    by_name = {case.name: case for case in CASES}
    assert contenders(by_name["window-64k"]) == ["ours", "flex"]
    autotuned = contenders(by_name["grid-256"], autotune=True)
    assert autotuned == ["ours", "flex", "flex in our order", "flex max-autotune"]
    assert contenders(by_name["dense-16k"], flex=False) == ["ours", "cudnn", "flash"]
    assert contenders(by_name["documents"]) == ["ours"]


def test_cases_are_measured_recorded_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = tuple(small(case, 256) for case in CASES if case.name in ("window-64k", "gqa-64k"))
    plan = Plan(cases, folder=tmp_path, flex=False)
    assert run_plan(plan, CPU) == 0
    first = json.loads((tmp_path / "bench.json").read_text())
    assert set(first["cases"]) == {case.name for case in cases}
    figure = first["cases"]["gqa-64k"]["figures"]["ours"]
    assert figure["engine"] == "blockwise"
    assert figure["forward_ms"] > 0
    assert figure["backward_ms"] > 0
    assert figure["kept_pairs"] == 256**2
    assert (tmp_path / "bench.md").read_text() in capsys.readouterr().out
    assert run_plan(plan, CPU) == 0
    assert capsys.readouterr().out.count("measured before") == 2
    assert json.loads((tmp_path / "bench.json").read_text()) == first
    assert run_plan(replace(plan, again=True), CPU) == 0
    again = json.loads((tmp_path / "bench.json").read_text())
    assert set(again["runs"]).isdisjoint(first["runs"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md"]


def test_a_failing_case_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raising = replace(small(CASES[0]), pattern=SlidingWindow((1, 2)))
    plan = Plan((raising, small(CASES[3], 128)), folder=tmp_path, flex=False)
    assert run_plan(plan, CPU) == 3
    cases = json.loads((tmp_path / "bench.json").read_text())["cases"]
    assert "2 radii" in cases[raising.name]["figures"]["ours"]["failure"]
    assert "failure" not in cases[CASES[3].name]["figures"]["ours"]
    assert "FAILED: ValueError" in capsys.readouterr().out
    assert run_plan(plan, CPU) == 3
    assert "(measured before): FAILED" in capsys.readouterr().out


def test_a_wrong_result_gets_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    right = measure.exact_rows

    def wrong(*given: object) -> dict[str, Tensor]:
        expected = right(*given)  # type: ignore[arg-type]
        return {**expected, "dv": expected["dv"] * 1.1}

    monkeypatch.setattr(measure, "exact_rows", wrong)
    figures = measure.measure_case(small(CASES[0], 200), "one", ["ours", "flex"], CPU)
    assert set(figures) == {"ours"}
    assert str(figures["ours"].failure).startswith("wrong: dv by ")
    assert figures["ours"].forward_ms is None


def test_a_peer_that_fails_fails_alone() -> None:
    case = small(next(case for case in CASES if case.name == "dense-16k"), 128)
    figures = measure.measure_case(case, "one", contenders(case, flex=False), CPU)
    assert figures["ours"].failure is None
    assert figures["cudnn"].failure is not None
    assert figures["cudnn"].forward_ms is None


def test_compiling_ahead_calls_a_contender_and_leaves_failures_to_the_measurement() -> None:
    case = small(CASES[0], 128)
    assert call_once(case, "ours", "cpu")
    assert not call_once(replace(case, pattern=SlidingWindow((1, 2))), "ours", "cpu")


@pytest.mark.gpu
def test_compiling_ahead_works_in_processes(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [replace(case, tokens=8192, heads=2) for case in CASES[:2]]
    compile_ahead([(case, "ours") for case in cases], torch.device("cuda"), workers=2)
    assert "compiling 2/2" in capsys.readouterr().out


def test_command_lists_cases_and_refuses_unknown_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*(case.name for case in CASES), "layouts"]
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "window-64k,nonsense"])
    assert stopped.value.code == 2
    assert "no case nonsense" in capsys.readouterr().err


def test_cases_need_a_cuda_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(["--only", "window-64k"])
    assert stopped.value.code == 2
    assert "CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["grid-256", "scattered-64k", "causal-16k", "gqa-64k"])
def test_all_contenders_run_on_a_gpu(name: str) -> None:
    case = replace(next(case for case in CASES if case.name == name), tokens=64 * 64)
    figures = measure.measure_case(case, "one", contenders(case), torch.device("cuda"))
    assert set(figures) == set(contenders(case))
    for who, figure in figures.items():
        assert figure.failure is None, f"{who}: {figure.failure}"
        assert figure.forward_ms
        assert figure.backward_ms
        assert figure.peak_bytes
        assert figure.errors
        assert max(figure.errors.values()) < 1e-2


def test_unreadable_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bench\.json is not a record .* move it away"):
        run_plan(Plan((), folder=tmp_path), CPU)


def _written_out(mod: object, tokens: int) -> Tensor:
    mask: Tensor = create_mask(mod, 1, 1, tokens, tokens, device="cpu")  # type: ignore[arg-type]
    return mask[0, 0]


# whole encoders, and what reaches far


def test_encoder_rows_name_their_pattern_and_what_did_not_fit() -> None:
    lines = encoder_table([StepFigure(SETTINGS[0], 100.0, 2**31, 2**30)])
    assert lines[-1] == "| window | 65,536 | no | yes | 100.0 | 655,360 | 2.0 | 1.0 |"
    lines = encoder_table([StepFigure(SETTINGS[-1], failure="out of memory")])
    assert lines[-1].startswith("| LongNet | 262,144 | yes | yes | out of memory |")


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_long_range_table_and_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_long_range({"GPU": "none"}, tmp_path, CPU, tokens=300, dense_tokens=(150,)) == 0
    held = json.loads((tmp_path / "long_range.json").read_text())
    assert [row["name"] for row in held["rows"]] == [
        "window", "choosing", "routed", "hierarchical", "routed", "routed, as a graph", "dense",
    ]  # fmt: skip
    assert all(row["forward_ms"] > 0 for row in held["rows"])
    assert (tmp_path / "long_range.md").read_text() in capsys.readouterr().out


def test_choosing_is_weighed_against_what_it_routes() -> None:
    rows = [
        Row("window", 1000, 10.0, 20.0, 100),
        Row("choosing", 1000, 5.0, 0.0, 1),
        Row("routed", 1000, 15.0, 40.0, 150),
        Row("hierarchical", 1000),
        Row("routed", 10, 1.0, 1.0, 1),
        Row("dense", 10, 3.0, 3.0, 1),
    ]
    assert ratios(rows) == [
        "- choosing at 1,000 tokens takes 0.10 of forward and backward of the attention that it "
        "routes",
        "- routed at 1,000 tokens takes 1.83 of the window's time",
        "- routed attention holds 1.50 of the window's peak",
        "- routed at 10 tokens is 3.00 x as fast as dense",
    ]
