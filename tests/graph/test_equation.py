"""Einsum equations as products, against numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.graph.equation import Product, as_product


@pytest.mark.parametrize(
    ("equation", "weight", "wanted"),
    [
        ("bsk,kn->bsn", 1, Product((1, 0), 2, 1, 1)),
        ("bsk, nk -> bsn", 1, Product((0, 1), 2, 1, 1)),
        ("kn,bsk->bsn", 0, Product((1, 0), 2, 1, 1)),
        ("...k,kn->...n", 1, Product((1, 0), None, 1, 1)),
        ("bk,khd->bhd", 1, Product((1, 2, 0), 1, 2, 1)),
        ("bshd,hdk->bsk", 1, Product((2, 0, 1), 2, 1, 2)),
        ("ak,kz", 1, Product((1, 0), 1, 1, 1)),
    ],
)
def test_products(equation: str, weight: int, wanted: Product) -> None:
    assert as_product(equation, weight) == wanted


@pytest.mark.parametrize(
    ("equation", "weight", "reason"),
    [
        ("bk->b", 0, "1 operands"),
        ("a,b,c->abc", 1, "3 operands"),
        ("bk,kk->bk", 1, "repeats a letter"),
        ("bkk,kn->bn", 1, "repeats a letter"),
        ("bk,...kn->bn", 1, "ellipsis in the weight"),
        ("bk,kn->bkn", 1, "no product with a matrix"),
        ("bk,kn->b", 1, "no product with a matrix"),
        ("bk,bkn->bn", 1, "no product of rows"),
        ("bks,kn->bsn", 1, "no product of rows"),
        ("bsk,kn->sbn", 1, "no product of rows"),
        ("bsk,kn->bns", 1, "no product of rows"),
        ("bk,knm->bn", 1, "no product of rows"),
        ("zk,ka", 1, "no product of rows"),
        ("k,kn->n", 1, "how many axes"),
        ("...k,khd->...hd", 1, "how many axes"),
    ],
)
def test_others(equation: str, weight: int, reason: str) -> None:
    found = as_product(equation, weight)
    assert isinstance(found, str)
    assert reason in found


@given(st.permutations("abcdef"), st.tuples(*[st.integers(1, 2)] * 3), st.data())
def test_what_is_a_product_is_computed_as_one(
    letters: list[str], counts: tuple[int, int, int], data: st.DataObject
) -> None:
    prefix, contracted, free = (
        "".join(letters[sum(counts[:i]) : sum(counts[: i + 1])]) for i in range(3)
    )
    x, w = prefix + contracted, "".join(data.draw(st.permutations(contracted + free)))
    equation = f"{x},{w}->{prefix}{free}"
    found = as_product(equation, 1)
    assert isinstance(found, Product)
    assert (found.prefix, found.contracted, found.free) == counts
    sizes = dict(zip("abcdef", (2, 3, 4, 5, 3, 2), strict=True))
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal([sizes[c] for c in term]) for term in (x, w))
    matrix = right.transpose(found.perm)
    rows = matrix.shape[: found.free]
    matrix = matrix.reshape(int(np.prod(rows)), -1)
    flat = left.reshape(*left.shape[: found.prefix], -1) @ matrix.T
    got = flat.reshape(*left.shape[: found.prefix], *rows)
    np.testing.assert_allclose(got, np.einsum(equation, left, right), atol=1e-12)
