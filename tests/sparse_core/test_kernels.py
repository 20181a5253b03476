"""What only the Triton engine on a GPU can show. Its matrix of patterns is in test_attention."""

import shutil
import subprocess
import sys
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_core import build_layout, kernels, masking, sparse_attention
from sparse_core.layout import BlockLayout
from sparse_core.nn import SparseEncoder
from sparse_core.ops import choose_engine, engines_used, reset_engines_used
from sparse_core.patterns import (
    Causal,
    Dense,
    DilatedWindow,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    Routed,
    SlidingWindow,
    Strided,
)
from sparse_core.routing import (
    build_routed_layout,
    choose_blocks,
    describe_blocks,
    routed_attention,
)
from sparse_core.testing import (
    Engine,
    Inputs,
    check_against_float64,
    make_inputs,
    no_waiting,
    reference_results,
)

if kernels.INSTALLED:
    from sparse_core.kernels import tiles, tuning
    from sparse_core.kernels.arguments import _is_box, split_head_dim
    from sparse_core.kernels.forward import forward_kernel

needs_triton = pytest.mark.skipif(not kernels.INSTALLED, reason="needs triton")
TRITON = Engine("triton", "cuda")
MIXED = SlidingWindow(20) | GlobalTokens(2, (200,)) | RandomBlocks(2, 16)
PATTERNS = [
    Dense(),
    Causal(),
    SlidingWindow(100),
    SlidingWindow(20) | GlobalTokens(2),
    Strided(3, block=16),
    MIXED,
    (SlidingWindow(20) | DilatedWindow(5, 7) | GlobalTokens(1)) & Causal(),
]


def on_gpu(test):  # type: ignore[no-untyped-def]
    gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(gpu(test))


@needs_triton
def test_codes_of_terms_are_those_of_the_programs() -> None:
    ours = (tiles.INTERVAL, tiles.CONGRUENT, tiles.QUERY_FLAG, tiles.KEY_FLAG)
    assert ours == (
        masking.INTERVAL, masking.CONGRUENT, masking.QUERY_FLAG, masking.KEY_FLAG,
    )  # fmt: skip


@needs_triton
@pytest.mark.parametrize(
    ("head_dim", "chunks"),
    [(1, (16, 0)), (16, (16, 0)), (24, (32, 0)), (48, (32, 16)), (72, (64, 16)), (96, (64, 32)),
     (100, (128, 0)), (128, (128, 0)), (192, (128, 64)), (256, (256, 0))],
)  # fmt: skip
def test_channels_are_covered_by_one_or_two_powers_of_two(
    head_dim: int, chunks: tuple[int, int]
) -> None:
    assert split_head_dim(head_dim) == chunks


@pytest.mark.parametrize(
    ("pattern", "launches"),
    [(SlidingWindow(100) | GlobalTokens(64), 1), (Strided(4, block=64) | SlidingWindow(64), 1),
     (SlidingWindow(100) | GlobalTokens(4), 2)],
    ids=str,
)  # fmt: skip
def test_parts_share_a_launch_where_their_blocks_are_among_the_others(
    pattern: Pattern, launches: int
) -> None:
    layout = build_layout(pattern, 1000, block_size=64)
    for side, lists in (("queries", "rows"), ("keys", "columns")):
        agenda = getattr(layout.schedule, side)
        assert len(agenda.launches) == launches
        assert sorted(n for x in agenda.launches for n in x.part_numbers) == list(
            range(len(layout.parts))
        )
        for launch in agenda.launches:
            blocks = getattr(layout.parts[launch.part_numbers[0]], side)
            whole = launch.ranges[0].long()
            for place, number in enumerate(launch.part_numbers):
                part = layout.parts[number]
                owned = getattr(part, side)
                starts = owned.order[owned.start] if owned.order.numel() else owned.start
                for row, start in enumerate(starts.tolist()):
                    mine = blocks.order[blocks.start] if blocks.order.numel() else blocks.start
                    item = (mine[launch.items[0, :, 0].long()] == start).nonzero()[:, 0]
                    visited = [range(int(r[0]), int(r[2])) for r in whole[item, place]]
                    ptr = getattr(part, lists).ptr[0]
                    assert sorted(n for r in visited for n in r) == list(
                        range(int(ptr[row]), int(ptr[row + 1]))
                    )


