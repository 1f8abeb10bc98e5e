"""Results: tables, matrices and their provenance, saved, loaded and logged."""
