"""Evaluation of networks: accuracy, loss, perplexity, and lm-evaluation-harness."""
