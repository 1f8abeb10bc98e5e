"""Pruning groups: which parameters are coupled, and so can only be removed together."""
