import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_core import kernels


@pytest.mark.skipif(not kernels.INSTALLED, reason="needs triton")
def test_kernels_compile_for_a_hopper_gpu_with_the_triton_at_hand() -> None:
    script = Path(__file__).with_name("compiled.py")
    environment = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=400
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert "12 kernels compile" in run.stdout
