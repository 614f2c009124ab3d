"""The metrics of the evaluation kit on its calibration split, for `--metric kit_metric:score` (see `bench_budget.py`).

The environment names the kit (QCOMPILE_EVAL) and the task (QCOMPILE_TASK). The evaluation split is not read.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, os.environ["QCOMPILE_EVAL"])


def score(session: Any) -> npt.NDArray[np.float64]:
    """The task's main metric on the labelled samples that calibrate, as one number a sample whose mean it is.

    These are the pseudo-values of the jackknife, N m - (N - 1) m(without the sample), for a metric m of any kind (Tukey
    1958): their standard error is the metric's sampling noise.
    """
    from evaluate import TASKS  # of the kit

    task = TASKS[os.environ["QCOMPILE_TASK"]]
    samples = (task.load(item) for item in task.items("calib"))
    results = [task.reduce(task.infer(session, feed), label) for feed, label in samples]

    def metric(part: list[Any]) -> float:
        return float(next(iter(task.score(part).values())))

    whole, count = metric(results), len(results)
    left = np.array(
        [metric(results[:i] + results[i + 1 :]) for i in range(count if count > 1 else 0)]
    )
    if count < 2 or not np.isfinite(left).all():  # a metric that one sample alone makes possible
        return np.array([whole])
    values = count * whole - (count - 1) * left
    # the mean is the metric, without the jackknife's correction
    return np.asarray(values + (whole - values.mean()))
