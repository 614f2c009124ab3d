"""Samples in small groups: each is folded at once, and where the model allows it run at once as well."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qcompile.run.probe import Fact
from qcompile.run.session import Feed

_MOST = 16
_BYTES = 16 << 20  # outputs that are folded at once
_SMALL = 1 << 22  # bytes: activations of a sample above which running several at once gains nothing


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples: their numbers in the source, and their feeds."""

    numbers: Sequence[int]
    feeds: Sequence[Feed]

    @property
    def alike(self) -> bool:
        """Whether all feeds have the same inputs of the same shapes."""
        shapes = [{name: np.shape(value) for name, value in feed.items()} for feed in self.feeds]
        return all(shape == shapes[0] for shape in shapes)

    def joined(self) -> Feed:
        """The samples behind each other along the first axis."""
        if len(self.feeds) == 1:
            return self.feeds[0]
        return {
            name: np.concatenate([np.asarray(feed[name]) for feed in self.feeds])
            for name in self.feeds[0]
        }

    @property
    def singles(self) -> Iterator[tuple[int, Feed]]:
        """(number, feed) of each sample."""
        return zip(self.numbers, self.feeds, strict=True)


def batches(samples: Iterable[tuple[int, Feed]], size: Callable[[Feed], int]) -> Iterator[Batch]:
    """The samples in order: the first one alone, then as many at a time as `size` says of the first of them."""
    left, count = iter(samples), 1
    while True:
        part = list(itertools.islice(left, 1))
        if not part:
            return
        count = min(count, size(part[0][1]))
        part += itertools.islice(left, count - 1)
        yield Batch([number for number, _ in part], [feed for _, feed in part])
        count = _MOST


def batch_size(sample_bytes: int, memory: int) -> int:
    """How many samples, whose inputs and outputs take so many bytes each, are folded at once."""
    return max(1, min(_MOST, min(_BYTES, memory // 4) // max(sample_bytes, 1)))


def may_run_together(model: ir.Model, facts: Mapping[str, Fact]) -> bool:
    """Whether it is worth a trial to run several samples at once.

    Every input that is fed must declare a first dimension that may vary, and all activations must be small.
    """
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    dynamic = bool(inputs) and all(
        value.shape is not None and len(value.shape) > 0 and not isinstance(value.shape[0], int)
        for value in inputs
    )
    return dynamic and 0 < 4 * sum(fact.elements for fact in facts.values()) <= _SMALL
