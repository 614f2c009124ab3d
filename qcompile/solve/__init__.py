"""From a plan, statistics and weights to scales, zero points and codes."""
