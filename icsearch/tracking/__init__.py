"""Runs and evaluations in experiment trackers: what to log, the trackers of accelerate, and who feeds them."""
