"""What a pass is, and what it answers."""

from __future__ import annotations

import abc
import dataclasses
import logging
import time
from typing import ClassVar

import onnx_ir as ir

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Outcome:
    """What a pass did: the names of the nodes it changed, and per node it left alone the reason."""

    changed: list[str] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


class Pass(abc.ABC):
    """A graph rewrite. Subclasses are frozen dataclasses: their fields are their options.

    A pass checks first and edits after: a node that it does not fit is skipped with a reason and is
    left as it was. Running a pass twice changes nothing the second time.
    """

    name: ClassVar[str]

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
