"""Curves, heatmaps and tables of runs and evaluations, from saved JSON alone. No torch."""