@needs_triton
def test_boxes_are_of_aligned_tensors_that_are_not_expanded() -> None:
    x = torch.zeros(2, 64, 4, 72, dtype=torch.bfloat16)
    good, one_head = x[..., :64], x[:, :, :1, :64]
    assert all(map(_is_box, (good, one_head, one_head.mT.contiguous().mT, x[..., 8:])))
    row = torch.zeros(1, 1, 4, 64, dtype=torch.bfloat16)
    odd = torch.zeros(1, 64, 4, 65, dtype=torch.bfloat16)[..., :64]
    assert not any(map(_is_box, (row.expand(1, 64, 4, 64), odd, x[..., 4:68])))


def test_auto_takes_what_can_run() -> None:
    assert choose_engine("auto", torch.empty(1, 1, 1, 16)) == "blockwise"


@on_gpu
def test_auto_takes_triton_on_a_gpu_except_where_it_cannot() -> None:
    for dtype, head_dim, name in (
        (torch.bfloat16, 64, "triton"),
        (torch.float32, 256, "triton"),
        (torch.float64, 64, "blockwise"),
        (torch.float16, 320, "blockwise"),
    ):
        q = torch.empty(1, 1, 1, head_dim, dtype=dtype, device="cuda")
        assert choose_engine("auto", q) == name
        if name == "blockwise":
            with pytest.raises(RuntimeError, match="kernels take"):
                choose_engine("triton", q)


def _configurations() -> list[object]:
    if not kernels.INSTALLED:
        return []
    found: list[object] = []
    for kernel, dtype, dim in product(tuning.KERNELS, ("half", "ieee", "tf32"), tuning.HEAD_DIMS):
        for config in tuning.candidates(kernel, dtype, dim):
            name = f"{kernel}-{dtype}-{dim}-{config.block_own}x{config.block_other}"
            name += f"-{config.num_warps}-{config.num_stages}-{config.max_registers}"
            found.append(pytest.param(kernel, dtype, dim, config, id=name))
    return found


@on_gpu
@pytest.mark.parametrize(("kernel", "dtype", "head_dim", "config"), _configurations())
def test_every_configuration_that_tuning_may_choose(
    kernel: "tuning.Kernel", dtype: str, head_dim: int, config: "tuning.Config"
) -> None:
    with tuning.forced({kernel: config}):
        if dtype == "tf32":
            _check_tf32(head_dim)
            return
        for kind in (torch.bfloat16, torch.float16) if dtype == "half" else (torch.float32,):
            inputs = make_inputs(330, heads=4, kv_heads=2, head_dim=head_dim, dtype=kind)
            check_against_float64(SlidingWindow(90) | GlobalTokens(2), inputs, TRITON)
            check_against_float64(SlidingWindow(90) | GlobalTokens(2), inputs, TRITON, plain=True)
            check_against_float64(SlidingWindow(150), inputs, TRITON, block_size=128)
            grid = torch.cartesian_prod(torch.arange(22), torch.arange(15))
            check_against_float64(SlidingWindow(4), inputs, TRITON, coords=grid, block_size=64)


def _check_tf32(head_dim: int) -> None:
    """Products of factors rounded to 10 bits: errors near 1e-3, but not float32's."""
    inputs = make_inputs(330, heads=2, head_dim=head_dim)
    engine = Engine("triton", "cuda", "tf32")
    found = engine.run(build_layout(MIXED, 330), inputs, plain=True)
    expected = _plain_reference(inputs, MIXED)
    for name in ("out", "dq", "dk", "dv"):
        error = float((found[name].double() - expected[name]).norm() / expected[name].norm())
        assert 1e-6 < error < 3e-3, f"{name}: {error:.1e}"


def _plain_reference(inputs: Inputs, pattern: Pattern) -> dict[str, Tensor]:
    without = Inputs(
        inputs.q, inputs.k, inputs.v, torch.zeros_like(inputs.key_bias),
        torch.zeros_like(inputs.alibi_slopes), inputs.grad_out, inputs.grad_lse,
    )  # fmt: skip
    tokens = inputs.q.shape[1]
    return reference_results(without, pattern.mask(tokens), torch.zeros(tokens, tokens))


