"""Several processes that do the work of one: a grid of data and pipeline ranks, bit for bit the same result."""
