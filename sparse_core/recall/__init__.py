"""How far patterns carry information: `python -m sparse_core.recall`."""
