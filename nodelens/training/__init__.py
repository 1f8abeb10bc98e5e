"""Training: the callback that measures every epoch, and fine-tuning after pruning."""
