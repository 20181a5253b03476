"""What tuning checks is what it times: kernels are compiled once, side by side."""

import pytest
import torch

from sparse_core import tune
from sparse_core.building import build_layout
from sparse_core.kernels import arguments, tuning
from sparse_core.kernels.steps import steps


@pytest.mark.parametrize("case", tune.CASES)
@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_checked_and_timed_kernels_are_the_same(
    kernel: tuning.Kernel, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "_has_accelerator", lambda device: True)
    compiled = []
    for tokens, heads in ((tune.SMALL, 2), (tune.CASES[case][1], 12)):
        layout = build_layout(tune.CASES[case][0], tune._where(case, tokens))
        q = torch.empty(1, layout.num_queries, heads, 64, dtype=torch.bfloat16)
        config = tuning.candidates(kernel, "half", 64, case.split("/")[0])[0]
        with tuning.forced({kernel: config}):
            found = steps(kernel, layout, q, q, others=(q, q), precision="ieee")
        compiled.append([(step.constants, step.state_of is None) for step in found])
    assert compiled[0] == compiled[1]
