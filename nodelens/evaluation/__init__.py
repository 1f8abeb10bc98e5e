"""How well a network does: accuracy, loss, perplexity, and lm-evaluation-harness."""
