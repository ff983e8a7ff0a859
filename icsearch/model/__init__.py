"""A model of transformers run layer by layer with F/S roles, and the files that its weights come from."""
