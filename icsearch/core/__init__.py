"""What every room stands on: errors, files, JSON, numbers, patterns. No torch."""

__version__ = "0.2.0"
