"""Checkpoints and their weights: which files, how they are read, where they rest while a model runs."""
