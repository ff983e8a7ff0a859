"""What every room stands on: errors, files, JSON, numbers, patterns. No torch."""
