"""Calibration batches: text tokenised and packed into equal sequences, once, and cached. No torch."""
