"""What Prometheus scrapes: the server's own health, and the fleet."""
