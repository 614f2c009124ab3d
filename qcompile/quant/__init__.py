"""Arithmetic of quantization on arrays; knows no graph."""
