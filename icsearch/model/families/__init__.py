"""What families of DSA models do each in their own way, one small adapter for each such thing."""
