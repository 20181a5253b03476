"""Compile the kernels for a GPU that is not here; test_compiling starts it.

Triton compiles for whatever its driver names. This one names a Hopper GPU and can do nothing else,
so it gets a process of its own.
"""

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from sparse_core import build_layout
from sparse_core.kernels import engine
from sparse_core.kernels.backward import key_kernel, query_kernel
from sparse_core.kernels.forward import forward_kernel
from sparse_core.layout import with_block_biases
from sparse_core.patterns import GlobalTokens, Hierarchical, RandomBlocks, SlidingWindow, Strided
from sparse_core.pooling import build_pooled_layout

LAYOUTS = (
    build_layout(SlidingWindow(256) | GlobalTokens(64), 2048),
    build_layout(Strided(8, block=128) | SlidingWindow(128), 2048),
    with_block_biases(build_layout(RandomBlocks(2, block=128), 2048)),
    build_pooled_layout(Hierarchical(128, near=2), 2048).layout,
)


class Driver:
    """What Triton asks of a driver before it launches anything."""

    def get_current_target(self) -> GPUTarget:
        """A Hopper GPU."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """The first."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The default stream."""
        return 0


class Compile:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel) -> None:  # type: ignore[no-untyped-def]
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):  # type: ignore[no-untyped-def]
        """Take the place of a launch."""

        def compile_only(*arguments, **options):  # type: ignore[no-untyped-def]
            self.count += 1
            return self.kernel.warmup(*arguments, grid=grid, **options)

        return compile_only


def main() -> int:
    """Run forward and backward of some layouts with launches that only compile."""
    triton.runtime.driver.set_active(Driver())
    torch.cuda.get_device_capability = lambda device=None: (9, 0)  # type: ignore[assignment]
    engine.combine_kernel = Compile(engine.combine_kernel)  # type: ignore[assignment]
    kernels = [Compile(k) for k in (forward_kernel, query_kernel, key_kernel)]
    engine.forward_kernel, engine.query_kernel, engine.key_kernel = kernels  # type: ignore[assignment]
    for layout in LAYOUTS:
        q, grad_out = torch.zeros(2, 1, layout.num_queries, 2, 64, dtype=torch.bfloat16)
        k, v = torch.zeros(2, 1, layout.num_keys, 2, 64, dtype=torch.bfloat16)
        options = {"scale": 0.125, "alibi_slopes": None, "precision": "ieee"}
        biased = layout.num_biases > 0
        options["block_bias"] = torch.zeros(1, 2, layout.num_biases) if biased else None
        counted = any(not part.takes_key_bias for part in layout.parts)
        options["key_bias"] = torch.zeros(1, layout.num_keys) if counted else None
        out, lse = engine.forward(q, k, v, layout, **options)
        engine.backward(grad_out, None, q, k, v, out, lse, layout, **options)
    print(f"{sum(kernel.count for kernel in kernels)} kernels compile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
