"""Criteria: which score ranks the units of the pruning groups."""
