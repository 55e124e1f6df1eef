"""The whole product on one machine, from real processes: for a laptop, demos and tests."""
