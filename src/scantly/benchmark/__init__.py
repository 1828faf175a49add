"""Comparison with the literature: its published results, as data."""
