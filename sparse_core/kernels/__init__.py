"""The GPU's engine, in Triton. Nothing outside this folder imports triton."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

INSTALLED = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's own switch: its interpreter runs kernels on the CPU, slowly, for tests."""

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def why_not(q: Tensor) -> str | None:
    """Say why the kernels cannot take such queries; None if they can."""
    if not INSTALLED:
        return "triton is not installed (it has wheels for Linux only)"
    if q.device.type != "cuda" and not INTERPRETED:
        return f"the kernels need a CUDA device; the tensors are on {q.device}"
    if q.dtype not in DTYPES:
        return f"the kernels take float32, float16 and bfloat16; got {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"the kernels take head dimensions up to {MAX_HEAD_DIM}; got {q.shape[-1]}"
    return None
