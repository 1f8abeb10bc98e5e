"""What is done to a network while it runs, and states taken from it."""
