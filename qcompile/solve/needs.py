"""Which statistics the solvers and the passes need of which tensors, and whose they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import onnx_ir as ir

from qcompile.calib.observe import Observed
from qcompile.calib.stats import TensorStats
from qcompile.graph.edit import array, attribute, graphs, is_op
from qcompile.plan.tensors import Coding
from qcompile.run.probe import Fact
from qcompile.step import Need, Pass, merge_needs

_RENAMES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_WEIGHED = ("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN", "Einsum")
_MATRIX = ("MatMul", "Gemm")
_SHOWN = 3  # bad samples that are named


def source_of(value: ir.Value) -> ir.Value:
    """The tensor that `value` holds the same numbers as, perhaps in another shape or order."""
    node = value.producer()
    while node is not None and is_op(node, *_RENAMES) and node.inputs[0] is not None:
        if node.graph is not value.graph or array(node.inputs[0]) is not None:
            break
        value = node.inputs[0]
        node = value.producer()
    return value


def wanted(
    model: ir.Model, coding: Coding, conv_inputs: Collection[str], steps: Iterable[Pass] = (), *,
    histogram: bool,
) -> dict[str, Need]:  # fmt: skip
    """What solving a plan takes: the range of each coded tensor, and means by channel before convolutions.

    Args:
        model: the prepared graph.
        coding: its coded tensors; one that only renames another is not observed again.
        conv_inputs: names of those whose channels are needed.
        steps: passes whose own needs are added.
        histogram: whether a range method reads histograms.
    """
    needs = [Need(source_of(v).name or "", histogram=histogram) for v in coding.tensors]
    needs += [Need(name, histogram=histogram, channels=True) for name in conv_inputs]
    needs += [need for step in steps for need in step.needs(model)]
    return merge_needs(needs)


def everything(
    model: ir.Model, coding: Coding, facts: Mapping[str, Fact], steps: Iterable[Pass] = (), *, gram: bool
) -> dict[str, Need]:  # fmt: skip
    """All that any method may ask for later: of coded tensors, and of what weights are multiplied with.

    With `gram` also X'X of what MatMul, Gemm and 1x1 Conv multiply weights with.
    """
    needs = [Need(source_of(v).name or "", histogram=True, channels=True) for v in coding.tensors]
    for node in model.graph:
        if not is_op(node, *_WEIGHED):
            continue
        for value in node.inputs[:2]:
            if value is None or array(value) is not None or not _is_float(value, facts):
                continue
            source = source_of(value)
            if source is not value:
                needs.append(Need(source.name or "", histogram=True))
            weighs = value is node.inputs[0] and array(node.inputs[1]) is not None
            needs.append(
                Need(value.name or "", source is value, channels=True,
                     gram=gram and weighs and _has_rows(node))
            )  # fmt: skip
    needs += [need for step in steps for need in step.needs(model)]
    return merge_needs(needs)


def unobserved(model: ir.Model, needs: Mapping[str, Need]) -> dict[str, str]:
    """Nodes with weights whose inputs cannot be observed, and of which less is known than asked; why."""
    found = {}
    for graph in graphs(model):
        for node in graph:
            if not is_op(node, *_WEIGHED) or node.inputs[0] is None:
                continue
            name = node.name or node.outputs[0].name or ""
            if graph is not model.graph:
                found[name] = (
                    f"{node.op_type} in a body of If, Loop or Scan: only the main graph is observed"
                )
            elif (
                any(need.gram for need in needs.values())
                and is_op(node, "Conv")
                and not _has_rows(node)
            ):
                found[name] = "no X'X: only 1x1 convolutions multiply rows of channels"
    return found


def _has_rows(node: ir.Node) -> bool:
    """Whether the node multiplies its weight with rows along the channel axis of its input."""
    if is_op(node, *_MATRIX):
        return not (is_op(node, "Gemm") and attribute(node, "transA", 0))
    weight = array(node.inputs[1]) if is_op(node, "Conv") else None
    ungrouped = attribute(node, "group", 1) == 1
    return weight is not None and ungrouped and all(side == 1 for side in weight.shape[2:])


def _is_float(value: ir.Value, facts: Mapping[str, Fact]) -> bool:
    fact = facts.get(value.name or "")
    return fact is not None and fact.is_float


def named(
    coding: Coding, found: Mapping[str, TensorStats]
) -> tuple[dict[str, TensorStats], frozenset[str]]:
    """Statistics by the name of each tensor, of its own or of the one that it renames; coded tensors without.

    Stored statistics may lack tensors: they were gathered for another target, or with other options.
    """
    stats, lacking = dict(found), set()
    for value in coding.tensors:
        name, source = value.name or "", found.get(source_of(value).name or "")
        own = found.get(name)
        if own is not None and own.histogram is None and source is not None:
            stats[name] = dataclasses.replace(own, histogram=source.histogram)
        elif own is None and source is not None:
            stats[name] = source
        elif own is None:
            lacking.add(name)
    return stats, frozenset(lacking)


def notes_on(found: Observed, memory: int) -> tuple[str, ...]:
    """Sentences on how statistics came about: passes over the data, samples left out."""
    notes = []
    if found.passes > 1:
        notes.append(
            f"The data was read {found.passes} times, to observe no more than {_size(memory)} at once "
            "(--memory allows more)."
        )
    if found.bad:
        shown = "; ".join(map(str, found.bad[:_SHOWN]))
        more = f"; and {len(found.bad) - _SHOWN} more" if len(found.bad) > _SHOWN else ""
        what = "1 bad sample was" if len(found.bad) == 1 else f"{len(found.bad)} bad samples were"
        notes.append(f"{what} left out: {shown}{more}.")
    return tuple(notes)


def _size(count: int) -> str:
    return f"{count >> 20} MB" if count >= 1 << 20 else f"{count} bytes"
