"""What a user fixes about single nodes: `--keep-float` patterns and edited plans."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from qcompile.errors import RecipeError, nearest
from qcompile.graph.edit import nodes
from qcompile.plan.plan import Form, Plan

_NEAREST = 3  # names offered for a pattern that matches nothing


@dataclasses.dataclass(frozen=True)
class Kept:
    """Names of nodes that stay float -> why, and sentences about patterns that need one."""

    why: Mapping[str, str]
    notes: tuple[str, ...] = ()


def match_patterns(
    model: ir.Model, patterns: Sequence[str], original: ir.Model | None = None, option: str = "--keep-float"
) -> Kept:  # fmt: skip
    """The nodes of `model` that stay float because a pattern matches them.

    A pattern is an operator type, a node's name, the name of one of its outputs, a prefix of either
    that ends before a `/`, a glob (`*/lm_head/*`), or a regular expression after `re:`.

    A pattern may also name nodes that only `original` has, the model before it was prepared: what
    computes their results now stays float in their place. Where nothing does, because they were folded
    into others or away, a note says so.

    Args:
        model: whose nodes are meant.
        patterns: see above.
        original: see above.
        option: that gave the patterns, for messages.

    Raises:
        RecipeError: a pattern matches nothing (the nearest names are offered) or is not valid.
    """
    here = list(nodes(model))
    before = [] if original is None else list(nodes(original))
    why: dict[str, str] = {}
    notes: list[str] = []
    for pattern in patterns:
        matches = _matcher(pattern, option)
        found = [node for node in here if matches(node)]
        gone = [node for node in before if matches(node)] if not found else []
        if not found and not gone:
            raise RecipeError(
                f"the pattern {pattern!r} of {option} matches no node.{_near(pattern, [*here, *before])}"
            )
        if gone:
            results = {value.name for node in gone for value in node.outputs if value.name}
            found = [node for node in here if results & {value.name for value in node.outputs}]
            notes.append(_note(pattern, gone, found))
        why.update((node.name or "", f"kept float by {pattern!r}") for node in found)
    return Kept(why, tuple(notes))


def fixed_forms(plan: Plan, model: ir.Model) -> dict[str, Form]:
    """Node names -> the form that an edited plan fixes.

    Raises:
        RecipeError: the plan has a node that the model has not; the nearest name is offered.
    """
    known = {node.name: None for node in nodes(model) if node.name}
    for entry in plan.nodes:
        if entry.node not in known:
            raise RecipeError(
                f"the plan has a node {entry.node!r} that the model has not: it was made for another "
                f"model, or edited.{nearest(entry.node, known)}"
            )
    return {entry.node: entry.form for entry in plan.nodes}


def unmet(forms: Mapping[str, Form], plan: Plan) -> list[str]:
    """Sentences about nodes that were to be integer and cannot be."""
    integer = (Form.STATIC, Form.DYNAMIC, Form.WEIGHT)
    return [
        f"{entry.node} ({entry.op}) was set to {forms[entry.node]} and is {entry.form}: {entry.why}."
        for entry in plan.nodes
        if forms.get(entry.node) in integer
        and entry.form not in (forms[entry.node], Form.ABSORBED, Form.FREE)
    ]


def _matcher(pattern: str, option: str = "--keep-float") -> Callable[[ir.Node], bool]:
    fits = _tester(pattern, option)
    return lambda node: (
        node.op_type == pattern
        or any(fits(name) for name in (node.name, *(value.name for value in node.outputs)) if name)
    )


def _tester(pattern: str, option: str) -> Callable[[str], bool]:
    """Whether a name fits the pattern."""
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise RecipeError(
                f"the pattern {pattern!r} of {option} is not a regular expression: {error}."
            ) from error
        return lambda name: expression.search(name) is not None
    prefix = pattern.rstrip("/") + "/"
    return lambda name: (
        name == pattern or fnmatch.fnmatchcase(name, pattern) or name.startswith(prefix)
    )


def _note(pattern: str, gone: Sequence[ir.Node], found: Sequence[ir.Node]) -> str:
    first = gone[0]
    what = f"{first.op_type} {first.name or first.outputs[0].name!r}"
    if len(gone) > 1:
        what += f" and {len(gone) - 1} more nodes"
    instead = (
        f"; {', '.join(repr(node.name) for node in found)} now computes that and stays float"
        if found
        else " or away, so there is nothing left to keep float"
    )
    return (
        f"The pattern {pattern!r} of --keep-float names {what}, folded into other nodes{instead}."
    )


def _near(pattern: str, known: Sequence[ir.Node]) -> str:
    names = dict.fromkeys(node.name for node in known if node.name)
    words = [*names, *sorted({node.op_type for node in known})]
    plain = "" if pattern.startswith("re:") else pattern
    close = difflib.get_close_matches(plain, words, n=_NEAREST, cutoff=0.3)
    return f" The nearest names: {', '.join(map(repr, close))}." if close else ""
