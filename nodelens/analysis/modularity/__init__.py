"""Modules of units: groups of units of a layer with strong associations inside and weak ones between."""
