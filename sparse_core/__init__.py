"""Sparse attention: patterns, layouts, engines and the modules that use them."""
