"""Target files: strict reading of `qcompile/targets/*.toml`, and what this machine is."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from qcompile.errors import RecipeError, nearest
from qcompile.quant.scheme import Scheme
from qcompile.table import fill, read_text, read_toml

Role = Literal[
    "conv", "dynamic", "recurrent", "embedding", "binary", "unary", "pool", "concat", "same"
]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a kernel costs on one thread.

    Attributes:
        mac: picoseconds a multiply-accumulate.
        elem: nanoseconds an element of the output.
        input: nanoseconds an element of the first input.
    """

    mac: float = 0.0
    elem: float = 0.0
    input: float = 0.0

    def ns(self, macs: float, elements: float, inputs: float) -> float:
        """Nanoseconds for so many multiply-accumulates, output elements and input elements."""
        return self.mac * macs / 1000 + self.elem * elements + self.input * inputs


@dataclasses.dataclass(frozen=True)
class OpRow:
    """One operator that the target has an integer kernel for.

    Attributes:
        type: ONNX operator type.
        variant: which nodes of that type, "" for all others.
        kernel: names in the optimized graph that count as the integer kernel, split by `|`.
        role: how the operator is quantized; see `qcompile.plan.candidates`.
        float, int8: costs of the two forms.
        min_macs: below this many multiply-accumulates a run the node stays float.
        min_bytes: below this many weight bytes the node stays float.
        block: weights that share a scale in the weight-only form, MatMulNBits with 8 bits; 0: there is no such form.
    """

    type: str
    kernel: str
    role: Role
    float: Cost = dataclasses.field(default_factory=Cost)
    int8: Cost = dataclasses.field(default_factory=Cost)
    variant: str = ""
    min_macs: int = 0
    min_bytes: int = 0
    block: int = 0

    @property
    def kernels(self) -> frozenset[str]:
        """The operator types of the optimized graph that count as the integer kernel."""
        return frozenset(self.kernel.split("|"))


@dataclasses.dataclass(frozen=True)
class Boundary:
    """Costs between float and integer regions, in nanoseconds an element; `overhead` a node."""

    quantize: float
    dequantize: float
    layout: float
    overhead: float


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a target runs on.

    Attributes:
        arch: names that `platform.machine` may give.
        flags: instruction sets that it must have; `a|b` is either.
    """

    arch: tuple[str, ...]
    flags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime on a kind of machine: the keys of a target file.

    Attributes:
        name, title: for reports and lists.
        machine: what it runs on.
        activation, weight: spellings of the schemes of activations and weights.
        saturating: whether products of full 8-bit codes can overflow 16 bits.
        boundary: costs between float and integer regions.
        op: the operators that have an integer kernel.
        refused: operator types that stay float -> why.
        channels: a block of ORT's float layout for convolutions (NCHWc) on such a machine; 1 if there is none.
    """

    name: str
    title: str
    machine: Machine
    activation: str
    weight: str
    saturating: bool
    boundary: Boundary
    op: tuple[OpRow, ...]
    refused: Mapping[str, str]
    channels: int = 1

    def __post_init__(self) -> None:
        """Raises: RecipeError if a scheme is not spelled right."""
        Scheme.parse(self.activation)
        Scheme.parse(self.weight)

    def row(self, op_type: str, variant: str = "") -> OpRow | None:
        """The row for an operator: that of its variant if there is one, else the general one."""
        rows = {row.variant: row for row in self.op if row.type == op_type}
        return rows.get(variant) or rows.get("")

    @property
    def channel_block(self) -> int:
        """`channels`; on this machine, if it is of the target's kind, that of its widest instructions."""
        known = self.fits_here() and platform.machine() in ("x86_64", "AMD64")
        return min(self.channels, 16 if "avx512f" in cpu_flags() else 8) if known else self.channels

    def fits_here(self) -> bool:
        """Whether this machine is of the target's kind; it may have more instructions."""
        flags = cpu_flags()
        wanted = [any(f in flags for f in flag.split("|")) for flag in self.machine.flags]
        return platform.machine() in self.machine.arch and all(wanted)


def target_names() -> list[str]:
    """The names of the targets that ship with qcompile."""
    folder = resources.files("qcompile.targets")
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def load_target(name: str) -> Target:
    """The target of that name, of that TOML file, or of this machine for `auto`.

    Raises:
        RecipeError: no such target, or a file that is not one; the message names file and key.
    """
    if name == "auto":
        return detect()
    if name in target_names():
        return fill(Target, _table(_shipped(name), f"target {name}"), f"target {name}")
    path = Path(name)
    if path.suffix == ".toml" and path.exists():
        where = f"target {path}"
        return fill(Target, _table(read_text(path, where), where), where)
    known = target_names()
    raise RecipeError(
        f"there is no target {name!r}.{nearest(name, known)} Known: {', '.join(known)}; or give a .toml file."
    )


def _shipped(name: str) -> str:
    return (resources.files("qcompile.targets") / f"{name}.toml").read_text("utf-8")


def _table(text: str, where: str) -> dict[str, Any]:
    """The keys of a target file over those of the shipped target that it `extends`."""
    table = read_toml(text, where)
    base = table.pop("extends", None)
    if base is None:
        return table
    known = target_names()
    if base not in known:
        raise RecipeError(
            f"{where} extends {base!r}, which is no target that ships with qcompile."
            f"{nearest(str(base), known)} Known: {', '.join(known)}."
        )
    return _table(_shipped(base), f"target {base}") | table


def detect() -> Target:
    """The target of this machine.

    Raises:
        RecipeError: none fits; the message says what the machine is.
    """
    for name in ("ort-cpu-x64-vnni", "ort-cpu-x64-avx2", "ort-cpu-arm64"):
        target = load_target(name)
        if target.fits_here():
            return target
    raise RecipeError(
        f"no target fits this machine ({platform.machine()}): choose one with --target from {', '.join(target_names())}."
    )


@functools.cache
def cpu_flags() -> frozenset[str]:
    """The instruction sets of this CPU, as Linux names them; AVX2 is assumed where they are unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return frozenset({"avx2"})
    for line in lines:
        if line.lower().startswith(("flags", "features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()
