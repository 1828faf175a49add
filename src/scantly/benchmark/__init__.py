"""Grids of trainings and where they run; the literature's published results, as data, to compare with."""
