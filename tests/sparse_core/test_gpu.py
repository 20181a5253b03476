"""The same op on a CUDA device."""

import pytest
import torch

from sparse_core import build_layout, sparse_attention
from sparse_core.nn import SparseEncoder
from sparse_core.patterns import (
    Causal,
    DilatedWindow,
    GlobalTokens,
    Pattern,
    RandomBlocks,
    SlidingWindow,
)
from sparse_core.reference import coordinate_distance
from sparse_core.testing import (
    Inputs,
    assert_close,
    make_inputs,
    reference_results,
    run_with_gradients,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PATTERNS = [
    Causal(),
    SlidingWindow(20) | GlobalTokens(2) | RandomBlocks(2, 16),
    (SlidingWindow(20) | DilatedWindow(5, 7) | GlobalTokens(1)) & Causal(),
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 129, 1000])
def test_against_float64(pattern: Pattern, dtype: torch.dtype, tokens: int) -> None:
    host = make_inputs(tokens, heads=4, kv_heads=2, dtype=dtype)
    inputs = Inputs(*(getattr(host, name).cuda() for name in Inputs.__dataclass_fields__))
    segments = [tokens // 3, tokens - tokens // 3]
    layout = build_layout(pattern, tokens, segments=segments, device="cuda")
    on_host = build_layout(pattern, tokens, segments=segments)
    assert torch.equal(layout.counts().cpu(), on_host.counts())
    found = run_with_gradients(
        lambda q, k, v, bias, slopes: sparse_attention(
            q, k, v, layout, key_bias=bias, alibi_slopes=slopes, return_lse=True
        ),
        inputs,
    )
    distance = coordinate_distance(on_host.query_coords, on_host.key_coords, torch.float64)
    expected = reference_results(host, pattern.mask(tokens, segments=segments), distance)
    assert_close({name: x.cpu() for name, x in found.items()}, expected, host)


def test_encoder_under_autocast() -> None:
    encoder = SparseEncoder(32, 2, 4, PATTERNS[1]).cuda()
    x = torch.randn(1, 300, 32, device="cuda")
    layouts = encoder.build_layouts(300)
    plain = encoder(x, layouts)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        half = encoder(x, layouts)
        half.float().square().mean().backward()
    torch.testing.assert_close(half.float(), plain, rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
