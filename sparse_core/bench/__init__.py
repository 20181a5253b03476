"""This machine's figures: `python -m sparse_core.bench`.

`cases` says what is measured, `check` holds a result to float64 before it is timed, `measure` times
it, `peers` runs PyTorch's own attentions beside it, `record` keeps and shows the figures. `layouts`
and `host` need no GPU.
"""

from sparse_core.bench.cases import CASES, Case

__all__ = ["CASES", "Case"]
