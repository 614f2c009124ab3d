"""Who may import whom: a module imports only what stands before it in ORDER."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Folders and top-level modules. `qcompile` is the public face; it imports the rest when names are used.
ORDER = (
    "errors", "version", "interrupt", "progress", "table", "limits", "resident", "quant", "graph", "step", "targets", "run", "plan",
    "calib", "recipe", "algo", "solve", "passes", "prepare", "decode", "kv", "build", "pieces", "timing", "verify", "kv_session", "figure", "report", "inputs",
    "keep", "spot", "stream", "opened", "provenance", "kv_apply", "workshop", "accept", "faster", "tune", "predict", "improve", "budget", "referee", "frontier", "search", "finish", "fewbits", "compiler", "calibrate", "harm", "gains", "layers", "commands", "survey",
    "show", "words", "option_groups", "options", "cli", "__main__", "qcompile",
)  # fmt: skip
# What only annotations need may stand above, for these alone: (importer, imported).
UPWARD: set[tuple[str, str]] = set()
# Packages with one door: only these files import them.
DOORS = {
    "onnxruntime": ("qcompile/run/",),
    "onnx": ("qcompile/graph/io.py", "qcompile/graph/wire.py", "qcompile/graph/text.py"),
    "google": ("qcompile/graph/io.py", "qcompile/graph/wire.py"),
    "scipy": ("qcompile/algo/drift.py", "qcompile/plan/knapsack.py", "qcompile/plan/network.py"),
    "PIL": ("qcompile/calib/images.py",),
    "tokenizers": ("qcompile/calib/tokens.py",),
    "rich": ("qcompile/progress.py", "qcompile/show.py"),
    "threadpoolctl": ("qcompile/fewbits/sequential.py", "qcompile/fewbits/sweep.py"),
    "torch": (),
    "onnx_graphsurgeon": (),
}


def _name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(p): p for top in ("qcompile", "passes") for p in sorted((ROOT / top).rglob("*.py"))}


def _imports(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules that a file names, and whether only its annotations do."""
    tree = ast.parse(path.read_text("utf-8"))
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in FILES else str(node.module)), id(node) in typing


def _layer(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "passes" or len(parts) == 1 else parts[1]


def test_every_module_has_a_layer_and_every_layer_a_module() -> None:
    assert {_layer(module) for module in FILES} == set(ORDER)


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down(module: str) -> None:
    own = _layer(module)
    for target, only_types in _imports(FILES[module]):
        if target not in FILES or own == _layer(target):
            continue
        down = ORDER.index(_layer(target)) < ORDER.index(own)
        allowed = only_types and (own, _layer(target)) in UPWARD
        assert down or allowed, f"{module} imports {target}, which stands above it"


@pytest.mark.parametrize("module", FILES)
def test_packages_have_one_door(module: str) -> None:
    path = FILES[module]
    for target, _ in _imports(path):
        doors = DOORS.get(target.partition(".")[0])
        inside = doors is None or str(path.relative_to(ROOT)).startswith(doors)
        assert inside, f"{module} imports {target}; only {', '.join(doors or ())} may"


def test_no_cycles() -> None:
    uses = {
        module: {t for t, only_types in _imports(path) if t in FILES and not only_types}
        for module, path in FILES.items()
    }
    graphlib.TopologicalSorter(uses).prepare()  # raises CycleError


def test_upward_imports_are_needed() -> None:
    found = {
        (_layer(module), _layer(target))
        for module, path in FILES.items()
        for target, only_types in _imports(path)
        if target in FILES and only_types
        if ORDER.index(_layer(target)) > ORDER.index(_layer(module))
    }
    assert found == UPWARD


def test_files_are_short() -> None:
    long = {m: n for m, p in FILES.items() if (n := len(p.read_text("utf-8").splitlines())) > 400}
    assert long == {}
