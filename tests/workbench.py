"""A compilation stopped before its search: the workshop, calibrated, with a first plan."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from lowering import TARGET, eager
from networks import from_text

from qcompile.calib.stats import TensorStats
from qcompile.opened import Opened, open_model
from qcompile.plan.plan import Form
from qcompile.progress import Silent
from qcompile.recipe import Recipe
from qcompile.targets.schema import Boundary, Cost, Target
from qcompile.workshop import Workshop

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

    from qcompile.plan.make import Request
    from qcompile.plan.plan import Plan

    Feed = dict[str, NDArray[Any]]

QUICK = Recipe(threads=1, bench_seconds=0.01)
PAD = "pads = [1, 1, 1, 1]"


@dataclasses.dataclass
class Bench:
    """What `compile_model` has at hand when the search for the best attempt begins."""

    opened: Opened
    shop: Workshop
    request: Request
    draft: Plan

    def forms(self, plan: Plan | None = None) -> dict[str, str]:
        """The form of each node of a plan, by name; of the first one if none is given."""
        return {entry.node: entry.form.value for entry in (plan or self.draft).nodes}


def costless(name: str = TARGET) -> Target:
    """A target whose integer kernels and borders cost nothing: all that can be integer is."""
    found = eager(name)
    rows = tuple(dataclasses.replace(row, int8=Cost()) for row in found.op)
    return dataclasses.replace(found, op=rows, boundary=Boundary(0, 0, 0, 0))


def workbench(
    model: onnx.ModelProto, data: list[Feed] | None, recipe: Recipe = QUICK, target: Target | None = None
) -> Bench:  # fmt: skip
    """As `compile_model` prepares it, for a target where all that can be integer is."""
    opened = open_model(model, data, recipe)
    opened.target = target or costless()
    request = opened.request()
    shop = Workshop(
        opened.prepared, opened.target, opened.facts, recipe, opened.samples, opened.reference(), Silent()
    )  # fmt: skip
    draft = shop.plan(request)
    if draft.of(Form.STATIC, Form.FREE):
        shop.calibrate(draft)
        request = dataclasses.replace(request, keep_float=shop.unusable())
        draft = shop.plan(request)
    return Bench(opened, shop, request, draft)


def small_cnn() -> onnx.ModelProto:
    """`x (N, 4, 8, 8)` -> `stem` Conv, `act` Relu, `gate` Sigmoid, `mul`, `body` Conv, `add` -> `y`."""
    return from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) "
        f"{{ [stem] a = Conv<{PAD}>(x, k, b) [act] r = Relu(a) [gate] s = Sigmoid(r) [mul] m = Mul(r, s) "
        f"[body] c = Conv<{PAD}>(m, l) [add] y = Add(c, x) }}",
        k=weight(4, 4, 3, 3), b=weight(4), l=weight(4, 4, 3, 3, seed=1),
    )  # fmt: skip


def weight(*shape: int, seed: int = 0, scale: float = 1.0) -> NDArray[np.float32]:
    """Random numbers that keep the size of what they multiply: (out, in, ...) or (in, out)."""
    fan = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
    made = np.random.default_rng([11, seed]).normal(size=shape) * scale / np.sqrt(max(fan, 1))
    return made.astype(np.float32)


def images(count: int = 12, *, channels: int = 4, side: int = 8, seed: int = 0) -> list[Feed]:
    """Samples of one input `x` (1, channels, side, side)."""
    rng = np.random.default_rng([12, seed])
    return [
        {"x": rng.normal(size=(1, channels, side, side)).astype(np.float32)} for _ in range(count)
    ]


def plant(stats: TensorStats, factor: float) -> None:
    """One sample has a largest value so many times as large as all samples had; the histogram lacks it."""
    far = factor * stats.high
    stats.extremes.high_sum += far - float(stats.extremes.highs[0])
    stats.extremes.highs[0], stats.high = far, far
