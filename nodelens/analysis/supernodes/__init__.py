"""Supernodes: the few channels that carry the loss, what surrounds them, and whether the scores are true."""
