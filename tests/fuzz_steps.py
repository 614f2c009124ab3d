"""The steps of the grammar of random models: each adds an operator, or a few that belong together, to a `Grower`.

A step that does not fit the value that it is given adds nothing.
"""

from __future__ import annotations

import numpy as np
from fuzz_grower import MOST, Grower, numbers


def _conv_side(size: int, kernel: int, stride: int, dilation: int, pad: int) -> int:
    return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1


def conv(g: Grower) -> None:
    found = g.value(3, 4)
    if found is None:
        return
    x, (n, c, *sides) = found
    groups = g.pick([1, 1, 1, c] + [k for k in (2, 4) if c % k == 0])
    out = groups * g.pick((1, 2, 3, 4, 8)) if groups > 1 else g.pick(g.widths)
    kernel, stride, dilation, pad = (
        g.pick((1, 1, 2, 3)),
        g.pick((1, 1, 1, 2)),
        g.pick((1, 1, 1, 2)),
        g.pick((0, 1, 1)),
    )
    made = [_conv_side(side, kernel, stride, dilation, pad) for side in sides]
    if min(made) < 1 or n * out * int(np.prod(made)) > MOST:
        return
    inner = c // groups
    inputs = [x, g.weight((out, inner, *[kernel] * len(sides)), inner * kernel ** len(sides))]
    if g.chance(0.7):
        inputs.append(g.weight((out,)))
    g.node("Conv", inputs, (n, out, *made), group=groups, strides=[stride] * len(sides),
           dilations=[dilation] * len(sides), pads=[pad] * 2 * len(sides))  # fmt: skip


def conv_transpose(g: Grower) -> None:
    found = g.value(3, 4)
    if found is None:
        return
    x, (n, c, *sides) = found
    out, kernel, stride = g.pick((1, 2, 3, 8)), g.pick((1, 2, 3)), g.pick((1, 2))
    made = [(side - 1) * stride + kernel for side in sides]
    if n * out * int(np.prod(made)) > MOST:
        return
    inputs = [x, g.weight((c, out, *[kernel] * len(sides)), c * kernel ** len(sides))]
    if g.chance(0.5):
        inputs.append(g.weight((out,)))
    g.node("ConvTranspose", inputs, (n, out, *made), strides=[stride] * len(sides))


