"""Weights of a few bits: which get how many, how they round, block after block, and the model that results."""
