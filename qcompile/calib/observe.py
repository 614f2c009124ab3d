"""Runs the float model on the calibration samples and keeps statistics of chosen tensors.

The tensors become outputs of a copy of the graph, which runs with all of ORT's optimizations. Each
sample's values are folded into fixed-size statistics and dropped. If one run's outputs would
exceed the memory allowed, the tensors are observed in groups, one pass over the data a group.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

import onnx_ir as ir

from qcompile.calib.stats import TensorStats
from qcompile.errors import DataError
from qcompile.graph.edit import drop_unread
from qcompile.run.probe import Fact
from qcompile.run.session import Feed, Options, Session


@dataclasses.dataclass(frozen=True)
class Want:
    """Which statistics of a tensor are asked for, beside its range."""

    histogram: bool = False
    channels: bool = False


@dataclasses.dataclass(frozen=True)
class Stats:
    """Statistics by tensor name, over `samples` samples in `passes` passes."""

    tensors: Mapping[str, TensorStats]
    samples: int
    passes: int


def observe(
    model: ir.Model,
    wanted: Mapping[str, Want],
    samples: Callable[[], Iterable[tuple[int, Feed]]],
    facts: Mapping[str, Fact],
    *,
    memory: int = 128 << 20,
    threads: int = 0,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Stats:
    """Statistics of the wanted tensors of the main graph.

    Args:
        model: the float model; not changed.
        wanted: by tensor name.
        samples: gives an iterator over (number, feed), anew at each call.
        facts: sizes of the tensors, to keep one run's outputs below `memory` bytes.
        memory: bytes that the observed outputs of one run may take.
        threads: intra-op threads, 0 for ORT's choice.
        tick: called with (pass, passes) after each sample.

    Raises:
        DataError: a tensor holds NaN; names tensor and sample.
    """
    groups = groups_within(wanted, facts, memory)
    tensors = {name: TensorStats() for name in wanted}
    seen = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number, group in enumerate(groups):
            session = Session(with_outputs(model, group), Options("all", threads=threads))
            seen = 0
            for index, feed in samples():
                values = session.run(feed, group)
                jobs = [
                    pool.submit(
                        tensors[name].add, value,
                        histogram=wanted[name].histogram, channels=wanted[name].channels,
                    )
                    for name, value in zip(group, values, strict=True)
                ]  # fmt: skip
                for name, job in zip(group, jobs, strict=True):
                    if not job.result():
                        raise DataError(
                            f"tensor {name!r} is NaN for sample {index} of the calibration data: the float "
                            "model itself fails there. Remove that sample or mend the model."
                        )
                del values, jobs
                seen += 1
                tick(number, len(groups))
    return Stats(tensors, seen, len(groups))


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


def with_outputs(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of the model that computes these values of the main graph; weights are shared."""
    clone = model.clone()
    by_name = dict(clone.graph.initializers)
    by_name |= {value.name or "": value for node in clone.graph for value in node.outputs}
    by_name |= {value.name or "": value for value in clone.graph.inputs}
    clone.graph.outputs.clear()
    clone.graph.outputs.extend(by_name[name] for name in names)
    drop_unread(clone)
    return clone
