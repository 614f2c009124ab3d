"""Every regression case, by name."""

from __future__ import annotations

from regressions import control_flow, names, operators, types_and_values

CASES = {
    name: make
    for file in (names, operators, control_flow, types_and_values)
    for name, make in file.case.makers.items()
}