@on_gpu
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_half_precision_is_no_worse_than_dense_attention(
    pattern: Pattern, dtype: torch.dtype, head_dim: int
) -> None:
    host = make_inputs(1000, heads=4, head_dim=head_dim, dtype=dtype)
    host.grad_lse.zero_()
    expected = _plain_reference(host, pattern)
    ours = TRITON.run(build_layout(pattern, 1000), host, plain=True)
    mask = pattern.mask(1000).cuda()
    leaves = [getattr(host, n).cuda().requires_grad_() for n in ("q", "k", "v")]
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves), attn_mask=mask)
    dense = dense.transpose(1, 2)
    grads = torch.autograd.grad(dense, leaves, host.grad_out.cuda())
    norms = [float(x.double().norm(dim=-1).amax()) for x in (host.grad_out, host.v, host.k)]
    floor = torch.finfo(dtype).eps * norms[0] * norms[1] * norms[2] * head_dim**-0.5 * 1000**0.5
    for name, theirs in zip(("out", "dq", "dk", "dv"), (dense, *grads), strict=True):
        wanted = expected[name]
        error = (ours[name].double() - wanted).norm()
        allowed = 1.5 * (theirs.detach().cpu().double() - wanted).norm()
        assert error <= allowed or (ours[name].double() - wanted).abs().max() <= floor * 1e-3, (
            f"{name}: {error / wanted.norm():.2e} against {allowed / wanted.norm():.2e}"
        )


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "pattern", [Dense(), SlidingWindow(400), SlidingWindow(40) | GlobalTokens(3)], ids=str
)
def test_rows_that_outgrow_their_first_maximum(pattern: Pattern, dtype: torch.dtype) -> None:
    inputs = make_inputs(1000, heads=2, head_dim=64, dtype=dtype)
    inputs.k[:, 300:500] *= 32
    check_against_float64(pattern, inputs, TRITON, plain=True)


@on_gpu
def test_another_sequence_without_numbers_changes_nothing() -> None:
    layout = build_layout(SlidingWindow(100), 300, segments=[100, 200])
    inputs = make_inputs(300, heads=2, head_dim=64, dtype=torch.bfloat16)
    clean = TRITON.run(layout, inputs, plain=True)
    for name in ("q", "k", "v", "grad_out"):
        getattr(inputs, name)[:, 100:] = torch.nan
    spoilt = TRITON.run(layout, inputs, plain=True)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.equal(spoilt[name][:, :100], clean[name][:, :100]), name


