"""The last phase before verification: the prepared graph, a plan and its solution become a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes import common

from passes.channels_last import ChannelsLast
from passes.fuse_rotary import FuseRotary
from passes.guard_float import GuardFloat
from passes.insert_qdq import InsertQdq
from passes.lower_attention import LowerAttention
from passes.lower_dynamic import LowerDynamic
from passes.lower_embedding import LowerEmbedding
from passes.lower_integer import LowerInteger
from passes.lower_nbits import LowerNbits
from passes.lower_recurrent import LowerRecurrent
from passes.name_nodes import NameNodes
from passes.pad_channels import PadChannels
from qcompile.graph import io
from qcompile.graph.documentation import documentation, restore
from qcompile.graph.edit import drop_unread
from qcompile.plan.candidates import Candidate
from qcompile.plan.make import find_candidates
from qcompile.plan.plan import Form, Plan
from qcompile.plan.tensors import coding
from qcompile.quant.scheme import QParams
from qcompile.run.probe import Fact
from qcompile.solve.weights import Weight, blocked
from qcompile.step import run_pass
from qcompile.targets.schema import Target

Format = Literal["qdq", "fused"]
_QDQ_OPSET = 13  # per-axis DequantizeLinear


@dataclasses.dataclass(frozen=True)
class Solution:
    """What was solved for a plan: parameters by tensor name, weights by node name."""

    params: Mapping[str, QParams]
    weights: Mapping[str, Weight]


def build(
    prepared: ir.Model, plan: Plan, solution: Solution, target: Target, facts: Mapping[str, Fact],
    form: Format,
) -> ir.Model:  # fmt: skip
    """A new quantized model; `prepared` is not changed.

    Raises:
        ModelError: the portable form needs a newer opset than the model can be raised to.
    """
    model = prepared.clone()
    found = find_candidates(model, target, facts)
    blocks = {
        entry.node: blocked(item.node, solution.weights[entry.node])
        for entry in plan.of(Form.WEIGHT)
        if isinstance(item := found[entry.node], Candidate) and item.role == "dynamic"
    }
    if blocks:
        run_pass(LowerNbits(blocks), model)
        found = find_candidates(model, target, facts)
    lower: Literal["fused", "portable"] = "fused" if form == "fused" else "portable"
    run_pass(LowerDynamic(plan, found, solution.weights, lower), model)
    if form == "fused":
        run_pass(LowerAttention(facts), model)
        run_pass(FuseRotary(facts), model)
    run_pass(LowerRecurrent(plan, found, lower, target.saturating), model)
    run_pass(LowerEmbedding(plan, found, solution.weights, lower), model)
    # Their results are new values, under the names of the old ones: candidates that read them are found anew.
    found = find_candidates(model, target, facts)
    tensors = coding(model, plan, found)
    run_pass(InsertQdq(plan, found, tensors, solution.params, solution.weights), model)
    if form == "fused":
        run_pass(LowerInteger(plan), model)
        run_pass(ChannelsLast(facts), model)
    run_pass(GuardFloat(plan, fused=form == "fused"), model)
    low = model.opset_imports.get("", _QDQ_OPSET) < _QDQ_OPSET
    if form == "qdq" and plan.quantizes and low:
        model = io.convert_opset(model, _QDQ_OPSET)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        run_pass(NameNodes(), model)
    run_pass(PadChannels(target.channel_block), model)
    drop_unread(model)
    restore(model, documentation(prepared))
    model.graph.sort()
    return model
