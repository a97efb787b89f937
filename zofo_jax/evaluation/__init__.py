"""Scoring, generation, in-context learning, probes and metrics."""
