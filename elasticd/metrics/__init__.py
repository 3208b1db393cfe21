"""Prometheus metrics: definitions and the HTTP exporter."""
