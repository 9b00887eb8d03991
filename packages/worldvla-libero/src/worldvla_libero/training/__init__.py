"""Recipes of the paper and what trains them, and the training of image tokenizers."""
