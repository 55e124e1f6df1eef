"""Proof that what is read from each optimizer's state is what its definition says. See `run`."""
