"""What rounding and saturation do to the mean of each channel, for bias correction."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.calib.taps import with_outputs
from qcompile.quant.affine import fake_quantize
from qcompile.quant.scheme import QParams
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session


def rounding_shift(
    model: ir.Model, params: Mapping[str, QParams], samples: Iterable[Feed], facts: Mapping[str, Fact],
    *, memory: int = 128 << 20, threads: int = 0,
) -> dict[str, npt.NDArray[np.float64]]:  # fmt: skip
    """The typical E[x~ - x] per channel of each named tensor, float64 (channels,).

    Typical is the median over the samples of each sample's mean: saturation in a single sample is not
    something to correct in all the others.

    Args:
        model: the float model.
        params: of the tensors in question, by name; rank 2 or more, channels on axis 1.
        samples: feeds; read once per group of tensors that fits `memory`.
        facts: sizes.
        memory: bytes that one run's outputs may take.
        threads: intra-op threads, 0 for ORT's choice.
    """
    kept = list(samples)
    shifts: dict[str, list[npt.NDArray[np.float64]]] = {}
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for group in groups_within(list(params), facts, memory):
            session = Session(
                with_outputs(model, group), Options("all", threads=threads, in_order=True)
            )
            bound = session.bound(group)
            for feed in kept:
                values = bound.run(feed)
                found = pool.map(_shift, values, [params[name] for name in group])
                for name, shift in zip(group, found, strict=True):
                    if shift is not None:
                        shifts.setdefault(name, []).append(shift)
    return {name: np.median(rows, axis=0) for name, rows in shifts.items()}


def groups_within(names: Iterable[str], facts: Mapping[str, Fact], memory: int) -> list[list[str]]:
    """The names in groups whose float32 values take at most `memory` bytes, where that is possible."""
    groups: list[list[str]] = []
    room = 0
    for name in names:
        size = 4 * facts[name].elements if name in facts else 0
        if not groups or size > room:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= size
    return groups


def _shift(values: npt.NDArray[Any], params: QParams) -> npt.NDArray[np.float64] | None:
    if values.ndim < 2 or values.size == 0:
        return None
    error = fake_quantize(values, params)
    error -= values
    flat = error.reshape(error.shape[0], error.shape[1], -1)  # (N, C, pixels)
    mean: npt.NDArray[np.float64] = flat.mean(axis=2).mean(axis=0, dtype=np.float64)
    return mean
