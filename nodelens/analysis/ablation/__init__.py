"""Ablation: the change of the loss when units, or sets of units, are removed."""
