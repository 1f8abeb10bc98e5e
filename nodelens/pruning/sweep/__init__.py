"""Sweeps: every combination of criterion, allocation and amount, evaluated and compared."""
