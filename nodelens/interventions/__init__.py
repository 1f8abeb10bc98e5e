"""Access to the activations of a running network, and interventions on them."""