@on_gpu
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float32, 48), (torch.bfloat16, 64)])
@pytest.mark.parametrize("segments", [None, [200, 250]], ids=["one", "packed"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_memory_full_of_nan_changes_nothing(
    pattern: Pattern, segments: list[int] | None, dtype: torch.dtype, head_dim: int
) -> None:
    inputs = make_inputs(450, heads=4, kv_heads=2, head_dim=head_dim, dtype=dtype)
    layout = build_layout(pattern, 450, segments=segments)
    clean = TRITON.run(layout, inputs)
    poison = [torch.full((2**26,), torch.nan, device="cuda") for _ in range(4)]
    poison += [torch.full((2**k,), torch.nan, device="cuda") for k in range(8, 26) for _ in "abcd"]
    del poison
    assert torch.empty(2**20, device="cuda").isnan().any()
    poisoned = TRITON.run(layout, inputs)
    for name, wanted in clean.items():
        assert torch.equal(poisoned[name], wanted), name


@on_gpu
@pytest.mark.parametrize("pattern", [MIXED, PATTERNS[-1]], ids=str)
def test_a_hundred_backward_runs_are_bit_identical(pattern: Pattern) -> None:
    tokens = 5000
    layout = build_layout(pattern | GlobalTokens(3), tokens, device="cuda")
    assert any(launch.num_slots for launch in layout.schedule.queries.launches)
    shape = (1, tokens, 4, 64)
    q, k, v, grad = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k[:, :, :2].contiguous(), v[:, :, :2].contiguous())]
    bias = torch.randn(1, tokens, device="cuda", requires_grad=True)
    out = sparse_attention(*leaves, layout, key_bias=bias)
    first = torch.autograd.grad(out, [*leaves, bias], grad, retain_graph=True)
    for _ in range(99):
        again = torch.autograd.grad(out, [*leaves, bias], grad, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@on_gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize(
    "pattern",
    [Routed(128, 4), Routed(128, 4) & Causal(), Routed(64, 3) | GlobalTokens(64, (300,))],
    ids=str,
)
def test_routed_in_half_precision(pattern: Pattern, heads: tuple[int, int], head_dim: int) -> None:
    shapes = [(2, 2001, n, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    *given, grad = (torch.randn(shape).bfloat16() for shape in shapes)
    given[0], given[1] = given[0] + 0.5, given[1] + 0.5  # so that blocks have something in common
    routed = build_routed_layout(pattern, 2001, segments=[1500, 501])
    chosen = choose_blocks(*describe_blocks(given[0].float(), given[1].float(), routed), routed)
    found = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.bfloat16)):
        leaves = [x.to(device, dtype).requires_grad_() for x in given]
        out = routed_attention(*leaves, routed.to(device), chosen=chosen.to(device))
        assert isinstance(out, Tensor)
        grads = torch.autograd.grad(out, leaves, grad.to(out))
        found.append([x.detach().double().cpu() for x in (out, *grads)])
    for right, ours in zip(*found, strict=True):
        assert (ours - right).norm() <= 2e-2 * right.norm()


@on_gpu
def test_gradients_of_routed_attention_are_bit_identical_in_memory_full_of_nan() -> None:
    tokens = 20_000
    routed = build_routed_layout(Routed(128, 8) | GlobalTokens(3), tokens, device="cuda")
    shapes = [(1, tokens, heads, 64) for heads in (4, 2, 2, 4)]
    *given, grad = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    leaves = [x.requires_grad_() for x in given]
    first: tuple[Tensor, ...] = ()
    for _ in range(10):
        poison = [torch.full((2**k,), torch.nan, device="cuda") for k in range(8, 27) for _ in "ab"]
        del poison
        out = routed_attention(*leaves, routed)
        assert isinstance(out, Tensor)
        again = out.detach(), *torch.autograd.grad(out, leaves, grad)
        first = first or again
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(x.isfinite().all() for x in first)


def _cuda_problem(
    pattern: Pattern, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[BlockLayout, list[Tensor]]:
    layout = build_layout(pattern, tokens, device="cuda")
    shape = (1, tokens, 4, 64)
    return layout, [
        torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in range(3)
    ]


@on_gpu
def test_the_host_never_waits() -> None:
    layout, leaves = _cuda_problem(MIXED, 5000)
    sparse_attention(*leaves, layout).float().square().sum().backward()
    with no_waiting():
        sparse_attention(*leaves, layout).float().square().sum().backward()


@on_gpu
def test_cuda_graph_replays_with_new_inputs() -> None:
    layout, leaves = _cuda_problem(MIXED, 5000)
    grad = torch.randn_like(leaves[0])

    def step() -> tuple[Tensor, ...]:
        inside = [x.detach().requires_grad_() for x in leaves]
        out = sparse_attention(*inside, layout)
        assert isinstance(out, Tensor)
        return out.detach(), *torch.autograd.grad(out, inside, grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        assert torch.equal(got, wanted)


@on_gpu
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_compiled_whole_and_without_breaks() -> None:
    layout, leaves = _cuda_problem(MIXED, 777)

    def model(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Tensor:
        out = sparse_attention(q * 2, k, v, layout)
        assert isinstance(out, Tensor)
        return out.relu()

    plain = model(*leaves, layout)
    compiled = torch.compile(model, fullgraph=True)(*leaves, layout)
    torch.testing.assert_close(compiled, plain)
    grad = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, leaves, grad)
    for got, right in zip(torch.autograd.grad(compiled, leaves, grad), wanted, strict=True):
        torch.testing.assert_close(got, right, rtol=2e-2, atol=2e-2)


@on_gpu
def test_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout) -> Tensor:
            out = sparse_attention(q, k, v, layout)
            assert isinstance(out, Tensor)
            return out

    layout, leaves = _cuda_problem(MIXED, 300)
    plain = [x.detach() for x in leaves]
    program = torch.export.export(Model(), (*plain, layout))
    assert torch.equal(program.module()(*plain, layout), Model()(*plain, layout))


@on_gpu
def test_checkpointing_and_grad_scaler_and_autocast() -> None:
    layout, leaves = _cuda_problem(MIXED, 600, torch.float32)

    def loss(*inputs: Tensor) -> Tensor:
        out = sparse_attention(*inputs, layout)
        assert isinstance(out, Tensor)
        return out.float().square().mean()

    with torch.autocast("cuda", dtype=torch.float16):
        plain = torch.autograd.grad(loss(*leaves), leaves)
        again = torch.autograd.grad(checkpoint(loss, *leaves, use_reentrant=False), leaves)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    optimiser = torch.optim.SGD(leaves, lr=1.0)
    scaler = torch.amp.GradScaler("cuda")
    before = leaves[0].detach().clone()
    with torch.autocast("cuda", dtype=torch.float16):
        value = loss(*leaves)
    scaler.scale(value).backward()
    scaler.step(optimiser)
    assert not torch.equal(before, leaves[0])
    assert leaves[0].isfinite().all()


@on_gpu
def test_new_lengths_compile_nothing() -> None:
    def run(tokens: int) -> None:
        segments = [tokens // 3, tokens - tokens // 3] if tokens % 2 else None
        layout = build_layout(SlidingWindow(512), tokens, segments=segments, device="cuda")
        shape = (1, tokens, 2, 64)
        q, k, v = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()
            for _ in range(3)
        )
        out = sparse_attention(q, k, v, layout)
        assert isinstance(out, Tensor)
        out.sum().backward()

    def compiled() -> int:
        return len(forward_kernel.device_caches[torch.cuda.current_device()][0])

    run(1024)
    run(1025)
    before = compiled()
    for tokens in (1100, 1537, 2048, 3000, 4095, 8192, 10_001, 65_536, 131_071):
        run(tokens)
    assert compiled() == before


@on_gpu
def test_inputs_as_they_come() -> None:
    """Views of one projection, an expanded gradient, a negative scale, keys padded by -inf."""
    tokens = 200
    layout = build_layout(SlidingWindow(30), tokens)
    packed = torch.randn(2, tokens, 12, 32)
    bias = torch.zeros(2, tokens)
    bias[:, -50:] = -torch.inf
    found = {}
    for backend, device in (("reference", "cpu"), ("triton", "cuda")):
        leaf = packed.clone().to(device).requires_grad_()
        q, k, v = leaf.split(4, dim=2)
        out = sparse_attention(
            q, k, v, layout.to(device), scale=-0.3, key_bias=bias.to(device), backend=backend
        )
        assert isinstance(out, Tensor)
        out.sum().backward()
        assert leaf.grad is not None
        found[backend] = (out.detach().cpu(), leaf.grad.cpu())
    for got, wanted in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.parametrize("reduce", ["sum", "mean over tokens", "one head"])
def test_gradients_that_are_expanded_and_dimensions_of_one(reduce: str) -> None:
    heads = 1 if reduce == "one head" else 4
    layout = build_layout(SlidingWindow(70), 200)
    given = torch.randn(1, 200, heads, 64).bfloat16()
    found = {}
    for backend, device in (("reference", "cpu"), ("triton", "cuda")):
        leaf = given.to(device, torch.float64 if device == "cpu" else None).requires_grad_()
        out = sparse_attention(leaf, leaf, leaf, layout.to(device), backend=backend)
        assert isinstance(out, Tensor)
        (out.mean(1) if reduce == "mean over tokens" else out).sum().backward()
        assert leaf.grad is not None
        found[backend] = leaf.grad.double().cpu()
    error = (found["triton"] - found["reference"]).norm() / found["reference"].norm()
    assert error < 0.02


@on_gpu
def test_layouts_are_the_same_on_both_devices() -> None:
    for pattern in PATTERNS:
        here, there = (build_layout(pattern, 700, device=d) for d in ("cpu", "cuda"))
        for a, b in zip(
            torch.utils._pytree.tree_leaves(here), torch.utils._pytree.tree_leaves(there),
            strict=True,
        ):  # fmt: skip
            if isinstance(a, Tensor):
                assert torch.equal(a, b.cpu()), pattern


@on_gpu
def test_calls_are_counted_by_engine() -> None:
    layout, leaves = _cuda_problem(SlidingWindow(5), 100)
    reset_engines_used()
    sparse_attention(*leaves, layout).float().sum().backward()
    assert engines_used() == {"triton": 2}


@on_gpu
def test_a_million_tokens_beyond_two_to_the_32_elements() -> None:
    tokens, heads, head_dim, reach = 1_048_576, 16, 256, 40
    if torch.cuda.get_device_properties(0).total_memory < 100 * 2**30:
        pytest.skip("needs 100 GiB")
    layout = build_layout(SlidingWindow(reach), tokens, device="cuda")
    shape = (1, tokens, heads, head_dim)
    q, k, v = (torch.empty(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    grad = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    for x in (q, k, v, grad):
        x.normal_()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = sparse_attention(*leaves, layout, return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad)
    half = 2**31 // (heads * head_dim)
    for row in (0, half - 1, half, half + 1, tokens - 130, tokens - 1):
        low, high = max(0, row - 2 * reach), min(tokens, row + 2 * reach + 1)
        near = slice(low, high)
        parts = [x.detach()[:, near, ::5].double().requires_grad_() for x in leaves]
        place = torch.arange(low, high, device="cuda")
        kept = (place[:, None] - place[None, :]).abs() <= reach
        scores = torch.einsum("bqhd,bkhd->bhqk", parts[0], parts[1]) * head_dim**-0.5
        weights = scores.masked_fill(~kept, -torch.inf).softmax(-1)
        exact = torch.einsum("bhqk,bkhd->bqhd", weights, parts[2])
        at = row - low
        error = (out[:, row, ::5].double() - exact[:, at]).norm() / exact[:, at].norm()
        assert error < 1e-2
        # only queries whose windows lie inside the cut give right gradients: those that see `row`
        sees = (place - row).abs() <= reach
        exact.backward(torch.where(sees[None, :, None, None], grad[:, near, ::5].double(), 0))
        for got, part in zip(grads, parts, strict=True):
            assert part.grad is not None
            wanted = part.grad[:, at]
            assert (got[:, row, ::5].double() - wanted).norm() / wanted.norm() < 2e-2
    assert lse.isfinite().all()


SANITIZED = """
import torch
from sparse_core import build_layout, sparse_attention
from sparse_core.patterns import GlobalTokens, RandomBlocks, SlidingWindow

pattern = SlidingWindow(20) | GlobalTokens(2, (200,)) | RandomBlocks(2, 16)
layout = build_layout(pattern, 333, segments=[300, 33], device="cuda")
for dtype in (torch.float32, torch.bfloat16):
    shape = (1, 333, 2, 48)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype).requires_grad_() for _ in "qkv")
    bias = torch.randn(1, 333, device="cuda", requires_grad=True)
    slopes = torch.rand(2, device="cuda", requires_grad=True)
    out = sparse_attention(q, k, v, layout, key_bias=bias, alibi_slopes=slopes, backend="triton")
    out.float().square().sum().backward()
torch.cuda.synchronize()
print("done")
"""


@on_gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex"]
    command += ["kns=kernel", sys.executable, "-c", SANITIZED]
    run = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "done" in run.stdout


@on_gpu
def test_encoder_under_autocast() -> None:
    encoder = SparseEncoder(32, 2, 4, MIXED).cuda()
    x = torch.randn(1, 300, 32, device="cuda")
    layouts = encoder.build_layouts(300)
    plain = encoder(x, layouts)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = encoder(x, layouts)
        half.float().square().mean().backward()
    torch.testing.assert_close(half.float(), plain, rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


@on_gpu
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_split_rows_join_exactly(
    pattern: Pattern, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparse_core.schedule.ITEM_TOKENS", 64)
    inputs = make_inputs(500, heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    check_against_float64(pattern, inputs, TRITON, segments=[450, 50])
