"""Shipped files with one's own addresses: rules, configuration and dashboards."""
