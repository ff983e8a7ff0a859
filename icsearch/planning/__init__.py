"""What a run will take, before it starts: memory, passes over the weights, hours, from sizes alone."""
