"""The command line: options, and every way to end."""
