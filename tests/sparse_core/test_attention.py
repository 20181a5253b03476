import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor

from sparse_core import (
    build_layout,
    concat,
    merge,
    merge_attention,
    sparse_attention,
    stack,
)
from sparse_core.layout import BlockLayout, with_block_biases
from sparse_core.ops import _flatten
from sparse_core.patterns import (
    BlockList,
    Causal,
    Dense,
    DilatedSegments,
    DilatedWindow,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
    Strided,
)
from sparse_core.patterns.terms import Tokens
from sparse_core.reference import coordinate_distance, reference_attention
from sparse_core.testing import (
    TOLERANCE,
    Engine,
    assert_close,
    check_against_float64,
    make_inputs,
    reference_results,
    run_with_gradients,
)

PATTERNS = [
    Dense(),
    Causal(),
    SlidingWindow(5),
    SlidingWindow(left=40, right=0),
    DilatedWindow(3, 4),
    Strided(3, block=16),
    GlobalTokens(2, (50,)),
    RandomBlocks(2, 16),
    BlockList(((0, 1), (2, 0)), 16),
    SlidingWindow(20) | GlobalTokens(2) | RandomBlocks(2, 16),
    (SlidingWindow(20) | DilatedWindow(5, 7) | GlobalTokens(1)) & Causal(),
]


LONGNET = DilatedSegments(40) + DilatedSegments(100, 2) + DilatedSegments(10**6, 4)


@dataclass(frozen=True)
class Sparkle(Pattern):
    """A pattern that no terms describe."""

    def allows(self, query: Tokens, key: Tokens) -> Tensor:
        return (query.index * 7 + key.index * 3) % 5 == 0


DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
BLOCKWISE = Engine("blockwise", "cpu")
ENGINES = [
    pytest.param(BLOCKWISE, id="blockwise"),
    pytest.param(Engine("blockwise", "cuda"), id="blockwise-cuda", marks=GPU),
    pytest.param(Engine("triton", "cuda"), id="triton", marks=GPU),
]
on_every_engine = pytest.mark.parametrize("engine", ENGINES)


