"""Rows of test_bad_input.py about intervals, contigs, variants, tokenizers and exports."""

ROWS_C = []
