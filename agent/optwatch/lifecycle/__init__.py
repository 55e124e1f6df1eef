"""A run from its beginning to its end, whatever ends it."""
