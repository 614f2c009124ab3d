"""What ONNX Runtime really runs: the optimized graph, read back.

For each planned node the verdict is `integer` (a kernel that the target counts as such), `float`, or
`leftover` (a QuantizeLinear or DequantizeLinear that runs around it at every inference).
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from qcompile.graph.edit import graphs, is_op
from qcompile.plan.candidates import Candidate
from qcompile.plan.plan import Form, Plan
from qcompile.run.session import Options, Session

_SUFFIX = re.compile(r"_token_\d+$|_nchwc$|_int$")  # what ORT's transformers, and ours, append
_INTEGER = re.compile(
    r"QLinear|MatMulInteger|ConvInteger|DynamicQuantize(MatMul|LSTM)|QGemm|QAttention|MatMulNBits|GatherBlockQuantized"
)
_MERGED = "merged"  # the kernel of a node that is no longer there by itself


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What became of one planned node: `kernel` is the operator type in the optimized graph."""

    node: str
    op: str
    form: str
    verdict: str
    kernel: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Kernels:
    """The verdicts, and counts over the whole optimized graph."""

    nodes: tuple[Verdict, ...]
    integer: int
    float: int
    leftover_qdq: int
    operators: Mapping[str, int]

    @property
    def runs(self) -> bool:
        """Whether anything integer runs: a kernel, or a lookup of 8-bit rows. What is constant, ORT folds."""
        return self.integer > 0 or any(
            v.verdict == "integer" and v.kernel != _MERGED for v in self.nodes
        )

    @property
    def missed(self) -> list[Verdict]:
        """Nodes that were planned as integer and are not."""
        return [v for v in self.nodes if v.verdict != "integer"]


def optimized(model: ir.Model | Path, options: Options) -> ir.Model:
    """The graph as ORT runs it."""
    with tempfile.TemporaryDirectory(prefix="qcompile-") as folder:
        path = Path(folder) / "optimized.onnx"
        Session(model, dataclasses.replace(options, optimized=path))
        result = ir.load(path)
        for graph in result.graphs():
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    value.const_value.release()
        return result


def verdicts(
    graph: ir.Model, built: ir.Model, plan: Plan, found: Mapping[str, Candidate | str]
) -> Kernels:
    """Compares a plan with the optimized graph of the model that was built from it.

    Nodes are found again by name, or by the codes of their weight, which no optimizer renames.
    """
    by_name: dict[str, ir.Node] = {}
    by_codes: dict[str, ir.Node] = {}
    counts: Counter[str] = Counter()
    for scope in graphs(graph):
        for node in scope:
            counts[node.op_type] += 1
            by_name.setdefault(_SUFFIX.sub("", node.name or ""), node)
            for value in node.inputs:
                if (
                    value is not None
                    and value.name
                    and value.name.endswith("_q")
                    and value.is_initializer()
                ):
                    by_codes.setdefault(value.name, node)
    codes = _codes_of(built, plan, found)
    rows = []
    for entry in plan.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT):
        item = found[entry.node]
        assert isinstance(item, Candidate)
        kernels = item.row.kernels if item.row is not None else frozenset()
        match = by_codes.get(codes.get(entry.node, "")) or by_name.get(entry.node)
        rows.append(_verdict(entry.node, entry.op, entry.form, kernels, match))
    integer = sum(n for op, n in counts.items() if _INTEGER.search(op))
    leftover = counts["QuantizeLinear"] + counts["DequantizeLinear"]
    leftover += counts["DynamicQuantizeLinear"]
    plain = sum(
        n
        for op, n in counts.items()
        if op
        in (
            "Conv",
            "FusedConv",
            "MatMul",
            "FusedMatMul",
            "Gemm",
            "FusedGemm",
            "LSTM",
            "GRU",
            "ConvTranspose",
            "Attention",
        )
    )
    return Kernels(tuple(rows), integer, plain, leftover, dict(counts.most_common()))


def _codes_of(built: ir.Model, plan: Plan, found: Mapping[str, Candidate | str]) -> dict[str, str]:
    names = {value for graph in graphs(built) for value in graph.initializers}
    result = {}
    for entry in plan.of(Form.STATIC, Form.DYNAMIC, Form.WEIGHT):
        item = found[entry.node]
        if isinstance(item, Candidate) and item.role in ("conv", "dynamic"):
            weight = item.node.inputs[1]
            name = f"{weight.name}_q" if weight is not None else ""
            # A weight that several nodes share cannot tell them apart.
            if name in names and weight is not None and len(weight.uses()) == 1:
                result[entry.node] = name
    return result


def _verdict(
    name: str, op: str, form: Form, kernels: frozenset[str], node: ir.Node | None
) -> Verdict:
    if node is None:
        return Verdict(name, op, form.value, "integer", _MERGED, "part of another node")
    other = _INTEGER.search(node.op_type) and form is not Form.WEIGHT
    by_block = form is Form.WEIGHT and node.op_type == "MatMulNBits"  # rounds its input by blocks
    wanted = node.op_type in kernels and not (form is Form.WEIGHT and op != "Gather")
    if wanted or other or by_block:
        return Verdict(name, op, form.value, "integer", node.op_type)
    if is_op(node, "DequantizeLinear", "QuantizeLinear"):
        return Verdict(
            name, op, form.value, "leftover", node.op_type, "its weight is dequantized at every run"
        )
    if any(
        value is not None and is_op(value.producer(), "DequantizeLinear") for value in node.inputs
    ):
        return Verdict(
            name, op, form.value, "leftover", node.op_type, "its inputs are dequantized before it"
        )
    if form is Form.WEIGHT and is_op(node, "Gather", "Mul"):
        return Verdict(name, op, form.value, "integer", node.op_type, "8-bit rows")
    return Verdict(name, op, form.value, "float", node.op_type, f"ORT runs {node.op_type}")
