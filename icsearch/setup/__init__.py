"""From a request to a model that computes: inputs, options, start events, weights, the scorer."""
