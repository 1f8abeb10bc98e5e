"""Lenses as analyses: how early a language model knows what it predicts."""
