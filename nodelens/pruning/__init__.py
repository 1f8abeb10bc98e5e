"""Pruning: which units are coupled, how they are scored, which are removed, and the smaller model."""
