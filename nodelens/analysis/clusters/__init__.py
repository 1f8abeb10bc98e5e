"""Clusters of units in the space of their metrics, and the halo of a cluster in the next layer."""
