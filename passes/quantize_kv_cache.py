"""Stores the key and value caches of a decoder as integers: inputs, outputs and all that is copied.

    Concat(past[f32], new)  =>  present = Concat(past[i8], QuantizeLinear((new - offset) / scale))
                                readers of it read DequantizeLinear(present) * scale + offset

    GroupQueryAttention     =>  the same with k_quant_type, v_quant_type, kv_cache_bit_width, k_scale and v_scale

Only new tokens are quantized; codes of old ones are copied, so that no token is rounded twice. The scale is one
for each head and channel (1, heads, 1, width), which QuantizeLinear has no form for: it divides apart, by 1.

int4 puts channels d and d + width/2 into one byte, since neither Concat nor Python's side of ORT 1.32 takes int4
tensors: lo + 16 * hi in float, QuantizeLinear with zero point 136 = 8 + 16 * 8, and BitShift to take them apart.
GroupQueryAttention packs channels 2d and 2d + 1.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.graph.edit import Names, add_initializer, add_node, attribute, is_op, replace
from qcompile.graph.kv_cache import GQA, RANK, Cache, find_caches, mark_caches
from qcompile.step import Outcome, Pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcompile.quant.cache import CacheParams

MIN_OPSET = 11  # BitShift, and Clip with bounds as inputs
_CODES = (ir.DataType.INT8, ir.DataType.UINT8)
_K_SCALE, _V_SCALE = 12, 13  # inputs of GroupQueryAttention
_GQA_INPUTS = 14


@dataclasses.dataclass(frozen=True)
class QuantizeKvCache(Pass):
    """The caches of a decoder whose parameters are given, in the main graph.

    Attributes:
        params: by name of the past input. Statistics of a head and channel are none of those that passes
            can ask the calibration for; `qcompile.kv` gathers them, from outputs that the model has anyway.
    """

    name: ClassVar[str] = "quantize_kv_cache"
    params: Mapping[str, CacheParams]

    def apply(self, model: ir.Model) -> Outcome:
        """See the class. Names of inputs and outputs stay; their type, and with int4 their width, changes."""
        outcome, names = Outcome(), Names(model)
        caches, outcome.skipped = find_caches(model)
        for cache in caches:
            reason = self._refusal(cache, caches, model)
            if reason is not None:
                outcome.skipped[cache.name] = reason
        left = {cache.node for cache in caches if cache.name in outcome.skipped}
        for cache in caches:
            if cache.node in left and cache.name not in outcome.skipped:
                outcome.skipped[cache.name] = f"the other cache of its {GQA} stays float"
        rows: list[tuple[Cache, str, str, str | None]] = []
        for cache in caches:
            if cache.name in outcome.skipped:
                continue
            params = self.params[cache.name]
            rewrite = _rewrite_concat if cache.form == "concat" else _set_gqa
            rows.append((cache, params.kind, *rewrite(cache, params, names)))
            outcome.changed.append(cache.name)
        if rows:
            mark_caches(model, rows)
        return outcome

    def _refusal(self, cache: Cache, caches: Sequence[Cache], model: ir.Model) -> str | None:
        if cache.past.dtype is not ir.DataType.FLOAT:
            done = ": it is quantized already" if cache.past.dtype in _CODES else ""
            return f"it holds {cache.past.dtype}, not float32{done}"
        params = self.params.get(cache.name)
        if params is None:
            return "no parameters were calibrated for it"
        if (cache.heads, cache.width) != params.scale.shape:
            return (
                f"its shape {cache.past.shape} does not fix the {params.scale.shape[0]} heads and the width "
                f"of {params.scale.shape[1]} that were calibrated"
            )
        if params.kind == "int4" and (cache.width or 0) % 2:
            return f"two int4 channels share a byte, and its width {params.scale.shape[1]} is odd"
        if cache.form == "concat":
            opset = model.opset_imports.get("", 0)
            return None if opset >= MIN_OPSET else f"opset {opset} is below {MIN_OPSET}"
        return self._gqa_refusal(cache, caches)

    def _gqa_refusal(self, cache: Cache, caches: Sequence[Cache]) -> str | None:
        kind = self.params[cache.name].kind
        if kind == "uint8":
            return f"{GQA} stores int8 or int4, not uint8"
        if self.params[cache.name].offset is not None:
            return f"{GQA} has no offsets"
        if any(not is_op(use.node, "Shape") for use in cache.present.uses()):
            return f"nodes besides {GQA} read the cache that it makes"
        both = [other for other in caches if other.node is cache.node]
        known = [self.params.get(other.name) for other in both]
        if len(both) != 2 or any(params is None or params.kind != kind for params in known):
            return f"{GQA} stores keys and values alike, and only one of them is a cache with parameters"
        return None


def _set_gqa(cache: Cache, params: CacheParams, names: Names) -> tuple[str, None]:
    """Attributes and scale of one of the two caches; the other's call sets its own. The name of the scale."""
    node, is_key = cache.node, cache.past is cache.node.inputs[3]
    home = node.graph
    assert isinstance(home, ir.Graph)
    # (heads, width): ORT 1.32 wants one scale a head and channel, whatever its shape
    scale = add_initializer(home, names, f"{cache.name}_scale", params.scale)
    node.resize_inputs(max(len(node.inputs), _GQA_INPUTS))
    node.replace_input_with(_K_SCALE if is_key else _V_SCALE, scale)
    node.attributes.add(ir.AttrString("k_quant_type" if is_key else "v_quant_type", "PER_CHANNEL"))
    node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 4 if params.kind == "int4" else 8))
    _retype(cache, params, names)
    return scale.name or "", None


