"""Access to the units of a network: layers, pruning groups, roles, experts, hooks, batches and targets."""
