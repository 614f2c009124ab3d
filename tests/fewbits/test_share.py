"""Bytes before there are any, and bits shared out within them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from few_bits import narrow, random_blocked
from lowering import constant
from networks import from_text
from workbench import weight

from passes.lower_nbits import Form, LowerNbits
from qcompile.errors import LimitError, PassError
from qcompile.fewbits import size
from qcompile.fewbits.assign import Assignment, Scheme, assign
from qcompile.fewbits.share import check_room, matrices, room, share
from qcompile.fewbits.size import other_bytes, stored_bytes
from qcompile.graph import io
from qcompile.graph.linear import Linear, find_linears
from qcompile.prepare import prepare
from qcompile.recipe import BUILT_IN
from qcompile.step import run_pass

INT4 = BUILT_IN["int4"]


def model(table: int = 512, width: int = 64) -> ir.Model:
    """A table that is the head as well, another table, a product, and a Gemm that is scaled."""
    text = (
        f"g (int64[b,s] ids) => (float[b,s,{table}] logits, float[n,40] z) {{ e = Gather(table, ids) o = Gather(other, ids) "
        "x = Add(e, o) [dense] h = MatMul(x, w) t = Transpose<perm = [1, 0]>(table) [head] logits = MatMul(h, t) "
        f"shape = Constant<value = int64[2] {{-1, {width}}}>() f = Reshape(h, shape) [scaled] z = Gemm<alpha = 0.5>(f, v) }}"
    )
    made = from_text(
        text, table=weight(table, width), other=weight(table, width, seed=1),
        w=weight(width, width, seed=2), v=weight(width, 40, seed=3),
    )  # fmt: skip
    return prepare(io.load(made, mapped=False), tied=True)[0]


def groups(items: list[Linear]) -> dict[object, list[Linear]]:
    found: dict[object, list[Linear]] = {}
    for item in items:
        assert item.weight is not None
        found.setdefault(item.weight.key, []).append(item)
    return found


CASES = [
    *[("nbits", bits, block) for bits, block in ((2, 32), (4, 16), (4, 128), (8, 64))],
    ("portable", 8, 16), ("portable", 8, 64),  # its lookups have 8 bits
]  # fmt: skip


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("form", "bits", "block"), CASES)
def test_bytes_are_those_of_the_file(
    form: Form, bits: int, block: int, *, symmetric: bool, tmp_path: Path
) -> None:
    prepared, scheme = model(), Scheme(bits, block, symmetric)
    prepared.opset_imports[""] = 21
    items = [item for item in find_linears(prepared) if item.reason is None]
    assert len(items) == 5
    assert spare(prepared, items, scheme, form, tmp_path) < 2000


@pytest.mark.parametrize(("form", "bits"), [("nbits", 4), ("portable", 4), ("portable", 2)])
def test_bytes_of_float16(form: Form, bits: int, tmp_path: Path) -> None:
    text = (
        f"g (float16[2,48] x) => (float16[2,24] y) <{constant('w', 48, 24)}> {{ y = MatMul(x, w) }}"
    )
    half = narrow(text.replace("float16", "float"), ir.DataType.FLOAT16, "x", "w", "y")
    half.opset_imports[""] = 25
    items = find_linears(half)
    assert [item.reason for item in items] == [None]
    assert spare(half, items, Scheme(bits, 16, symmetric=False), form, tmp_path) < 2000


def spare(prepared: ir.Model, items: list[Linear], scheme: Scheme, form: Form, folder: Path) -> int:
    """Bytes that were counted beyond those of the file, which is made of `prepared`."""
    rng = np.random.default_rng(0)
    made = {
        key: random_blocked(rng, *some[0].shape, scheme.bits, scheme.block, symmetric=scheme.symmetric)
        for key, some in groups(items).items()
    }  # fmt: skip
    others = other_bytes(prepared, [(item, scheme) for item in items], form)
    assert {item.name for item in find_linears(prepared)} >= {item.name for item in items}
    stored = sum(stored_bytes(some, scheme, form) for some in groups(items).values())
    weights = {item.name: made[item.weight.key] for item in items if item.weight is not None}
    outcome = run_pass(LowerNbits(weights, form), prepared)
    assert len(outcome.changed) == len(items), outcome.skipped
    io.save(prepared, folder / "m.onnx")
    over = others + stored - io.file_bytes(folder / "m.onnx")
    assert over >= 0
    return over


def assigned(**change: object) -> tuple[Assignment, list[Linear]]:
    prepared = model()
    made = assign(prepared, dataclasses.replace(INT4, **change), prepared)  # type: ignore[arg-type]
    return made, [item for item, _ in made.chosen]


def test_what_may_become_of_a_matrix() -> None:
    made, _ = assigned()
    recipe = dataclasses.replace(INT4, bits_per_weight=4.0, symmetric=True)
    found = matrices(made, recipe, {"dense": 8}, "nbits")
    names = [[item.name for item in one.readers] for one in found]
    assert [len(n) for n in names] == [
        2,
        1,
        1,
    ]  # the table and the head are one; the Gemm is too small
    assert names[2] == ["dense"]
    assert {(s.bits, s.block) for s in found[2].schemes} == {(8, b) for b in (16, 32, 64, 128)}
    usual = {(b, g) for b in (2, 4, 8) for g in (16, 32, 64, 128)} - {(2, 16)}
    assert {(s.bits, s.block) for s in found[0].schemes} == usual
    assert all(s.symmetric for one in found for s in one.schemes)
    fixed = matrices(made, dataclasses.replace(recipe, block=16), {}, "nbits")
    assert {s.block for one in fixed for s in one.schemes} == {16}
    portable = matrices(made, recipe, {}, "portable")
    assert {s.bits for one in portable[:2] for s in one.schemes} == {8}  # tables
    assert {s.bits for s in portable[2].schemes} == {2, 4, 8}


def test_the_costly_matrix_gets_the_bits() -> None:
    made, _ = assigned()
    recipe = dataclasses.replace(INT4, bits_per_weight=4.5)
    found = matrices(made, recipe, {}, "nbits")
    limit = room(recipe, found, 0, 0)
    assert limit == int(4.5 * sum(one.weights for one in found) / 8)
    for number in range(3):
        costs = [
            [(1000 if i == number else 1) * 4.0**-s.bits * s.block for s in one.schemes]
            for i, one in enumerate(found)
        ]
        shares = share(made, found, costs, limit)
        assert shares.nbytes <= limit
        assert shares.bits == 8 * shares.nbytes / sum(one.weights for one in found)
        schemes = {item.name: scheme for item, scheme in shares.assignment.chosen}
        assert len(schemes) == 4
        best = schemes[found[number].readers[0].name]
        assert all(best.bits >= scheme.bits for scheme in schemes.values())
        assert len({schemes[item.name] for item in found[0].readers}) == 1  # stored once
        assert f"of {best.bits} bits in blocks of {best.block}" in shares.summary()


def test_room_is_the_smaller_of_both() -> None:
    made, _ = assigned()
    recipe = dataclasses.replace(INT4, bits_per_weight=4.0, max_size="50%")
    found = matrices(made, recipe, {}, "nbits")
    by_bits = int(4.0 * sum(one.weights for one in found) / 8)
    assert room(recipe, found, 10**6, 1000) == by_bits
    assert room(recipe, found, 10**4, 1000) == 4000


def test_too_little_room_says_what_the_least_is() -> None:
    made, _ = assigned()
    recipe = dataclasses.replace(INT4, bits_per_weight=2.0, max_size="0.001MB")
    found = matrices(made, recipe, {}, "nbits")
    least = sum(min(one.sizes) for one in found)
    check_room(recipe, found, least, 500)
    with pytest.raises(LimitError) as caught:
        check_room(recipe, found, least - 1, 500)
    told = str(caught.value)
    assert f"the least is {8 * least / sum(one.weights for one in found):.3f}" in told
    assert f"the least is {(least + 500) / 1e6:.2f} MB" in told


def test_a_weight_that_is_only_measured_says_so_when_it_is_read() -> None:
    with pytest.raises(PassError, match="read only to find out how large it is"):
        size._unread()
