"""Which products can be smoothed, where their scale goes, and which scale it is.

Products that read the same tensor (q, k and v; gate and up) are smoothed together: they share its codes. The scale goes
into what makes the tensor, if only these products read it; else one Mul by 1/s is put before them, which is cheap
beside a float product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.algo.smoothquant import search_scale
from qcompile.calib.moments import groups_within
from qcompile.calib.taps import with_outputs
from qcompile.graph.edit import array, attribute, is_op, sole_user
from qcompile.quant.scheme import Scheme
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session

Array = npt.NDArray[Any]

_MEMORY = 128 << 20
_ROWS = 128  # of a sample
_COLUMNS = 1024  # of all weights of a group, that alpha is searched on


@dataclasses.dataclass(frozen=True)
class LinearGroup:
    """Products that read one tensor.

    Attributes:
        tensor: its name.
        nodes: the products' names.
        fold: name of the node that takes 1/s; "" if it needs a Mul.
    """

    tensor: str
    nodes: tuple[str, ...]
    fold: str = ""


@dataclasses.dataclass(frozen=True)
class Smoothing:
    """What becomes of a group.

    Attributes:
        group: the products.
        scale: s, float32 (K,): inputs are divided by it, rows of weights multiplied.
        alpha: that it was made with.
        before, after: relative error of the quantized products on held-out rows.
    """

    group: LinearGroup
    scale: Array
    alpha: float = 0.5
    before: float = 0.0
    after: float = 0.0

    @property
    def fold(self) -> str:
        """The node that takes 1/s, or nothing."""
        return self.group.fold


def linear_groups(
    model: ir.Model, products: Iterable[str]
) -> tuple[list[LinearGroup], dict[str, str]]:
    """The products of the main graph by the tensor that they read, and why others cannot be smoothed, by name.

    Args:
        model: the prepared graph.
        products: names of MatMul and Gemm nodes with constant weights.
    """
    wanted, refused = set(products), {}
    by_tensor: dict[str, list[ir.Node]] = {}
    values: dict[str, ir.Value] = {}
    for node in model.graph:
        if node.name not in wanted:
            continue
        wanted.discard(node.name)
        why = refusal(node)
        if why:
            refused[node.name or ""] = why
            continue
        value = node.inputs[0]
        assert value is not None
        by_tensor.setdefault(value.name or "", []).append(node)
        values[value.name or ""] = value
    refused |= dict.fromkeys(wanted, "it is in a body of If, Loop or Scan")
    groups = [
        LinearGroup(name, tuple(n.name or "" for n in nodes), fold_target(values[name], nodes))
        for name, nodes in by_tensor.items()
    ]
    return groups, refused


def refusal(node: ir.Node) -> str:
    """Why a node's weight cannot take scales of its input channels; empty if it can."""
    if not is_op(node, "MatMul", "Gemm") or node.inputs[0] is None:
        return "it is no product"
    weight = array(node.inputs[1])
    if weight is None or weight.ndim != 2:
        return "its weight is no constant matrix"
    if attribute(node, "transA", 0):
        return "transA is set"
    return ""


def depth(node: ir.Node) -> int:
    """K, the number of input channels of a product."""
    weight = array(node.inputs[1])
    assert weight is not None
    return int(weight.shape[1 if attribute(node, "transB", 0) else 0])


def matrix(node: ir.Node) -> Array:
    """The weight as float32 (K, N)."""
    weight = array(node.inputs[1])
    assert weight is not None
    return np.asarray(weight.T if attribute(node, "transB", 0) else weight, np.float32)


def fold_target(value: ir.Value, nodes: Sequence[ir.Node]) -> str:
    """The name of the node that can divide `value` by a scale of its last axis for these readers alone."""
    ids = {id(node) for node in nodes}
    uses = list(value.uses())
    if value.is_graph_output() or any(id(u.node) not in ids or u.idx != 0 for u in uses):
        return ""
    node = value.producer()
    if node is None or node.graph is not value.graph:
        return ""
    return (node.name or "") if takes_scale(node, depth(nodes[0])) else ""


def takes_scale(node: ir.Node, width: int) -> bool:
    """Whether constants of a node can divide its result by a vector along the last axis of that width."""
    if is_op(node, "LayerNormalization"):
        vectors = [array(value) for value in node.inputs[1:3] if value is not None]
        return attribute(node, "axis", -1) == -1 and all(
            v is not None and v.shape == (width,) for v in vectors
        )
    if is_op(node, "Mul"):
        return any(_is_vector(value, width) for value in node.inputs)
    if is_op(node, "Add"):
        return _biased(node, width) is not None
    if is_op(node, "MatMul", "Gemm") and not refusal(node):
        return matrix(node).shape[1] == width and _plain_bias(node, width)
    return False


