"""Lenses: hidden states of a language model read as predictions of tokens."""
