"""Target files: strict reading of `qcompile/targets/*.toml`, and what this machine is."""

from __future__ import annotations

import dataclasses
import functools
import platform
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from qcompile.errors import RecipeError, nearest

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
    """

    type: str
    kernel: str
    role: Role
    float: Cost
    int8: Cost
    variant: str = ""
    min_macs: int = 0
    min_bytes: int = 0

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
class Target:
    """A runtime on a kind of machine."""

    name: str
    title: str
    arch: tuple[str, ...]
    flags: tuple[str, ...]
    activation: str
    weight: str
    saturating: bool
    boundary: Boundary
    ops: tuple[OpRow, ...]
    refused: Mapping[str, str]

    def row(self, op_type: str, variant: str = "") -> OpRow | None:
        """The row for an operator: that of its variant if there is one, else the general one."""
        rows = {row.variant: row for row in self.ops if row.type == op_type}
        return rows.get(variant) or rows.get("")


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
        text = (resources.files("qcompile.targets") / f"{name}.toml").read_text("utf-8")
        return _parse(text, name)
    path = Path(name)
    if path.suffix == ".toml" and path.exists():
        return _parse(path.read_text("utf-8"), str(path))
    known = target_names()
    raise RecipeError(
        f"there is no target {name!r}.{nearest(name, known)} Known: {', '.join(known)}; or give a .toml file."
    )


def _parse(text: str, where: str) -> Target:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"target {where} is not valid TOML: {error}.") from error
    base = table.pop("extends", None)
    if base is not None:
        parent = (resources.files("qcompile.targets") / f"{base}.toml").read_text("utf-8")
        table = tomllib.loads(parent) | table
    keys = {
        "name",
        "title",
        "machine",
        "activation",
        "weight",
        "saturating",
        "boundary",
        "op",
        "refused",
    }
    for key in table:
        if key not in keys:
            raise RecipeError(f"target {where} has an unknown key {key!r}.{nearest(key, keys)}")
    for key in sorted(keys - table.keys()):
        raise RecipeError(f"target {where} lacks the key {key!r}.")
    return Target(
        name=table["name"], title=table["title"], arch=tuple(table["machine"]["arch"]),
        flags=tuple(table["machine"]["flags"]), activation=table["activation"],
        weight=table["weight"], saturating=table["saturating"],
        boundary=_make(Boundary, table["boundary"], f"target {where}, [boundary]"),
        ops=tuple(_row(row, f"target {where}, op {i}") for i, row in enumerate(table["op"])),
        refused=table["refused"],
    )  # fmt: skip


def _row(table: dict[str, Any], where: str) -> OpRow:
    costs = {key: _make(Cost, table.get(key, {}), f"{where}, {key}") for key in ("float", "int8")}
    row: OpRow = _make(OpRow, table | costs, where)
    if row.role not in get_args(Role):
        raise RecipeError(f"{where}: unknown role {row.role!r}.{nearest(row.role, get_args(Role))}")
    return row


def _make(kind: Any, table: Mapping[str, Any], where: str) -> Any:
    fields = {field.name for field in dataclasses.fields(kind)}
    for key in table:
        if key not in fields:
            raise RecipeError(f"{where}: unknown key {key!r}.{nearest(key, fields)}")
    try:
        return kind(**table)
    except TypeError as error:
        raise RecipeError(f"{where}: {error}.") from error


def detect() -> Target:
    """The target of this machine.

    Raises:
        RecipeError: none fits; the message says what the machine is.
    """
    machine, flags = platform.machine(), cpu_flags()
    for name in ("ort-cpu-x64-vnni", "ort-cpu-x64-avx2", "ort-cpu-arm64"):
        target = load_target(name)
        wanted = [any(f in flags for f in flag.split("|")) for flag in target.flags]
        if machine in target.arch and all(wanted):
            return target
    raise RecipeError(
        f"no target fits this machine ({machine}): choose one with --target from {', '.join(target_names())}."
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
