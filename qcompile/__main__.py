"""`python -m qcompile`."""

from qcompile.cli import entry

entry()