def _biased(node: ir.Node, width: int) -> ir.Node | None:
    """The product behind an Add of a constant vector, if nobody else reads it."""
    for x, bias in (node.inputs, node.inputs[::-1]):
        made = None if x is None else x.producer()
        if made is None or x is None or not _is_vector(bias, width) or sole_user(x) is not node:
            continue
        if is_op(made, "MatMul") and not refusal(made) and matrix(made).shape[1] == width:
            return made
    return None


def biased_product(node: ir.Node) -> ir.Node | None:
    """The product whose bias a node adds, if it is such an Add."""
    widths = {v.shape[-1] for v in map(array, node.inputs) if v is not None and v.ndim}
    return _biased(node, widths.pop()) if is_op(node, "Add") and len(widths) == 1 else None


def _plain_bias(node: ir.Node, width: int) -> bool:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or _is_vector(bias, width)


def _is_vector(value: ir.Value | None, width: int) -> bool:
    """Whether a constant has one number for each place of the last axis."""
    values = array(value)
    return (
        values is not None
        and values.ndim > 0
        and values.shape[-1] == width
        and values.size == width
    )


def solve_smoothing(
    model: ir.Model, facts: Mapping[str, Fact], products: Sequence[str], samples: Sequence[Feed],
    held_out: Sequence[Feed], *, weight: str, saturating: bool, threads: int = 0,
) -> dict[str, Smoothing]:  # fmt: skip
    """The smoothings that lower the error of their products on held-out samples, by the name of the tensor.

    Args:
        model: the prepared float graph; run once on each sample.
        facts: sizes of tensors.
        products: names of MatMul and Gemm nodes whose inputs are quantized at run time.
        samples: feeds that choose the scale.
        held_out: feeds that judge it.
        weight: spelling of the scheme of weights.
        saturating: weights have 7 bits, as the target's kernels would overflow with 8.
        threads: of a run.
    """
    groups, _ = linear_groups(model, products)
    by_name = {node.name: node for node in model.graph}
    by_tensor = {group.tensor: group for group in groups}
    scheme = Scheme.parse(weight.replace("axis0", "axis1"))
    if saturating and scheme.bits is None:
        scheme = dataclasses.replace(scheme, bits=7)
    found = {}
    for names in groups_within(by_tensor, facts, _MEMORY // max(1, len(samples))):
        options = Options("all", threads=threads, in_order=True)
        session = Session(with_outputs(model, names), options)
        ours, theirs = (_rows(session, names, feeds) for feeds in (samples, held_out))
        for name in names:
            group = by_tensor[name]
            weights = [matrix(by_name[node]) for node in group.nodes]
            if any(x.shape[-1] != w.shape[0] for x in ours[name] for w in weights):
                continue
            smoothed = search_scale(ours[name], theirs[name], _thinned(weights), scheme)
            if smoothed is not None:
                found[name] = Smoothing(
                    group, smoothed.scale, smoothed.alpha, smoothed.before, smoothed.after
                )
    return {name: found[name] for name in by_tensor if name in found}


def _rows(session: Session, names: Sequence[str], feeds: Sequence[Feed]) -> dict[str, list[Array]]:
    """Some rows of each tensor and sample: those that reach furthest, and others evenly spread."""
    found: dict[str, list[Array]] = {name: [] for name in names}
    for feed in feeds:
        for name, values in zip(names, session.run(feed, names), strict=True):
            rows = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
            if len(rows) > _ROWS:
                # the extremes decide the scale of a sample, so they must be among those kept
                ends = np.unique([*rows.argmax(axis=0), *rows.argmin(axis=0)])
                far = ends[np.argsort(-np.abs(rows[ends]).max(axis=1))][: _ROWS // 2]
                rows = rows[
                    np.unique([*far, *np.linspace(0, len(rows) - 1, _ROWS // 2).astype(int)])
                ]
            if len(rows):
                found[name].append(np.array(rows, np.float32))
    return found


def _thinned(weights: Sequence[Array]) -> list[Array]:
    """Evenly spread columns of wide weights."""
    step = max(1, sum(w.shape[1] for w in weights) // _COLUMNS)
    return [w[:, ::step] for w in weights]
