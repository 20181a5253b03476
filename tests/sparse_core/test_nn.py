import pytest
import torch
from torch._dynamo.testing import CompileCounter

from sparse_core import build_layout
from sparse_core.nn import RotaryEmbedding, SparseEncoder, SparseSelfAttention
from sparse_core.nn.rotary import rotate
from sparse_core.patterns import Causal, GlobalTokens, SlidingWindow


def make_encoder(**changes: object) -> SparseEncoder:
    torch.manual_seed(0)
    arguments = {"num_kv_heads": 2, **changes}
    patterns = [SlidingWindow(9) | GlobalTokens(2), Causal()]
    return SparseEncoder(32, 2, 4, patterns, **arguments)  # type: ignore[arg-type]


def test_rotary_turns_by_relative_position_only() -> None:
    rotary = RotaryEmbedding(16, coord_dims=2)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(a: list[int], b: list[int]) -> float:
        turned = [rotate(x, rotary(torch.tensor([c]))) for x, c in ((q, a), (k, b))]
        return float((turned[0] * turned[1]).sum())

    assert score([5, 7], [2, 3]) == pytest.approx(score([105, 207], [102, 203]), abs=1e-5)
    assert score([5, 7], [2, 3]) != pytest.approx(score([5, 7], [3, 2]), abs=1e-3)


def test_rotary_is_exact_far_out() -> None:
    cos, sin = RotaryEmbedding(64)(torch.tensor([[1_000_000], [999_983]]))
    exact = torch.arange(32, dtype=torch.float64)
    angle = torch.tensor([[1_000_000.0], [999_983.0]], dtype=torch.float64)
    angle = angle * 10_000.0 ** (-exact / 32)
    assert (cos.double() - angle.cos()).abs().max() < 1e-7
    assert (sin.double() - angle.sin()).abs().max() < 1e-7


def test_rotary_leaves_spare_channels_alone() -> None:
    cos, sin = RotaryEmbedding(16, coord_dims=3)(torch.tensor([[4, 5, 6]]))
    assert cos.shape == (1, 8)
    assert (sin[:, 6:] == 0).all()
    with pytest.raises(ValueError, match="head_dim"):
        RotaryEmbedding(4, coord_dims=3)
    with pytest.raises(ValueError, match="exceed 1"):
        RotaryEmbedding(16, base=1.0)


def test_a_larger_base_tells_far_positions_apart() -> None:
    coords = torch.tensor([[47_117]])  # once round for the slowest of 32 pairs
    found = [RotaryEmbedding(64, base=base)(coords)[1][0, -1].item() for base in (1e4, 1e6)]
    assert found == pytest.approx([0, 0.0725], abs=1e-3)


def test_encoder_mixes_only_what_the_pattern_lets() -> None:
    encoder = SparseEncoder(32, 2, 4, SlidingWindow(3))
    x = torch.randn(1, 60, 32, requires_grad=True)
    encoded = encoder(x, encoder.build_layouts(60, segments=[40, 20]))
    (encoded[0, 20] * torch.randn(32)).sum().backward()
    touched = x.grad[0].abs().sum(1).nonzero()[:, 0].tolist()
    assert touched == list(range(14, 27))


def test_without_pattern_tokens_stay_alone() -> None:
    encoder = SparseEncoder(32, 2, 4, None)
    x = torch.randn(1, 10, 32, requires_grad=True)
    assert encoder.build_layouts(10) == ()
    (encoder(x, ())[0, 4] * torch.randn(32)).sum().backward()
    assert x.grad[0].abs().sum(1).nonzero()[:, 0].tolist() == [4]


def test_checkpointing_changes_nothing() -> None:
    plain, saving = make_encoder(), make_encoder(checkpointing=True)
    x = torch.randn(1, 50, 32)
    layouts = plain.build_layouts(50)
    for encoder in (plain, saving):
        encoder(x, layouts).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_compiles_whole_and_new_lengths_do_not_recompile() -> None:
    torch._dynamo.reset()
    encoder, counter = make_encoder(), CompileCounter()
    compiled = torch.compile(encoder, fullgraph=True, backend=counter)
    for tokens in (100, 130, 257, 300, 451):
        x, layouts = torch.randn(1, tokens, 32), encoder.build_layouts(tokens)
        out = compiled(x, layouts)
        out.sum().backward()
        torch.testing.assert_close(out, encoder(x, layouts), rtol=1e-5, atol=1e-5)
        if tokens == 130:
            after_second = counter.frame_count
    assert counter.frame_count == after_second == 2


def test_traces_through_autograd() -> None:
    torch._dynamo.reset()
    encoder = make_encoder()
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    x, layouts = torch.randn(1, 100, 32), encoder.build_layouts(100)
    compiled(x, layouts).square().sum().backward()
    gradients = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    encoder(x, layouts).square().sum().backward()
    for a, b in zip(gradients, encoder.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-4)


def test_exports_with_its_layout_as_input() -> None:
    encoder = make_encoder().eval()
    x, layouts = torch.randn(1, 100, 32), encoder.build_layouts(100, segments=[30, 70])
    program = torch.export.export(encoder, (x, layouts))
    other = encoder.build_layouts(100, segments=[30, 70])
    torch.testing.assert_close(program.module()(x, other), encoder(x, layouts))


def test_layers_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="multiple of num_heads"):
        SparseSelfAttention(30, 4)
    with pytest.raises(ValueError, match="one for each layer"):
        SparseEncoder(32, 3, 4, [Causal()])
    with pytest.raises(ValueError, match="needs 2 layouts"):
        make_encoder()(torch.randn(1, 10, 32), (build_layout(Causal(), 10),))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_are_the_same_layers() -> None:
    torch.manual_seed(0)
    encoder = SparseEncoder(32, 2, 4, SlidingWindow(9) | GlobalTokens(2))
    fast = SparseEncoder(32, 2, 4, SlidingWindow(9) | GlobalTokens(2), compiled=True)
    fast.load_state_dict(encoder.state_dict())
    for tokens in (70, 111):
        x = torch.randn(1, tokens, 32)
        results = []
        for model in (encoder, fast):
            model.zero_grad()
            out = model(x, model.build_layouts(tokens))
            out.square().mean().backward()
            results.append([out, *(p.grad for p in model.parameters())])
        for plain, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
