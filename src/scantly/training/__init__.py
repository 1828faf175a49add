"""The engine: one loop, the run folder, checkpoints and resume."""
