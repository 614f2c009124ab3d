"""Needs: what several ask for of one tensor becomes one need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.step import Need, merge_needs

needs = st.builds(Need, st.sampled_from("abc"), st.booleans(), st.booleans(), st.booleans())


def asked(found: list[Need], tensor: str, kind: str) -> bool:
    return any(getattr(need, kind) for need in found if need.tensor == tensor)


def test_both_ask() -> None:
    assert Need("a", histogram=True) | Need("a", gram=True) == Need("a", histogram=True, gram=True)
    assert Need("a") | Need("a", channels=True) == Need("a", channels=True)
    assert Need("a") | Need("a") == Need("a")


def test_needs_of_two_tensors_are_not_one() -> None:
    with pytest.raises(AssertionError):
        Need("a") | Need("b")


@given(found=st.lists(needs))
def test_one_need_a_tensor(found: list[Need]) -> None:
    merged = merge_needs(iter(found))
    assert list(merged) == list(dict.fromkeys(need.tensor for need in found))
    for name, need in merged.items():
        assert need.tensor == name
        for kind in ("histogram", "channels", "gram"):
            assert getattr(need, kind) == asked(found, name, kind)


@given(found=st.lists(needs))
def test_merging_again_changes_nothing(found: list[Need]) -> None:
    once = merge_needs(found)
    assert merge_needs(once.values()) == once
    assert merge_needs([*once.values(), *found]) == once
