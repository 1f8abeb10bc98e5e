"""Removing units: what goes together, what scores it, which go, and what is left."""
