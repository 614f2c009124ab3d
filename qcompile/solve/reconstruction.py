"""Codes of weights searched layer by layer for least error in what the layer computes.

See `qcompile.algo.rounding` for the search. What it minimizes is made of calibration rows,

    H = E[(x - m)(x - m)'] + (0.1 mean diagonal + step^2 / 12) I

where m is the mean that the bias makes up for (0 where no bias does), step that of the input's codes, whose rounding
adds as much power to every input, and the rest keeps codes from following the noise of few rows. New codes are kept
where they lower the error on rows of other samples, with their own H and nothing added.

Biases are made anew for the means that are known of whole tensors, not those of the rows: these lack what saturates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.algo.rounding import batched, sequential
from qcompile.calib.rows import ROWS, Gram, Window, gather, window, windows_within
from qcompile.graph.edit import array, attribute, is_op
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan
from qcompile.quant.affine import dequantize
from qcompile.quant.scheme import QParams
from qcompile.run.probe import Fact
from qcompile.run.session import Feed
from qcompile.solve.weights import Weight, can_saturate, gemm_bias

Array = npt.NDArray[Any]

_MEMORY = 256 << 20
_MOST_SUMS = (
    1 << 30
)  # bytes for one layer: inputs of 8,192 elements; rows of more are left as they are
_RIDGE = 0.1  # of the mean diagonal
_ITERATIONS = 4


@dataclasses.dataclass(frozen=True)
class Gain:
    """Error power of a layer's output on held-out rows, relative to the power of the output, before and after."""

    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A node whose codes may change.

    Attributes:
        name: of the node.
        shape: how it takes rows from the tensor.
        tensor: name of its input.
        weight: float64 (groups, rows, k).
        old: its codes so far.
        mean: what its bias makes up for, float64 (groups, k); None without a bias, or where the mean is not known.
    """

    name: str
    node: ir.Node
    shape: Window
    tensor: str
    weight: Array
    old: Weight
    mean: Array | None

    @property
    def about(self) -> Array | float:
        return 0.0 if self.mean is None else self.mean

    def rows(self, values: Array) -> Array:
        """Numbers of each code, or of each output channel, by group: (groups, rows, k) or (groups, rows)."""
        groups = self.shape.groups
        if values.ndim == 1:
            return values.reshape(groups, -1)
        return values.reshape(groups, -1, self.shape.depth) if self.shape.kernel else values.T[None]

    def codes(self, rows: Array) -> Array:
        """Rows of codes relative to the zero point, in the layout and type of the old codes."""
        old = self.old.codes
        laid = rows.reshape(old.shape) if self.shape.kernel else np.ascontiguousarray(rows[0].T)
        return (laid + _spread(self, self.old.params.zero)).astype(old.dtype)


def reconstruct(
    prepared: ir.Model, plan: Plan, found: Mapping[str, Candidate | str], params: Mapping[str, QParams],
    weights: Mapping[str, Weight], samples: Iterable[Feed], held_out: Sequence[Feed],
    facts: Mapping[str, Fact], *, means: Mapping[str, Array] | None = None, rows: int = ROWS,
    memory: int = _MEMORY, threads: int = 0, tick: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Weight], dict[str, Gain]]:  # fmt: skip
    """All weights, those with better codes among them, and the gain of each of these, by node name.

    Scales and zero points stay, and all of layers whose rows are so long that H would take a GiB. Codes do not become ones that overflow 16 bits if the old ones did not.

    Args:
        prepared: the float graph.
        plan: the forms.
        found: the candidates.
        params: of the coded tensors.
        weights: codes so far, by node name. Biases of Conv are corrected for the means, if these are given.
        samples: feeds that H is made of; read once per group of tensors that fits `memory`.
        held_out: other feeds, that judge the codes found.
        facts: sizes.
        means: E[x] by channel, float64 (channels,), by name of the input tensor.
        rows: of a sample.
        memory: bytes that values and sums of a group of tensors may take.
        threads: intra-op threads, 0 for ORT's choice.
        tick: called after each layer.
    """
    done, gains = dict(weights), dict[str, Gain]()
    layers = [
        layer
        for layer in _layers(prepared, plan, found, weights, means or {})
        if 16 * layer.shape.groups * layer.shape.depth**2 <= _MOST_SUMS
    ]
    by_tensor: dict[str, list[_Layer]] = {}
    for layer in layers:
        by_tensor.setdefault(layer.tensor, []).append(layer)
    limits = {
        n: representable(params[n]) for n, own in by_tensor.items() if _is_coded(own, plan, params)
    }
    several = list(samples) if isinstance(samples, Iterator) else samples
    wanted = {name: [layer.shape for layer in own] for name, own in by_tensor.items()}
    for group in windows_within(wanted, facts, memory):
        ours, theirs = (
            gather(prepared, group, feeds, limits, most=rows, threads=threads)
            for feeds in (several, held_out)
        )
        for layer in (layer for name in group for layer in by_tensor[name]):
            key = (layer.tensor, layer.shape)
            step = float(params[layer.tensor].scale) if layer.tensor in limits else 0.0
            better = _better(layer, ours[key], theirs[key], step)
            if better is not None:
                done[layer.name], gains[layer.name] = better
            tick()
    return done, gains


def representable(params: QParams) -> tuple[float, float]:
    """The least and the greatest value that is no more than a step from what a code of a tensor says."""
    qtype, scale, zero = params.scheme.qtype, float(params.scale), int(params.zero)
    return (qtype.qmin - zero - 1) * scale, (qtype.qmax - zero + 1) * scale


def _is_coded(layers: Sequence[_Layer], plan: Plan, params: Mapping[str, QParams]) -> bool:
    """Whether the tensor that these read has the parameters given: not if only products read it as floats."""
    own = layers[0].tensor in params
    return own and any(plan[layer.name].form is Form.STATIC for layer in layers)


def _layers(
    prepared: ir.Model, plan: Plan, found: Mapping[str, Candidate | str],
    weights: Mapping[str, Weight], means: Mapping[str, Array],
) -> Iterator[_Layer]:  # fmt: skip
    for entry in plan.of(Form.STATIC, Form.DYNAMIC):
        item, old = found[entry.node], weights.get(entry.node)
        if not isinstance(item, Candidate) or old is None or item.node.graph is not prepared.graph:
            continue
        shape, x, stored = window(item.node), item.node.inputs[0], item.node.inputs[1]
        if stored is not None and len(stored.uses()) > 1:
            continue  # its other readers would need codes of their own
        if isinstance(shape, str) or x is None or x.name is None:
            continue
        empty = _Layer(entry.node, item.node, shape, x.name, np.zeros(0), old, None)
        mean = _mean(shape, old, means.get(x.name))
        yield dataclasses.replace(empty, weight=empty.rows(_floats(item.node)), mean=mean)


def _floats(node: ir.Node) -> Array:
    """The weight as it is multiplied, float64: (out, in / groups, ...) for a Conv, else (K, N)."""
    w = array(node.inputs[1])
    assert w is not None
    if is_op(node, "Gemm"):
        w = w * np.float32(attribute(node, "alpha", 1.0))
        w = w.T if attribute(node, "transB", 0) else w
    return w.astype(np.float64)


def _mean(shape: Window, old: Weight, mean: Array | None) -> Array | None:
    """The mean of each element of a row, (groups, k): in a Conv that of its channel, whatever the tap."""
    if old.bias is None or mean is None:
        return None
    taps = int(np.prod(shape.kernel)) if shape.kernel else 1
    if mean.size * taps != shape.groups * shape.depth:
        return None
    return np.repeat(np.asarray(mean, np.float64), taps).reshape(shape.groups, shape.depth)


def _better(layer: _Layer, ours: Gram, theirs: Gram, step: float) -> tuple[Weight, Gain] | None:
    """Better codes and what they gain on the rows `theirs`; None if there are none."""
    H = ours.moment(layer.about)
    judge = theirs.moment(layer.about)
    if not (ours.count.any() and np.isfinite(H).all() and np.isfinite(judge).all()):
        return None
    _add_ridge(H, step)
    old = layer.old
    qmin, qmax = _range(old.params)
    scale = layer.rows(np.broadcast_to(old.params.scale, (layer.weight[..., 0].size,)))
    start = sequential(layer.weight, scale, H, qmin, qmax)
    codes = layer.codes(batched(layer.weight, scale, H, qmin, qmax, _ITERATIONS, start))
    if can_saturate(codes) and not can_saturate(old.codes):
        return None
    before, after = (_power(layer.weight - _back(layer, c), judge) for c in (old.codes, codes))
    if not after < before:
        return None
    full = max(_power(layer.weight, theirs.moment()), np.finfo(np.float64).tiny)
    with np.errstate(over="ignore"):  # of a layer that makes nothing
        gain = Gain(before / full, after / full)
    return Weight(codes, old.params, _bias(layer, codes)), gain


def _add_ridge(H: Array, step: float) -> None:
    place = np.arange(H.shape[1])
    power = H[:, place, place]
    H[:, place, place] = power + _RIDGE * power.mean(axis=1, keepdims=True) + step**2 / 12


def _range(params: QParams) -> tuple[int, int]:
    """The least and the greatest code less the zero point, of all channels."""
    zero, scheme = params.zero.astype(np.int64), params.scheme
    return scheme.qmin - int(zero.min()), scheme.qmax - int(zero.max())


def _spread(layer: _Layer, values: Array) -> Array:
    """Numbers by output channel in the layout of the codes."""
    if values.ndim == 0 or not layer.shape.kernel:
        return values
    return values.reshape(-1, *(1,) * (layer.old.codes.ndim - 1))


def _back(layer: _Layer, codes: Array) -> Array:
    return layer.rows(dequantize(codes, layer.old.params).astype(np.float64))


def _power(off: Array, gram: Array) -> float:
    """E|off x|^2, summed over all rows of all groups."""
    x = off.astype(np.float32)
    return float(np.einsum("gok,gok->", np.matmul(x, gram.astype(np.float32)), off))


def _bias(layer: _Layer, codes: Array) -> Array | None:
    """The bias for these codes: for a Conv the old one less what they shift more, for a Gemm its own corrected."""
    old = layer.old
    if old.bias is None or layer.mean is None:
        return old.bias
    shift = np.einsum("gok,gk->go", layer.weight - _back(layer, codes), layer.mean).reshape(-1)
    if layer.shape.kernel:
        before = np.einsum("gok,gk->go", layer.weight - _back(layer, old.codes), layer.mean)
        own = old.bias.astype(np.float64) - before.reshape(-1)
    else:
        plain = gemm_bias(layer.node, old.codes.shape[1])
        own = np.zeros(1) if plain is None else plain.astype(np.float64)
    bias: Array = (own + shift).astype(np.float32)
    return bias