def matmul(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, (*lead, k) = found
    out = g.pick(g.widths)
    if int(np.prod(lead)) * out > MOST:
        return
    y = g.node("MatMul", [x, g.weight((k, out), k)], (*lead, out))
    if g.chance(0.5):
        bias = g.weight((out,))
        g.node("Add", [y, bias] if g.chance(0.5) else [bias, y], (*lead, out))


def gemm(g: Grower) -> None:
    found = g.value(2)
    if found is None:
        return
    x, (n, k) = found
    out, turned = g.pick(g.widths), g.chance(0.5)
    inputs = [x, g.weight((out, k) if turned else (k, out), k)]
    if g.chance(0.7):
        inputs.append(g.weight(g.pick([(out,), (1, out), (1,), ()])))
    more = {"alpha": 0.5} if g.chance(0.2) else {"beta": 2.0} if g.chance(0.2) else {}
    g.node("Gemm", inputs, (n, out), transB=int(turned), **more)


def attention(g: Grower) -> None:
    found = g.value(3)
    if found is None:
        return
    x, (n, t, d) = found
    q, k, v = (g.node("MatMul", [x, g.weight((d, d), d)], (n, t, d), live=False) for _ in "qkv")
    turned = g.node("Transpose", [k], (n, d, t), live=False, perm=[0, 2, 1])
    scores = g.node("MatMul", [q, turned], (n, t, t), live=False)
    scaled = g.node("Div", [scores, g.constant(d**0.5)], (n, t, t), live=False)
    if g.chance(0.3):
        mask = g.constant(np.triu(np.ones((t, t)), 1) == 0, np.bool_)
        scaled = g.node("Where", [mask, scaled, g.constant(-1e9)], (n, t, t), live=False)
    soft = g.node("Softmax", [scaled], (n, t, t), axis=-1)
    g.node("MatMul", [soft, v], (n, t, d))


def activation(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, shape = found
    op = g.pick(("Relu", "Relu", "Relu", "Clip", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "LeakyRelu", "swish",
                 "swish div", "silu", "Erf", "Neg", "Abs", "Identity", "Elu", "Softplus", "Exp", "Sqrt"))  # fmt: skip
    if op == "Clip":
        low, high = g.pick(
            (
                (0.0, 6.0),
                (0.0, 1.0),
                (-1.0, 1.0),
                (None, 6.0),
                (0.0, None),
                (0.0, 0.0),
                (-3.0, -1.0),
            )
        )
        inputs = [x, "" if low is None else g.constant(low)] + (
            [] if high is None else [g.constant(high)]
        )
        g.node("Clip", inputs, shape)
    elif op in ("swish", "swish div"):
        add = g.node("Add", [x, g.constant(3.0)], shape, live=False)
        clip = g.node("Clip", [add, g.constant(0.0), g.constant(6.0)], shape, live=g.chance(0.2))
        if op == "swish":
            product = g.node("Mul", [x, clip] if g.chance(0.5) else [clip, x], shape, live=False)
            g.node("Div", [product, g.constant(6.0)], shape)
        else:
            part = g.node("Div", [clip, g.constant(6.0)], shape, live=False)
            g.node("Mul", [x, part], shape)
    elif op == "silu":
        gate = g.node(g.pick(("Sigmoid", "HardSigmoid")), [x], shape, live=g.chance(0.3))
        g.node("Mul", [x, gate], shape)
    elif op == "Sqrt":
        g.node("Sqrt", [g.node("Abs", [x], shape, live=False)], shape)
    elif op == "Exp":
        g.node(
            "Exp",
            [g.node("Clip", [x, g.constant(-5.0), g.constant(2.0)], shape, live=False)],
            shape,
        )
    else:
        g.node(op, [x], shape)


def arithmetic(g: Grower) -> None:
    """With a constant, or with another value: residuals, and branches of one shape."""
    found = g.value()
    if found is None:
        return
    x, shape = found
    op = g.pick(("Add", "Add", "Mul", "Sub", "Div", "Max"))
    others = [name for name, other in g.live if other == shape]
    if g.chance(0.6):
        y = g.pick(others)
    else:
        sizes = [shape, (), (1,), (shape[-1],), (1,) * len(shape)]
        sizes += [(shape[1], *[1] * (len(shape) - 2))] if len(shape) > 2 else []
        y = g.weight(g.pick(sizes))
    if op == "Div":
        y = g.constant(g.pick((0.5, 3.0, -2.0, 255.0)))
    g.node(op, [x, y] if op in ("Sub", "Div") or g.chance(0.7) else [y, x], shape)


def concat(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, shape = found
    axis = g.pick(range(1, len(shape))) if len(shape) > 1 else 0
    fits = [
        (n, s)
        for n, s in g.live
        if len(s) == len(shape) and s[:axis] == shape[:axis] and s[axis + 1 :] == shape[axis + 1 :]
    ]
    parts = [g.pick(fits) for _ in range(g.pick((1, 1, 2)))]
    size = shape[axis] + sum(s[axis] for _, s in parts)
    if int(np.prod(shape)) // shape[axis] * size > MOST:
        return
    g.node(
        "Concat",
        [x, *(n for n, _ in parts)],
        (*shape[:axis], size, *shape[axis + 1 :]),
        axis=axis - (len(shape) if g.chance(0.3) else 0),
    )


def split(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, shape = found
    axis = len(shape) - 1 if g.chance(0.4) else min(1, len(shape) - 1)
    if shape[axis] < 2:
        return
    cut = g.pick(range(1, shape[axis])) if g.chance(0.9) else 0
    sizes = [cut, shape[axis] - cut]
    made = [(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes]
    g.node("Split", [x, g.constant(sizes, np.int64)], *made, axis=axis)


def cut(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, shape = found
    axis = g.pick(range(len(shape)))
    size = shape[axis]
    start = g.pick(range(size))
    end = g.pick(range(start, size + 1)) if g.chance(0.1) else g.pick(range(start + 1, size + 1))
    step = g.pick((1, 1, 2))
    length = max(0, -(-(end - start) // step))
    inputs = [x, *(g.constant([v], np.int64) for v in (start, end, axis, step))]
    g.node("Slice", inputs, (*shape[:axis], length, *shape[axis + 1 :]))


def reshape(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, shape = found
    n, rest = shape[0], int(np.prod(shape[1:]))
    options: list[tuple[int, ...]] = [(n, rest), (n, rest, 1), (n, 1, rest)]
    options += [(n, d, rest // d) for d in (2, 3, 4, 8) if rest % d == 0]
    options += [(n, shape[1], rest // shape[1], 1)] if len(shape) > 1 else []
    made = g.pick(options)
    if made == (n, rest) and g.chance(0.5):
        g.node("Flatten", [x], made)
        return
    wanted = [0 if g.chance(0.5) else n, *made[1:]]
    if g.chance(0.3):
        wanted[-1] = -1
    g.node("Reshape", [x, g.constant(wanted, np.int64)], made)


def transpose(g: Grower) -> None:
    found = g.value(3, 4)
    if found is None:
        return
    x, shape = found
    perm = (
        [0, 2, 1]
        if len(shape) == 3
        else g.pick(([0, 2, 3, 1], [0, 3, 1, 2], [0, 1, 3, 2], [0, 2, 1, 3]))
    )
    g.node("Transpose", [x], tuple(shape[i] for i in perm), perm=perm)


def pool(g: Grower) -> None:
    found = g.value(4)
    if found is None:
        return
    x, (n, c, h, w) = found
    op = g.pick(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "ReduceMean"))
    if op == "ReduceMean":
        keep = g.pick((0, 1))
        g.node(op, [x], (n, c, 1, 1) if keep else (n, c), axes=[2, 3], keepdims=keep)
    elif op.startswith("Global"):
        g.node(op, [x], (n, c, 1, 1))
    else:
        kernel, stride, pad = g.pick((2, 3)), g.pick((1, 2)), g.pick((0, 1))
        made = [_conv_side(side, kernel, stride, 1, pad) for side in (h, w)]
        if min(made) >= 1:
            g.node(
                op,
                [x],
                (n, c, *made),
                kernel_shape=[kernel] * 2,
                strides=[stride] * 2,
                pads=[pad] * 4,
            )


def resize(g: Grower) -> None:
    found = g.value(4)
    if found is None:
        return
    x, (n, c, h, w) = found
    if n * c * h * w * 4 > MOST:
        return
    mode = g.pick(("nearest", "linear"))
    g.node("Resize", [x, "", g.constant([1, 1, 2, 2])], (n, c, 2 * h, 2 * w), mode=mode,
           coordinate_transformation_mode=g.pick(("asymmetric", "half_pixel")), **({"nearest_mode": "floor"} if mode == "nearest" else {}))  # fmt: skip


def pad(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, shape = found
    pads = [0] * 2 * len(shape)
    axis = g.pick(range(1, len(shape))) if len(shape) > 1 else 0
    pads[axis], pads[axis + len(shape)] = g.pick((0, 1, 2)), g.pick((0, 1))
    made = tuple(size + pads[i] + pads[i + len(shape)] for i, size in enumerate(shape))
    inputs = [x, g.constant(pads, np.int64)]
    mode = g.pick(("constant", "constant", "edge", "reflect"))
    if mode == "reflect" and shape[axis] <= max(pads):
        mode = "edge"
    if mode == "constant" and g.chance(0.5):
        inputs.append(g.constant(g.pick((0.0, -1.0, 100.0))))
    g.node("Pad", inputs, made, mode=mode)


def norm(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, shape = found
    op = g.pick(
        (
            "LayerNormalization",
            "BatchNormalization",
            "BatchNormalization",
            "Softmax",
            "InstanceNormalization",
        )
    )
    if op == "Softmax":
        g.node(op, [x], shape, axis=g.pick((-1, len(shape) - 1)))
    elif op == "LayerNormalization":
        g.node(op, [x, g.weight((shape[-1],)), g.weight((shape[-1],))], shape, axis=-1)
    elif op == "BatchNormalization" and len(shape) > 1:
        c = (shape[1],)
        variance = g.constant(np.abs(numbers(np.random.default_rng(0), c, "normal")) + 0.1)
        g.node(op, [x, g.weight(c), g.weight(c), g.weight(c), variance], shape)
    elif op == "InstanceNormalization" and len(shape) > 2:
        g.node(op, [x, g.weight((shape[1],)), g.weight((shape[1],))], shape)


def where(g: Grower) -> None:
    found = g.value()
    if found is None:
        return
    x, shape = found
    mask = g.constant(np.arange(shape[-1]) % 2 == 0, np.bool_)
    others = [name for name, other in g.live if other == shape]
    y = g.pick(others) if g.chance(0.5) else g.constant(g.pick((0.0, -1e9, 3.0)))
    g.node("Where", [mask, x, y], shape)


def lstm(g: Grower) -> None:
    found = g.value(3)
    if found is None:
        return
    x, (t, n, d) = found
    hidden = g.pick((1, 3, 8))
    both = g.pick((1, 2))
    inputs = [x, g.weight((both, 4 * hidden, d), d), g.weight((both, 4 * hidden, hidden), hidden)]
    if g.chance(0.7):
        inputs.append(g.weight((both, 8 * hidden)))
    y, last, cell = g.node("LSTM", inputs, (t, both, n, hidden), (both, n, hidden), (both, n, hidden), hidden_size=hidden,
                           direction="bidirectional" if both == 2 else "forward")  # fmt: skip
    del y, last, cell


def squeeze_excite(g: Grower) -> None:
    found = g.value(4)
    if found is None:
        return
    x, (n, c, h, w) = found
    mean = g.node("GlobalAveragePool", [x], (n, c, 1, 1), live=False)
    few = g.node(
        "Conv", [mean, g.weight((2, c, 1, 1), c), g.weight((2,))], (n, 2, 1, 1), live=False
    )
    act = g.node("Relu", [few], (n, 2, 1, 1), live=False)
    many = g.node("Conv", [act, g.weight((c, 2, 1, 1), 2)], (n, c, 1, 1), live=False)
    gate = g.node(g.pick(("Sigmoid", "HardSigmoid")), [many], (n, c, 1, 1), live=False)
    g.node("Mul", [x, gate] if g.chance(0.5) else [gate, x], (n, c, h, w))


def shuffle(g: Grower) -> None:
    found = g.value(4)
    if found is None or found[1][1] % 2:
        return
    x, (n, c, h, w) = found
    apart = g.node(
        "Reshape", [x, g.constant([n, 2, c // 2, h, w], np.int64)], (n, 2, c // 2, h, w), live=False
    )
    turned = g.node("Transpose", [apart], (n, c // 2, 2, h, w), live=False, perm=[0, 2, 1, 3, 4])
    g.node("Reshape", [turned, g.constant([n, c, h, w], np.int64)], (n, c, h, w))


STEPS = (
    conv, conv, conv, conv, conv_transpose, matmul, matmul, gemm, gemm, attention, activation, activation, activation,
    arithmetic, arithmetic, arithmetic, concat, split, cut, reshape, transpose, pool, resize, pad, norm, norm, where,
    lstm, squeeze_excite, shuffle,
)  # fmt: skip
