"""Patching as analyses: which states a prediction depends on."""
