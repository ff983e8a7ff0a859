"""Texts to calibrate on: the built-in corpus, files, hub datasets. Loads nothing heavy by itself."""
