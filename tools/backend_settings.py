"""The recipes that the ONNX backend suite is run with, and how tiny models are made to be quantized, without timing."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Setting:
    """A recipe as it is run here: its name in the table, options, and whether there is data."""

    name: str
    recipe: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: bool = True


SETTINGS = (
    Setting("int8", "int8"),
    Setting("int8-static qdq", "int8-static", {"format": "qdq"}),
    Setting("int8-static fused", "int8-static", {"format": "fused"}),
    Setting("int8-dynamic", "int8-dynamic"),
    Setting("int4", "int4"),
    Setting("int8-weights", "int8-weights"),
    Setting("int8, no data", "int8", data=False),
)


def untimed() -> None:
    """From now on every result in this process is twice as fast as the float model, without being run."""
    import qcompile.commands
    import qcompile.compiler  # noqa: F401 - the modules that follow from these are patched
    from qcompile.verify import latency

    def race(sessions: Mapping[str, Any], _: object, **__: object) -> latency.Timing:
        first, *others = sessions
        speeds = {first: 1.0} | dict.fromkeys(others, 2.0)
        return latency.Timing({name: 2.0 / s for name, s in speeds.items()}, speeds, 3)

    for name, module in list(sys.modules.items()):
        if name.startswith("qcompile") and hasattr(module, "race"):
            module.race = race  # type: ignore[attr-defined]


def eager_target(folder: Path) -> Path:
    """A target file like that of this machine for which integer nodes and borders are free, and none too small."""
    from qcompile.targets.schema import detect

    base = detect()
    rows = [
        f'[[op]]\ntype = "{row.type}"\nvariant = "{row.variant}"\nkernel = "{row.kernel}"\nrole = "{row.role}"\n'
        "float = { elem = 100.0, input = 100.0 }\nint8 = {}\n"
        for row in base.op
    ]
    text = (
        f'extends = "{base.name}"\nname = "eager"\ntitle = "everything integer"\n'
        # no machine is like it: kernels are not timed
        'machine = { arch = ["none"], flags = [] }\n'
        "boundary = { quantize = 0.0, dequantize = 0.0, layout = 0.0, overhead = 0.0 }\n"
    )
    path = folder / "eager.toml"
    path.write_text(text + "\n".join(rows), "utf-8")
    return path


def recipe_of(setting: Setting, eager: Path | None) -> Any:
    """The recipe of a setting, on one thread."""
    from qcompile.recipe import BUILT_IN

    options: dict[str, Any] = {"threads": 1, "bench_seconds": 0.001, **setting.options}
    recipe = BUILT_IN[setting.recipe]
    if eager is not None:
        options |= {"target": str(eager), "sqnr_goal": 0.0, "ranges": "minmax"}
        if recipe.bits is not None:
            options["bits_for"] = (f"*={recipe.bits}",)
    return dataclasses.replace(recipe, **options)
