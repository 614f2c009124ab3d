"""Algorithms as functions on arrays: no graph, no model, no files."""
