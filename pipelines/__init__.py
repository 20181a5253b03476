"""Slides and DNA through one sparse-attention core."""
