"""`--keep-float`: patterns of node names or operator types."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

import onnx_ir as ir

from qcompile.errors import RecipeError
from qcompile.graph.edit import nodes


def match_patterns(model: ir.Model, patterns: Sequence[str]) -> dict[str, str]:
    """Node names -> why they stay float, for all nodes that a pattern matches.

    A pattern is an operator type, a node's name, the name of one of its outputs, a prefix of it that ends
    before a `/`, a glob (`*/lm_head/*`), or a regular expression after `re:`.

    Raises:
        RecipeError: a pattern matches nothing (the three nearest names are offered) or is not valid.
    """
    found: dict[str, str] = {}
    everything = [
        (node.name or "", node.op_type, [v.name or "" for v in node.outputs])
        for node in nodes(model)
    ]
    for pattern in patterns:
        test = _tester(pattern)
        matched = [
            name
            for name, op, outputs in everything
            if op == pattern or any(map(test, (name, *outputs)))
        ]
        if not matched:
            raise RecipeError(
                f"the pattern {pattern!r} of --keep-float matches no node.{_near(pattern, everything)}"
            )
        found.update((name, f"kept float by {pattern!r}") for name in matched)
    return found


def _tester(pattern: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise RecipeError(
                f"the pattern {pattern!r} of --keep-float is not a regular expression: {error}."
            ) from error
        return lambda name: expression.search(name) is not None
    prefix = pattern.rstrip("/") + "/"
    return lambda name: (
        name == pattern or fnmatch.fnmatchcase(name, pattern) or name.startswith(prefix)
    )


def _near(pattern: str, everything: list[tuple[str, str, list[str]]]) -> str:
    import difflib  # noqa: PLC0415 - only on this path

    words = [name for name, _, _ in everything] + sorted({op for _, op, _ in everything})
    close = difflib.get_close_matches(pattern, words, n=3, cutoff=0.3)
    return f" The nearest names: {', '.join(map(repr, close))}." if close else ""
