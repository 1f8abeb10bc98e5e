"""The network as units are read from it: layers, pruning groups, roles, experts, hooks, batches and targets."""
