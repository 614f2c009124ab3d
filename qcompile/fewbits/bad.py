"""Samples for which the float model makes NaN: a run of all samples finds them, so only where there is reason to look."""

from __future__ import annotations

from qcompile.calib.observe import Settings, observe
from qcompile.calib.split import Samples
from qcompile.errors import DataError
from qcompile.fewbits.assign import assign
from qcompile.fewbits.sequential import tap
from qcompile.opened import Opened
from qcompile.progress import Progress
from qcompile.solve.needs import notes_on
from qcompile.step import Need


def check_samples(opened: Opened, show: Progress) -> None:
    """Leave out samples for which an input of a matrix or an output holds NaN or an odd infinity, where that is asked for.

    Raises:
        DataError: there are some, and they are not to be left out; or no sample is good.
    """
    samples, recipe, prepared = opened.samples, opened.recipe, opened.prepared
    if not isinstance(samples, Samples):  # those of statistics were looked at before
        return
    chosen = assign(prepared, recipe, opened.original).chosen
    names = {tap(item, prepared) for item, _ in chosen} | {
        v.name or "" for v in prepared.graph.outputs
    }
    needs = {n: Need(n) for n in sorted(names) if n in opened.facts and opened.facts[n].is_float}
    if not needs:
        return
    for feeds, judging in ((samples.calibration, False), (samples.numbered, True)):
        settings = Settings(
            recipe.memory, recipe.threads, skip_bad=recipe.skip_bad, allow_all_bad=judging
        )
        with show.stage("looking for bad samples") as step:
            found = observe(
                prepared, needs, feeds, opened.facts, settings, lambda *_: step(1, None)
            )
        samples.leave_out({one.sample for one in found.bad})
        opened.notes.extend(notes_on(found, recipe.memory))
    if not samples.held_out_count:
        raise DataError("every held-out sample is bad: give more samples with --data.")
