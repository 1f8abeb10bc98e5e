"""Analyses of how units are organised: geometry of the residual stream, supernodes."""
