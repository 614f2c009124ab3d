"""The first phase: float rewrites that need no data and leave the function as it was."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from passes.drop_identity import DropIdentity
from passes.fold_affine import FoldAffine
from passes.fold_batchnorm import FoldBatchnorm
from passes.fold_constants import FoldConstants
from passes.fold_gate import FoldGate
from passes.fold_shapes import FoldShapes
from passes.fold_shuffle import FoldShuffle
from passes.fuse_hard_swish import FuseHardSwish
from passes.group_heads import GroupHeads
from passes.inline_if import InlineIf
from passes.name_nodes import NameNodes
from passes.pool_to_conv import PoolToConv
from qcompile.errors import ModelError, RefusedError, brief
from qcompile.graph import io
from qcompile.graph.documentation import documentation, restore
from qcompile.graph.edit import drop_unread
from qcompile.run.probe import Fact, probe
from qcompile.run.session import Feed, Session
from qcompile.step import Outcome, Pass, run_pass

logger = logging.getLogger(__name__)

PASSES: Sequence[Pass] = (
    NameNodes(), InlineIf(), FoldConstants(), DropIdentity(), FoldBatchnorm(), FoldAffine(), FuseHardSwish(), FoldGate(), FoldShuffle(),
    PoolToConv(), GroupHeads(), FoldShapes(),
)  # fmt: skip


OPSET = (
    12  # 8-bit MaxPool; per-axis DequantizeLinear needs 13, which the portable form is raised to
)

RAISING = "raise_opset"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A rewritten model that ONNX Runtime loads.

    Attributes:
        model: the model.
        facts: types and shapes of its values.
        notes: sentences about passes that had to be left out.
    """

    model: ir.Model
    facts: Mapping[str, Fact]
    notes: tuple[str, ...] = ()


def prepare_for(feed: Feed, model: ir.Model, session: Session, *, tied: bool = False) -> Prepared:
    """The model rewritten by as many steps as ONNX Runtime allows; the one given stays as it is.

    The more is known of a graph, the more ORT's shape inference finds to refuse: a Range takes limits of shape [1]
    while nothing tells that they are no scalars. And onnx's converter of opsets knows little of bodies. A step whose
    result does not load or run is left out, or all of them.

    Args:
        feed: that tells the shapes.
        model: the model.
        session: that runs it.
        tied: see `prepare`.

    Raises:
        ModelError: the feed does not run, or no way to prepare the model gives one that ORT runs.
    """
    names = [RAISING, *(step.name for step in PASSES if not isinstance(step, NameNodes))]
    first: ModelError | None = None
    for without in ((), *((name,) for name in names), tuple(names)):
        prepared, _ = prepare(model.clone(), tied=tied, without=without)
        try:
            facts = probe(prepared, feed, must_load=True)
        except ModelError as error:
            if not isinstance(error, RefusedError) and first is None:
                session.run(feed)  # which tells better where the feed is wrong
            first = first or error
            continue
        notes = (f"Not done here: {', '.join(without)}. With it, {first}",) if first else ()
        return Prepared(prepared, facts, notes)
    assert first is not None
    raise first


def prepare(
    model: ir.Model, *, tied: bool = False, without: Collection[str] = ()
) -> tuple[ir.Model, dict[str, Outcome]]:
    """The model rewritten, and what each pass did, by pass name. The one given may be changed.

    With `tied`, large weights that several nodes read stay one: see `FoldConstants`. The passes named in `without`
    are left out, as is `RAISING` there.

    Local functions are inlined, the opset is raised where 8-bit types need it, Constant nodes
    become initializers, unread nodes go.

    Raises:
        ModelError: the functions are of another opset than the model.
    """
    said = documentation(model)
    if (model.ir_version or 0) < 4:  # initializers had to be inputs as well; nobody feeds them
        common.RemoveInitializersFromInputsPass()(model)
    try:
        common.InlinePass()(model)
    except ValueError as error:
        raise ModelError(
            f"the functions of the model cannot be expanded: {brief(error)}."
        ) from error
    low = model.opset_imports.get("", OPSET) < OPSET and RAISING not in without
    if low and io.weight_bytes(model) < io.EXTERNAL_BYTES:
        try:
            model = io.convert_opset(model, OPSET)
        except ModelError as error:
            logger.info("%s Nodes without an 8-bit form at that opset stay float.", error)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    drop_unread(model)
    steps = [FoldConstants(tied) if isinstance(step, FoldConstants) else step for step in PASSES]
    steps = [step for step in steps if step.name not in without]
    outcomes = {step.name: run_pass(step, model) for step in steps}
    drop_unread(model)
    restore(model, said)
    return model, outcomes
