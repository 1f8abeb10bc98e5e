"""Allocation: how many units each group keeps, and which."""
