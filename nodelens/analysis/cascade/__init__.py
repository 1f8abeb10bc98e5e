"""Cascade: damage when several units of one type are removed, against as many random ones."""
