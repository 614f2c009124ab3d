"""Samples for which the float model makes NaN, found when moments have them: it costs a run of all samples, so only then."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qcompile.calib.observe import Settings, observe
from qcompile.calib.split import Samples
from qcompile.fewbits.sequential import Chosen, tap
from qcompile.opened import Opened
from qcompile.progress import Progress
from qcompile.solve.needs import notes_on
from qcompile.step import Need


def leave_out_bad(
    opened: Opened, prepared: ir.Model, chosen: Sequence[Chosen], show: Progress
) -> bool:
    """Leave out samples for which an input of a matrix holds NaN or an odd infinity; whether there are any.

    Raises:
        DataError: there are some, and they are not to be left out; or no sample is good.
    """
    samples, recipe = opened.samples, opened.recipe
    if not isinstance(samples, Samples):  # those of statistics were looked at before
        return False
    needs = {name: Need(name) for item, _ in chosen if (name := tap(item, prepared))}
    settings = Settings(recipe.memory, recipe.threads, skip_bad=recipe.skip_bad)
    bad = 0
    for title, feeds in (
        ("looking for bad samples", samples.calibration),
        ("and among those that judge", samples.numbered),
    ):
        with show.stage(title) as step:
            found = observe(
                prepared, needs, feeds, opened.facts, settings, lambda *_: step(1, None)
            )
        samples.leave_out({one.sample for one in found.bad})
        opened.notes.extend(notes_on(found, recipe.memory))
        bad += len(found.bad)
    return bad > 0
