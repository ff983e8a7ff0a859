"""The public Python API. `import icsearch` gives all of it; each part is imported when it is first used."""
