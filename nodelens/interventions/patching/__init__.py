"""Patching: hidden states of one run put into another, and how much of the prediction follows them."""
