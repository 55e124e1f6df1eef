"""Memory: what the optimizer will allocate, what a training run needs, and what held the memory when it ran out."""
