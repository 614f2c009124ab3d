"""Comparing the result with the float model: error, kernels, latency."""
