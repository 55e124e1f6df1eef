"""Service level objectives, and the Prometheus rules made of them."""
