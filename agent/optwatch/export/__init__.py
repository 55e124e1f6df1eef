"""The latest values, and how Prometheus gets them."""