@on_every_engine
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(engine: Engine, pattern: Pattern, dtype: torch.dtype) -> None:
    if engine.backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton engine has no float64")
    for tokens, (heads, kv_heads) in product((1, 2, 63, 129), ((2, 2), (4, 2))):
        inputs = make_inputs(tokens, batch=2, heads=heads, kv_heads=kv_heads, dtype=dtype)
        check_against_float64(pattern, inputs, engine)
        segments = [tokens // 3, 0, tokens - tokens // 3 - tokens // 5, tokens // 5]
        check_against_float64(pattern, inputs, engine, segments=segments)


@on_every_engine
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_at_a_thousand_tokens(engine: Engine, pattern: Pattern, dtype: torch.dtype) -> None:
    if engine.backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton engine has no float64")
    inputs = make_inputs(1000, heads=4, kv_heads=1, dtype=dtype)
    check_against_float64(pattern, inputs, engine)
    inputs = make_inputs(1000, heads=2, dtype=dtype)
    check_against_float64(pattern, inputs, engine, segments=[511, 1, 488])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_reference_backend_agrees(pattern: Pattern) -> None:
    inputs = make_inputs(63, heads=4, kv_heads=2, dtype=torch.float64)
    check_against_float64(pattern, inputs, Engine("reference", "cpu"))


@on_every_engine
@pytest.mark.parametrize("head_dim", [1, 8, 16, 40, 48, 64, 72, 80, 96, 100, 128, 160, 192, 256])
def test_head_dims(engine: Engine, head_dim: int) -> None:
    check_against_float64(PATTERNS[-2], make_inputs(129, head_dim=head_dim), engine)


@on_every_engine
@pytest.mark.parametrize("pattern", [SlidingWindow(2), SlidingWindow(1) | GlobalTokens(3)], ids=str)
def test_two_dimensions(engine: Engine, pattern: Pattern) -> None:
    coords = torch.randint(0, 9, (150, 2), generator=torch.Generator().manual_seed(1))
    inputs = make_inputs(150, heads=4, kv_heads=2)
    check_against_float64(pattern, inputs, engine, coords=coords, segments=[90, 60])


@on_every_engine
def test_three_dimensions(engine: Engine) -> None:
    coords = torch.randint(0, 6, (150, 3), generator=torch.Generator().manual_seed(1))
    check_against_float64(SlidingWindow(1), make_inputs(150), engine, coords=coords)


@on_every_engine
def test_a_pattern_of_its_own_is_drawn_as_bits(engine: Engine) -> None:
    check_against_float64(Sparkle() | SlidingWindow(3), make_inputs(129), engine)
    check_against_float64(
        Sparkle(), make_inputs(129, heads=4, kv_heads=2), engine, segments=[80, 49]
    )


@on_every_engine
def test_rectangular(engine: Engine) -> None:
    pattern = SlidingWindow(9) | GlobalTokens(2)
    inputs = make_inputs(70, 130, heads=4, kv_heads=2)
    layout = build_layout(pattern, 70, 130, segments=[30, 40], key_segments=[100, 30])
    mask = pattern.mask(70, 130, segments=[30, 40], key_segments=[100, 30])
    distance = coordinate_distance(layout.query_coords, layout.key_coords, torch.float64)
    found = engine.run(layout, inputs)
    assert_close(found, reference_results(inputs, mask, distance), inputs)


@on_every_engine
def test_query_without_keys_returns_zero(engine: Engine) -> None:
    inputs = make_inputs(64)
    layout = build_layout(BlockList(((0, 0),), 16), 64)
    found = engine.run(layout, inputs, plain=True)
    assert (found["out"][:, 16:] == 0).all()
    assert (found["lse"][..., 16:] == -torch.inf).all()
    for name in ("dq", "dk", "dv"):
        assert (found[name][:, 16:] == 0).all()
        assert found[name][:, :16].any()


def test_no_keys_at_all() -> None:
    inputs = make_inputs(0)
    layout = build_layout(SlidingWindow(3), 0)
    assert sparse_attention(inputs.q, inputs.k, inputs.v, layout).shape == inputs.q.shape


@pytest.mark.parametrize("at", [0, 40, 99])
@pytest.mark.parametrize(
    "pattern",
    [
        Causal(),
        SlidingWindow(left=30, right=0),
        (SlidingWindow(9) | RandomBlocks(2, 16)) & Causal(),
        LONGNET & Causal(),
    ],
    ids=str,
)
def test_causal_patterns_leak_nothing(pattern: Pattern, at: int) -> None:
    inputs = make_inputs(100)
    layout = build_layout(pattern, 100, num_kv_heads=2)
    before = sparse_attention(inputs.q, inputs.k, inputs.v, layout)
    for x in (inputs.q, inputs.k, inputs.v):
        x[:, at:] += 100 * torch.randn_like(x[:, at:])
    after = sparse_attention(inputs.q, inputs.k, inputs.v, layout)
    assert torch.equal(before[:, :at], after[:, :at])
    assert not torch.equal(before[:, at:], after[:, at:])


def test_sequences_do_not_see_each_other() -> None:
    inputs = make_inputs(100)
    layout = build_layout(Dense(), 100, segments=[60, 40])
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    sparse_attention(q, k, v, layout)[:, :60].sum().backward()
    for x in (q, k, v):
        assert (x.grad[:, 60:] == 0).all()


def test_packed_equals_alone() -> None:
    pattern = SlidingWindow(7) | GlobalTokens(2)
    inputs = make_inputs(150)
    layouts = [build_layout(pattern, n, block_size=16) for n in (50, 100)]
    packed = sparse_attention(inputs.q, inputs.k, inputs.v, concat(layouts))
    alone = [
        sparse_attention(*(x[:, part] for x in (inputs.q, inputs.k, inputs.v)), layout)
        for part, layout in zip((slice(0, 50), slice(50, 150)), layouts, strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=0, atol=1e-6)


@on_every_engine
def test_heads_with_lists_of_their_own(engine: Engine) -> None:
    patterns = [RandomBlocks(1, 16, seed=s) for s in range(3)]
    group_of = torch.tensor([[0, 2], [1, 1]])
    layout = stack([build_layout(p, 100) for p in patterns], group_of)
    masks = torch.stack([p.mask(100) for p in patterns])[group_of].repeat_interleave(2, 1)
    inputs = make_inputs(100, batch=2, heads=4, kv_heads=2)
    distance = coordinate_distance(layout.query_coords, layout.key_coords, torch.float64)
    expected = reference_results(inputs, masks, distance)
    for one in (engine, Engine("reference", "cpu")):
        assert_close(one.run(layout, inputs), expected, inputs)


@on_every_engine
def test_merged_layouts_count_a_pair_once_for_each(engine: Engine) -> None:
    near, far = SlidingWindow(9), DilatedWindow(6, 10)
    inputs = make_inputs(80, heads=4, kv_heads=2)
    whole = merge([build_layout(near, 80), build_layout(far, 80)])
    counts = near.mask(80).int() + far.mask(80).int()
    distance = coordinate_distance(whole.query_coords, whole.key_coords, torch.float64)
    assert_close(engine.run(whole, inputs), reference_results(inputs, counts, distance), inputs)


@on_every_engine
@pytest.mark.parametrize("pattern", [LONGNET, LONGNET & Causal()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_longnet(engine: Engine, pattern: Pattern, dtype: torch.dtype) -> None:
    if engine.backend == "triton" and dtype == torch.float64:
        pytest.skip("the Triton engine has no float64")
    for tokens, (heads, kv_heads) in product((1, 63, 129), ((2, 2), (6, 3), (4, 1))):
        inputs = make_inputs(
            tokens, batch=2, heads=heads, kv_heads=kv_heads, head_dim=48, dtype=dtype
        )
        check_against_float64(pattern, inputs, engine)
        check_against_float64(pattern, inputs, engine, segments=[tokens // 3, tokens - tokens // 3])


def test_longnet_mixes_its_branches_by_their_sums() -> None:
    inputs = make_inputs(130, heads=4, dtype=torch.float64)
    branches = LONGNET.parts
    layouts = [build_layout(branch, 130, num_kv_heads=4) for branch in branches]
    whole = build_layout(LONGNET, 130, num_kv_heads=4)

    def mixture(q, k, v, bias, slopes):
        found = [sparse_attention(q, k, v, x, key_bias=bias, return_lse=True) for x in layouts]
        outs, lses = zip(*found, strict=True)
        shares = torch.stack(lses).softmax(0).transpose(-1, -2)[..., None]
        return (shares * torch.stack(outs)).sum(0), torch.stack(lses).logsumexp(0)

    def one_softmax(q, k, v, bias, slopes):
        return sparse_attention(q, k, v, whole, key_bias=bias, return_lse=True)

    expected = run_with_gradients(mixture, inputs)
    assert_close(run_with_gradients(one_softmax, inputs), expected, inputs)


def test_merge_attention_joins_disjoint_keys() -> None:
    inputs = make_inputs(80, dtype=torch.float64)
    near, far = SlidingWindow(9), DilatedWindow(6, 10)
    joined = near | far
    parts = [build_layout(near, 80), build_layout(far, 80), build_layout(near & far, 80)]

    def attention(q, k, v, bias, slopes):
        results = [
            sparse_attention(q, k, v, layout, key_bias=bias, return_lse=True) for layout in parts
        ]
        (o1, l1), (o2, l2), _ = results
        return merge_attention([o1, o2], [l1, l2])

    whole = merge([parts[0], parts[1]])
    expected = run_with_gradients(
        lambda q, k, v, bias, slopes: reference_attention(
            q, k, v, near.mask(80).int() + far.mask(80).int(), key_bias=bias
        ),
        inputs,
    )
    assert_close(run_with_gradients(attention, inputs), expected, inputs)
    merged = run_with_gradients(
        lambda q, k, v, bias, slopes: sparse_attention(
            q, k, v, whole, key_bias=bias, return_lse=True
        ),
        inputs,
    )
    assert_close(merged, expected, inputs)
    assert int(joined.mask(80).sum()) < int(whole.counts().sum())


def test_merge_attention_of_nothing_is_zero() -> None:
    out = torch.zeros(1, 3, 2, 4, requires_grad=True)
    lse = torch.full((1, 2, 3), -torch.inf)
    joined, joined_lse = merge_attention([out, out], [lse, lse])
    assert (joined == 0).all()
    assert (joined_lse == -torch.inf).all()
    joined.sum().backward()
    assert (out.grad == 0).all()


@pytest.mark.parametrize("pattern", [PATTERNS[1], PATTERNS[-2], PATTERNS[-1], LONGNET], ids=str)
def test_gradcheck(pattern: Pattern) -> None:
    inputs = make_inputs(11, heads=2, kv_heads=1, head_dim=2, dtype=torch.float64)
    layout = build_layout(pattern, 11, segments=[7, 4], num_kv_heads=1)
    leaves = [inputs.q, inputs.k, inputs.v, inputs.key_bias, inputs.alibi_slopes]
    keep = torch.isfinite(sparse_attention(*leaves[:3], layout, return_lse=True)[1])

    def attention(q, k, v, bias, slopes):
        out, lse = sparse_attention(
            q, k, v, layout, key_bias=bias, alibi_slopes=slopes, return_lse=True
        )
        return out, lse[keep]

    assert torch.autograd.gradcheck(attention, [x.requires_grad_() for x in leaves])


def test_opcheck() -> None:
    layout = with_block_biases(build_layout(SlidingWindow(9) | GlobalTokens(2), 70))
    inputs = make_inputs(70, heads=4, kv_heads=2)
    tensors, numbers = _flatten(layout)
    blocks = torch.randn(1, 2, layout.num_biases, requires_grad=True)
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    bias, slopes = inputs.key_bias.requires_grad_(), inputs.alibi_slopes.requires_grad_()
    op = torch.ops.gigasparse.attention.default
    for extras in ((None, None, None), (bias, slopes, blocks)):
        torch.library.opcheck(op, (q, k, v, *extras, tensors, numbers, 0.3, "blockwise", "ieee"))


def without_key_bias(layout: BlockLayout) -> BlockLayout:
    """Let keys take no bias in the last of several parts."""
    *parts, last = layout.parts
    return replace(layout, parts=(*parts, replace(last, takes_key_bias=not parts)))


@on_every_engine
@pytest.mark.parametrize("plain", [False, True], ids=["biased keys", "plain"])
@pytest.mark.parametrize(
    ("pattern", "block_size"),
    [(PATTERNS[-2], 16), (PATTERNS[-1], None), (Dense(), 96), (SlidingWindow(60), 64),
     (RandomBlocks(2, 48), None), (DilatedSegments(40) + DilatedSegments(100, 2), None)],
    ids=str,
)  # fmt: skip
def test_each_pair_of_blocks_takes_a_number(
    engine: Engine, pattern: Pattern, block_size: int | None, plain: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = build_layout(
        pattern, 203, segments=[150, 0, 53], block_size=block_size, num_kv_heads=2
    )
    layout = without_key_bias(with_block_biases(layout))
    shapes = [(2, 203, heads, 32) for heads in (4, 2, 2)]
    shapes += [(2, 2, layout.num_biases), (2, 203), (2, 203, 4, 32), (2, 4, 203)]
    given = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    dtypes = (torch.float32, torch.bfloat16) if engine.backend == "triton" else (torch.float64,)
    for dtype in dtypes:
        found = []
        rounded = [x.to(dtype) for x in given]
        for backend, device in (("reference", "cpu"), (engine.backend, engine.device)):
            wanted = torch.float64 if backend == "reference" else None
            leaves = [x.to(device, wanted).requires_grad_() for x in rounded[:5]]
            bias = {} if plain else {"key_bias": leaves[4]}
            out, lse = sparse_attention(
                *leaves[:3], layout.to(device), block_bias=leaves[3], **bias,
                backend=backend, return_lse=True,
            )  # fmt: skip
            grads = [x.to(y) for x, y in zip(rounded[5:], (out, lse), strict=True)]
            back = torch.autograd.grad((out, lse), leaves[: 4 if plain else 5], grads)
            found.append([x.detach().double().cpu() for x in (out, lse, *back)])
        for right, ours in zip(*found, strict=True):
            assert (ours - right).norm() <= 3 * TOLERANCE[dtype] * right.norm()


def test_gradients_of_block_biases_are_finite_differences() -> None:
    layout = with_block_biases(build_layout(PATTERNS[-2], 40, segments=[30, 10], block_size=16))
    inputs = make_inputs(40, kv_heads=1, dtype=torch.float64)
    bias = torch.randn(1, 1, layout.num_biases, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, bias)]
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias: sparse_attention(q, k, v, layout, block_bias=bias, return_lse=True),
        leaves, fast_mode=True,
    )  # fmt: skip


def test_blocks_take_biases_after_packing() -> None:
    layout = with_block_biases(build_layout(SlidingWindow(9), 70))
    for pack in (concat, merge):
        with pytest.raises(ValueError, match="pack layouts first"):
            pack([layout, layout])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_and_gradients_come_back(dtype: torch.dtype) -> None:
    inputs = make_inputs(70)
    layout = build_layout(SlidingWindow(9), 70)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    with torch.autocast("cpu", dtype=dtype):
        out = sparse_attention(*leaves, layout)
        assert out.dtype == dtype
        out.float().sum().backward()
    assert leaves[0].grad.dtype == torch.float32
    plain = sparse_attention(*(x.detach() for x in leaves), layout)
    torch.testing.assert_close(out.float(), plain, rtol=0.05, atol=0.05)


@on_every_engine
def test_runs_are_bit_identical(engine: Engine) -> None:
    if engine == Engine("blockwise", "cuda"):
        pytest.skip("PyTorch adds with atomics there")
    inputs = make_inputs(500, heads=4)
    layout = build_layout(PATTERNS[-2], 500)
    runs = [engine.run(layout, inputs) for _ in range(5)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], runs[0][name]) for name in run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 70, 4)}, r"\[B, Tq, H, D\]"),
        ({"q": torch.zeros(1, 71, 4, 16)}, "layout is for 70 x 70"),
        ({"q": torch.zeros(1, 70, 3, 16)}, "multiple of Hkv"),
        ({"q": torch.zeros(1, 70, 4, 16, dtype=torch.float64)}, "one floating dtype"),
        ({"key_bias": torch.zeros(70)}, "key_bias is"),
        ({"alibi_slopes": torch.zeros(2)}, "alibi_slopes is"),
        ({"block_bias": torch.zeros(1, 2, 9)}, "block_bias is"),
        ({"backend": "flash"}, "backend is auto"),
        ({"precision": "bf16"}, "precision is ieee or tf32"),
        ({"key_bias": torch.zeros(1, 70, device="meta")}, "key_bias is on meta, the layout on cpu"),
    ],
)
def test_misuse_is_named(change: dict[str, object], message: str) -> None:
    layout = build_layout(SlidingWindow(3), 70)
    inputs = make_inputs(70, heads=4, kv_heads=2)
    arguments = {"q": inputs.q, "k": inputs.k, "v": inputs.v, "layout": layout, **change}
    with pytest.raises(ValueError, match=message):
        sparse_attention(**arguments)  # type: ignore[arg-type]


