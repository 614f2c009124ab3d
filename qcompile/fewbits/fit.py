"""A model's bits and blocks within the size that its recipe allows: measured, shared out, and told."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from passes.lower_nbits import Form
from qcompile.fewbits.assign import Assignment, asked_bits
from qcompile.fewbits.damage import costs_of_weights
from qcompile.fewbits.forms import raised
from qcompile.fewbits.share import Shares, check_room, matrices, room, share
from qcompile.fewbits.size import other_bytes
from qcompile.fewbits.sweep import measured_costs
from qcompile.graph import io
from qcompile.opened import Opened
from qcompile.progress import Progress
from qcompile.recipe import Recipe
from qcompile.run.session import Feed

_SAMPLES = 8  # calibration feeds for second moments
_JUDGES = 2  # held-out feeds that errors are measured on


def fit(
    opened: Opened, prepared: ir.Model, assignment: Assignment, form: Form, show: Progress
) -> Shares:
    """The schemes that cost the model least within `max_size` and `bits_per_weight`; a note says what they are.

    Args:
        opened: the model, its data and its recipe.
        prepared: the float graph whose matrices `assignment` has; not changed.
        assignment: any schemes.
        form: of the result.
        show: shows the stage.

    Raises:
        LimitError: the smallest schemes are too large.
        RecipeError: a pattern of `bits_for` matches nothing.
    """
    recipe = opened.recipe
    asked = asked_bits(prepared, recipe.bits_for, opened.original)
    found = matrices(assignment, recipe, asked, form)
    before = bytes_before(opened)
    others = 0
    if recipe.size_limit is not None:
        schemes = [scheme for one in found for scheme in one.schemes]
        high = raised(prepared.clone(), recipe, schemes) if form == "portable" else prepared
        others = other_bytes(high, assignment.chosen, form)
    limit = room(recipe, found, before, others)
    check_room(recipe, found, limit, others)
    with show.stage("measuring matrices") as step:
        if opened.samples is None:
            costs = costs_of_weights(found, recipe)
        else:
            # the longest: a position costs least there
            judges = sorted(opened.samples.held_out(), key=_elements, reverse=True)[:_JUDGES]
            costs = measured_costs(
                prepared, found, opened.samples.few(_SAMPLES), judges, opened.facts, recipe, lambda: step(1, None)
            )  # fmt: skip
    made = share(assignment, found, costs, limit)
    how = (
        "the error of their weights"
        if opened.samples is None
        else "what their errors do to the outputs"
    )
    opened.notes.append(
        f"{made.bits:.3f} bits a weight, scales and zero points included, {made.nbytes / 1e6:.2f} MB, shared out by {how}: "
        f"{made.summary()}."
    )
    return made


def _elements(feed: Feed) -> int:
    return sum(np.asarray(value).size for value in feed.values())


def bytes_before(opened: Opened) -> int:
    """Bytes of the float model: of its file if there is one."""
    if opened.path is not None:
        return io.file_bytes(opened.path)
    return io.weight_bytes(opened.original)


def too_large(recipe: Recipe, before: int, after: int) -> str | None:
    """A sentence if a result of `after` bytes, of a float model of `before`, is larger than the recipe allows."""
    limit = recipe.size_limit
    if limit is None or recipe.bits is None:
        return None
    most = limit.of(before / 1e6)
    if after / 1e6 <= most:
        return None
    return f"the size is {after / 1e6:.2f} MB, the limit is {most:.2f} MB."
