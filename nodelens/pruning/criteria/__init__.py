"""Criteria: scores that rank the units of pruning groups."""
