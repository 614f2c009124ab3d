"""Plans: what becomes of each node, decided from costs, as data."""