def _rewrite_concat(cache: Cache, params: CacheParams, names: Names) -> tuple[str, str | None]:
    """The names of the scale and of the offset."""
    made = _Concat(cache, params, names)
    made.rewrite()
    return made.scale.name or "", None if made.offset is None else made.offset.name


class _Concat:
    """The rewrite of one Concat."""

    def __init__(self, cache: Cache, params: CacheParams, names: Names) -> None:
        self._cache, self._params, self._names = cache, params, names
        self._wish = cache.present.name or "present"
        home = cache.node.graph
        assert isinstance(home, ir.Graph)
        self._home = home
        self.scale = self._constant("scale", params.scale[None, :, None, :])  # (1, heads, 1, width)
        shift = params.offset
        self.offset = None if shift is None else self._constant("offset", shift[None, :, None, :])
        self._one = self._constant("one", np.float32(1))

    def rewrite(self) -> None:
        """All of it."""
        cache = self._cache
        readers = [(u.node, u.idx) for u in cache.present.uses() if not is_op(u.node, "Shape")]
        cache.node.replace_input_with(1, self._quantize())
        if readers:
            floats = self._dequantize()
            for node, index in readers:
                node.replace_input_with(index, floats)
        _retype(cache, self._params, self._names)

    def _quantize(self) -> ir.Value:
        assert self._cache.new is not None
        new = self._cache.new
        if self.offset is not None:
            new = self._before("Sub", [new, self.offset], "centred")
        scaled = self._before("Div", [new, self.scale], "scaled")
        if self._params.kind != "int4":
            zero = self._constant("zero", np.asarray(self._params.zero, self._params.dtype))
            return self._before("QuantizeLinear", [scaled, self._one, zero], "q")
        low, high = self._constant("low", np.float32(-8)), self._constant("high", np.float32(7))
        codes = self._before("Round", [self._before("Clip", [scaled, low, high], "cut")], "codes")
        width = self._params.scale.shape[1]
        first = self._before("Slice", [codes, *self._span(0, width // 2)], "lo")
        second = self._before("Slice", [codes, *self._span(width // 2, width)], "hi")
        up = self._before("Mul", [second, self._constant("sixteen", np.float32(16))], "up")
        both = self._before("Add", [first, up], "both")
        zero = self._constant("zero", np.uint8(8 + 16 * 8))
        return self._before("QuantizeLinear", [both, self._one, zero], "q")

    def _dequantize(self) -> ir.Value:
        """The float value of the whole cache; its nodes stand right behind the Concat."""
        codes = self._cache.present
        last = self._cache.node
        if self._params.kind == "int4":
            codes, last = self._unpack(codes, last)
        zero = self._constant("zero", np.asarray(self._params.zero, self._params.dtype))
        values = self._after(last, "DequantizeLinear", [codes, self._one, zero], "dq")
        part = "float" if self.offset is None else "uncentred"
        made = self._after(values, "Mul", [values.outputs[0], self.scale], part)
        if self.offset is None:
            return made.outputs[0]
        return self._after(made, "Add", [made.outputs[0], self.offset], "float").outputs[0]

    def _unpack(self, codes: ir.Value, last: ir.Node) -> tuple[ir.Value, ir.Node]:
        four = self._constant("four", np.uint8(4))
        up = self._after(last, "BitShift", [codes, four], "shifted", direction="LEFT")
        low = self._after(up, "BitShift", [up.outputs[0], four], "low_codes", direction="RIGHT")
        high = self._after(low, "BitShift", [codes, four], "high_codes", direction="RIGHT")
        parts = [low.outputs[0], high.outputs[0]]
        joined = self._after(high, "Concat", parts, "unpacked", axis=RANK - 1)
        return joined.outputs[0], joined

    def _span(self, start: int, stop: int) -> list[ir.Value]:
        """Inputs of a Slice of the last axis."""
        numbers = {"start": start, "stop": stop, "axis": RANK - 1}
        return [self._constant(key, np.array([n], np.int64)) for key, n in numbers.items()]

    def _constant(self, part: str, values: Any) -> ir.Value:
        return add_initializer(self._home, self._names, f"{self._wish}_{part}", np.asarray(values))

    def _before(self, op_type: str, inputs: Sequence[ir.Value], part: str) -> ir.Value:
        return add_node(
            self._names, op_type, inputs, before=self._cache.node,
            name=f"{self._wish}_{part}", output=f"{self._wish}_{part}",
        ).outputs[0]  # fmt: skip

    def _after(
        self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value], part: str, **attributes: Any
    ) -> ir.Node:
        return add_node(
            self._names, op_type, inputs, after=node, name=f"{self._wish}_{part}",
            output=f"{self._wish}_{part}", attributes=attributes,
        )  # fmt: skip


def _retype(cache: Cache, params: CacheParams, names: Names) -> None:
    """Input and output have their new type; who reads a shape of them still learns that of the float cache."""
    for value in (cache.past, cache.present):
        value.type = ir.TensorType(ir.DataType.from_numpy(params.dtype))
        if params.kind != "int4":
            continue
        for node in [use.node for use in value.uses() if is_op(use.node, "Shape")]:
            _double_width(node, names)
        if value.shape is not None:
            value.shape = ir.Shape([*value.shape[: RANK - 1], params.stored_width])


def _double_width(node: ir.Node, names: Names) -> None:
    """What a Shape of a packed cache gives is the shape of the float one."""
    start, end = attribute(node, "start", 0), attribute(node, "end", RANK)
    factors = np.array([1, 1, 1, 2], np.int64)[start:end]
    home, told = node.graph, node.outputs[0]
    assert isinstance(home, ir.Graph)
    factor = add_initializer(home, names, f"{told.name}_factors", factors)
    real = add_node(
        names, "Mul", [told, factor], after=node, name=f"{node.name}_float", output=f"{told.name}_float"
    )  # fmt: skip
    replace(told, real.outputs[0])
    real.replace_input_with(0, told)
