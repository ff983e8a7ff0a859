"""Find out which layers of a DeepSeek-Sparse-Attention model can drop their indexer, and what that costs."""

__version__ = "0.1.0"
