"""Supernodes: the few units with most of the loss proxy, their halo, and checks of the scores against ablation."""
