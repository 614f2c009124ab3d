"""Calibration: where the samples come from and what is observed on them."""
