"""A pruned model of transformers as a folder of the hub: config, modelling file, model card, upload."""
