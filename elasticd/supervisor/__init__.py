"""Adapters to worker processes: torch's agent and rendezvous handler, and preloaded workers."""
