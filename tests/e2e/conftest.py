"""Fixtures for whole compilations."""

from __future__ import annotations

import dataclasses

import pytest
from lowering import eager

import qcompile.opened
from qcompile.targets.schema import Boundary, Cost, Target


@pytest.fixture
def eager_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer kernels and borders cost nothing: all that can be integer is, however small."""

    def free(name: str) -> Target:
        found = eager()
        rows = tuple(dataclasses.replace(row, int8=Cost()) for row in found.op)
        return dataclasses.replace(found, op=rows, boundary=Boundary(0, 0, 0, 0))

    monkeypatch.setattr(qcompile.opened, "load_target", free)