def test_a_named_engine_that_cannot_run_raises() -> None:
    inputs = make_inputs(4)
    with pytest.raises(RuntimeError, match="need a CUDA device; the tensors are on cpu"):
        sparse_attention(inputs.q, inputs.k, inputs.v, build_layout(Dense(), 4), backend="triton")


MEMORY = """
import torch
from sparse_core import build_layout, sparse_attention
from sparse_core.patterns import SlidingWindow
from sparse_core.testing import peak_memory

tokens = 65_536
small = [torch.randn(1, 256, 4, 64, requires_grad=True) for _ in range(3)]
sparse_attention(*small, build_layout(SlidingWindow(256), 256)).sum().backward()
q, k, v = (torch.randn(1, tokens, 4, 64, requires_grad=True) for _ in range(3))
grad = torch.randn(1, tokens, 4, 64)
gradients = [torch.ones_like(x) for x in (q, k, v)]
layout = build_layout(SlidingWindow(256), tokens)
before = peak_memory()
del gradients
out = sparse_attention(q, k, v, layout)
out.backward(grad)
print(peak_memory() - before)
"""


def test_memory_is_that_of_the_stored_blocks() -> None:
    run = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300
    )
    used = int(run.stdout)
    assert 2**20 < used < 0.5 * 2**30
