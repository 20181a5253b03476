import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_core import kernels


@pytest.mark.skipif(not kernels.INSTALLED, reason="needs triton")
def test_kernels_agree_with_float64_in_the_interpreter() -> None:
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(script.parents[2])}
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, timeout=500
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    assert "30 cases agree" in run.stdout
