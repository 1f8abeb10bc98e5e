"""The geometry of a language model's residual stream."""
