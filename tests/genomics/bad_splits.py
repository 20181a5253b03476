"""Rows of test_bad_input.py about labels, splits, copies and leaks."""

ROWS_D = []
