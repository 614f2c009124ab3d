"""The metrics of the evaluation kit on its calibration split, for `--metric kit_metric:score` (see `bench_budget.py`).

The environment names the kit (QCOMPILE_EVAL) and the task (QCOMPILE_TASK). The evaluation split is not read.
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.environ["QCOMPILE_EVAL"])


def score(session: Any) -> float:
    """The task's main metric on the labelled samples that calibrate."""
    from evaluate import TASKS  # of the kit

    task = TASKS[os.environ["QCOMPILE_TASK"]]
    samples = (task.load(item) for item in task.items("calib"))
    results = [task.reduce(task.infer(session, feed), label) for feed, label in samples]
    return float(next(iter(task.score(results).values())))
