"""Training: a callback that measures units every epoch, and fine-tuning after pruning."""
