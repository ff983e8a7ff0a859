"""Patterns run, losses come out."""
