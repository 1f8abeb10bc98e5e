"""Modules of the first version, found under their old names for one more version."""
