"""Strategies and the loop that asks for losses: numbers alone, never a model. No torch."""
