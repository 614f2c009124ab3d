"""What a pass is, what it asks for, and what it answers."""

from __future__ import annotations

import abc
import dataclasses
import logging
import time
from collections.abc import Iterable, Sequence
from typing import ClassVar

import onnx_ir as ir

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Need:
    """Statistics of a tensor that a pass or a solver asks for, beside its count and range.

    Attributes:
        tensor: its name in the prepared graph.
        histogram: of its values.
        channels: mean, second moment and range of each channel.
        gram: X'X over the rows of the tensor, as GPTQ wants it; channels come with it.
    """

    tensor: str
    histogram: bool = False
    channels: bool = False
    gram: bool = False

    def __or__(self, other: Need) -> Need:
        """What both ask for, of one tensor."""
        assert self.tensor == other.tensor
        return Need(
            self.tensor, self.histogram or other.histogram, self.channels or other.channels,
            self.gram or other.gram,
        )  # fmt: skip


def merge_needs(needs: Iterable[Need]) -> dict[str, Need]:
    """One need a tensor, by name, in the order in which tensors are first asked for."""
    merged: dict[str, Need] = {}
    for need in needs:
        merged[need.tensor] = merged[need.tensor] | need if need.tensor in merged else need
    return merged


@dataclasses.dataclass
class Outcome:
    """What a pass did: the names of the nodes it changed, and per node it left alone the reason.

    `rescaled`: names of tensors whose values are others now.
    """

    changed: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    rescaled: set[str] = dataclasses.field(default_factory=set)


class Pass(abc.ABC):
    """A graph rewrite. Subclasses are frozen dataclasses: their fields are their options.

    A pass checks first and edits after: a node that it does not fit is skipped with a reason and is
    left as it was. Running a pass twice changes nothing the second time.
    """

    name: ClassVar[str]

    def needs(self, model: ir.Model) -> Sequence[Need]:
        """The statistics that the pass wants to have; those of all passes are gathered in one run."""
        del model
        return ()

    @abc.abstractmethod
    def apply(self, model: ir.Model) -> Outcome:
        """The rewrite, done in place."""


def run_pass(step: Pass, model: ir.Model) -> Outcome:
    """The pass applied, and one INFO line that says so."""
    start = time.perf_counter()
    outcome = step.apply(model)
    logger.info(
        "%s: %d changed, %d skipped, %.2f s",
        step.name, len(outcome.changed), len(outcome.skipped), time.perf_counter() - start,
    )  # fmt: skip
    return outcome
