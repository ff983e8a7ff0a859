"""Calibration batches: text tokenised and packed into equal sequences, once, and cached for every candidate."""

from icsearch.calibration.batches import (
    CALIBRATION_FORMAT,
    Calibration,
    Limits,
    check,
    check_heldout,
    check_length,
    described,
)
from icsearch.calibration.cache import KEY, cache_key, obtain
from icsearch.calibration.directory import DamagedCacheError, load, save
from icsearch.calibration.packing import PACKING, Tally, build, document_prefix, pack, tokenizer_fingerprint

__all__ = [
    "CALIBRATION_FORMAT",
    "KEY",
    "PACKING",
    "Calibration",
    "DamagedCacheError",
    "Limits",
    "Tally",
    "build",
    "cache_key",
    "check",
    "check_heldout",
    "check_length",
    "described",
    "document_prefix",
    "load",
    "obtain",
    "pack",
    "save",
    "tokenizer_fingerprint",
]
