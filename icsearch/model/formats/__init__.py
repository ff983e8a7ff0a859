"""How weights are stored: one module a format, and `weights`, which reads them all."""
