"""The graph rewrites of qcompile. Recipes name them by string; users import `qcompile` only."""
