"""What noise a plan will have: sensitivities by site, corrected by every plan that was measured whole.

The noise of a plan is modelled as the sum of its terms: one for each tensor that it rounds, each dynamic product, each
rounded weight. Measured sensitivities are the first guess; how far they may be off is a Gaussian, so that a measured plan
moves its own terms and, through a common factor, all others (recursive least squares).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from qcompile import tune
from qcompile.plan.make import Request
from qcompile.plan.plan import Form, Plan
from qcompile.quant.affine import dequantize
from qcompile.verify.sensitivity import Noise
from qcompile.workshop import Ranging, Workshop

_OWN, _COMMON = 0.6, 0.5  # how far a term may be off, as a share of it: alone, and with all others
_LEAST = 0.02  # of the mean term, that each may be off
_SPREAD = 0.03  # of a measured plan's noise

_QUIETER = 0.6  # of the noise of a dynamic product, that is left with scales by block (a decoder, one row: 0.66 measured)
_TENSOR, _WEIGHT, _BLOCK = "tensor", "weight", "block"
Term = tuple[str, str]


class Estimate:
    """Predicts the noise of plans of one workshop, and learns."""

    def __init__(self, shop: Workshop, plan: Plan, ranging: Ranging, noise: Noise) -> None:
        """`plan` is the one that `noise` was measured on."""
        self._shop = shop
        terms: dict[Term, float] = {
            (_TENSOR, name): value for name, value in tune.by_tensor(shop, plan, noise).items()
        }
        shares = weight_shares(shop, plan, ranging)
        terms |= {(_WEIGHT, name): noise.weights * share for name, share in shares.items()}
        for entry in plan.of(Form.DYNAMIC):
            both = sum(terms.get((kind, entry.node), 0.0) for kind in (_TENSOR, _WEIGHT))
            terms[_BLOCK, entry.node] = _QUIETER * both
        for entry in plan.of(
            Form.WEIGHT
        ):  # what its kernel does to the input is left to what is measured
            terms[_BLOCK, entry.node] = terms.get((_WEIGHT, entry.node), 0.0)
        self._place = {term: i for i, term in enumerate(terms)}
        self._mean = np.array(list(terms.values()), np.float64)
        own = _OWN * self._mean + _LEAST * (self._mean.mean() if terms else 0.0)
        # The covariance: a diagonal, and products of a vector with itself, the first of them common to all terms; never
        # written out, for a large graph has tens of thousands of terms.
        self._alone = own**2
        self._together = [(_COMMON**2, self._mean)]

    def terms(self, plan: Plan) -> list[int]:
        """The places of a plan's terms."""
        found: list[Term] = [(_TENSOR, v.name or "") for v in self._shop.coding(plan).roots]
        found += [(_TENSOR, entry.node) for entry in plan.of(Form.DYNAMIC)]
        found += [(_WEIGHT, entry.node) for entry in plan.of(Form.STATIC, Form.DYNAMIC)]
        found += [(_BLOCK, entry.node) for entry in plan.of(Form.WEIGHT)]
        return [self._place[term] for term in dict.fromkeys(found) if term in self._place]

    def of(self, plan: Plan) -> float:
        """The noise-to-signal ratio that a plan is expected to have."""
        return float(np.maximum(self._mean[self.terms(plan)], 0.0).sum())

    def learn(self, plan: Plan, noise: float) -> None:
        """A plan had this noise-to-signal ratio."""
        row = np.zeros(len(self._mean))
        row[self.terms(plan)] = 1.0
        reach = self._alone * row
        for factor, vector in self._together:
            reach += factor * float(vector @ row) * vector
        total = float(row @ reach) + (_SPREAD * noise) ** 2
        if total <= 0:
            return
        gain = reach / total
        self._mean = self._mean + gain * (noise - float(row @ self._mean))
        self._together.append((-1 / total, reach))

    def request(self, request: Request, most: float) -> Request:
        """A request for the cheapest plan of at most this noise."""
        values = np.maximum(self._mean, 0.0)
        noise, weights, blocks = (
            {name: float(values[i]) for (kind, name), i in self._place.items() if kind == wanted}
            for wanted in (_TENSOR, _WEIGHT, _BLOCK)
        )
        return dataclasses.replace(
            request, noise=noise, weights=weights, block_noise=blocks, most_noise=most
        )


def weight_shares(shop: Workshop, plan: Plan, ranging: Ranging) -> dict[str, float]:
    """How the noise of rounded weights divides among nodes, by name; the sum is 1.

    A layer's share is taken as its weight's own noise-to-signal ratio, the power of rounding errors (steps squared
    over 12) over that of the weight: where layers follow each other, relative errors add up.
    """
    found = {}
    for name, weight in shop.solve(plan, ranging).weights.items():
        signal = float(
            np.mean(np.square(dequantize(weight.codes, weight.params), dtype=np.float64))
        )
        steps = np.square(weight.params.scale, dtype=np.float64)
        found[name] = float(np.mean(steps)) / 12 / signal if signal > 0 else 0.0
    total = sum(found.values())
    return {name: value / total for name, value in found.items()} if total > 0 else {}
