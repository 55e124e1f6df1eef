"""What runs on the training thread: hooks that launch reductions and hand on one row a step, and wait for nothing."""
