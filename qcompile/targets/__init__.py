"""Targets: what a runtime on a machine runs fast, as data."""
