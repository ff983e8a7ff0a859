"""What families of DSA models do each in their own way, one small adapter for each such thing.

None of them asks for a class or a model's name: an adapter looks for the attribute, argument or method that it is
about, so that a family which nobody here has seen works too, or is refused with what was missing.
"""
