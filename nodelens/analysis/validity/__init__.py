"""Validity: how well metrics of units predict the damage when units are removed."""
