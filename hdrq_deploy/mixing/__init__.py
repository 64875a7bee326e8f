"""Weights of domains changed while an engine runs."""
