"""Models and files from anywhere: refused with one sentence or handled, in bounded time and memory; nothing is run.

Each command runs in a process of its own that may take 1 GB of address space and 20 s of processor time, and dies
of more. The makers are in `hostile`.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import hostile
import numpy as np
import onnx_ir as ir
import pytest
from hostile import DEEP, GROWING, HUGE, LAUGHS, MANY, RING, SHAPES, Maker
from networks import from_text, linear_net, rows, save
from onnx import helper
from sandbox import Done, Sandbox

from qcompile.errors import ModelError, printable
from qcompile.graph import io, trust

if sys.platform != "linux":
    pytest.skip("limits of processes are those of Linux", allow_module_level=True)

OUTSIDE = r"external data of tensor '\w+' is refused: .* is a link, or lies outside of the folder of m\.onnx"
EXPORT = r"export (or copy )?the model again\.$"
REFUSED: dict[str, tuple[Maker, str]] = {
    "above": (hostile.external_above, OUTSIDE),
    "absolute": (hostile.external_absolute, OUTSIDE),
    "link": (hostile.external_link, OUTSIDE),
    "hard link": (hostile.external_hard_link, OUTSIDE),
    "attribute": (hostile.external_attribute, OUTSIDE),
    "function": (hostile.external_in_function, OUTSIDE),
    "device": (hostile.external_device, "pipe is no ordinary file"),
    "folder": (hostile.external_folder, "w.data is no ordinary file"),
    "the model itself": (hostile.external_self, "weight 'w0' holds nan"),
    "negative offset": (hostile.offsets("-8", "262144"), "cannot be read as an ONNX model: .*-8"),
    "negative length": (hostile.offsets("0", "-4"), "cannot be read as an ONNX model: .*-4"),
    "no number": (hostile.offsets("x", "y"), "cannot be read as an ONNX model: .*'x'"),
    "huge length": (hostile.offsets("0", str(1 << 50)), f"said to be {1 << 50} bytes from byte 0"),
    "huge offset": (hostile.offsets(str(1 << 50), None), f"of at least {(1 << 50) + (1 << 18)}"),
    "wide offset": (hostile.offsets(str(1 << 70), None), "is truncated: w.data has 262144 bytes"),
    "short length": (hostile.offsets("0", "4"), "said to be 4 bytes from byte 0, and its shape takes 262144"),
    "beyond the end": (hostile.offsets("3", None), "has 262144 bytes of at least 262147"),
    "shape": (hostile.weight(dims=[HUGE]), f"shape .{HUGE}. takes {4 * HUGE} bytes, and 262144 are there"),
    "shape of few bytes": (hostile.weight(dims=[HUGE], raw_data=b"1234"), "bytes, and 4 are there"),
    "shape overflows": (hostile.weight(dims=[1 << 32, 1 << 32]), "impossible shape"),
    "negative shape": (hostile.weight(dims=[-1, 256]), r"impossible shape \[-1, 256\]"),
    "two negatives": (hostile.weight(dims=[-256, -256]), "impossible shape"),
    "dimensions": (hostile.many_dims, "10002 dimensions, more than 64"),
    "short": (hostile.weight(raw_data=b"1234"), "takes 262144 bytes, and 4 are there"),
    "empty": (hostile.weight(raw_data=b""), "takes 262144 bytes, and 0 are there"),
    "numbers": (hostile.weight(raw_data=b"", float_data=[1.0]), "takes 65536 numbers, and 1 are there"),
    "odd": (hostile.weight(raw_data=bytes((1 << 18) + 1)), "and 262145 are there"),
    "other type": (hostile.weight(data_type=11), "takes 524288 bytes, and 262144 are there"),
    "no type": (hostile.weight(data_type=0), "is of type UNDEFINED"),
    "unknown type": (hostile.weight(data_type=99), "cannot be read as an ONNX model: 99 is not a valid"),
    "strings": (hostile.weight(data_type=8), "takes 65536 strings, and 0 are there"),
    "sparse": (hostile.sparse_huge, f"takes {HUGE * 1024} bytes when it is dense, and 12 in the file"),
    "sparse index": (hostile.sparse_outside, "cannot be read as an ONNX model: index .* is out of bounds"),
    "40 bodies": (hostile.nested(40), "is not an ONNX model, or is truncated"),
    "500 bodies": (hostile.nested(500), "is not an ONNX model, or is truncated"),
    "5000 bodies": (hostile.nested(5000), "is not an ONNX model, or is truncated"),
    "billion laughs": (hostile.functions(LAUGHS, "f0"), "has more than 1000000 nodes when its functions are expanded"),
    "ring of functions": (hostile.functions(RING, "f0"), "function 'f0' calls itself"),
    "function of itself": (hostile.functions({"f": ["f"]}, "f"), "function 'f' calls itself"),
    "300 functions deep": (hostile.functions(DEEP, "f0"), "ONNX Runtime refuses m.onnx"),
    "cycle": (hostile.cyclic, "its nodes wait for each other"),
    "custom operator": (hostile.strange("mine"), "mine:Strange.* is not a registered function/op"),
    "unknown contrib operator": (hostile.strange("com.microsoft"), "is not a registered function/op"),
    "long domain": (hostile.strange("d" * 5000), "ONNX Runtime refuses m.onnx"),
    "bytes as metadata": (hostile.bad_metadata, r"the metadata b'\\xff.*' is not UTF-8: " + EXPORT),
    "bytes as name": (hostile.bad_utf8, r"the name b'\\xff.*' is not UTF-8: " + EXPORT),
}  # fmt: skip
HANDLED: dict[str, Maker] = {
    "offset and length 0": hostile.offsets("0", "0"),
    "20 bodies": hostile.nested(20),
    "nul in a name": hostile.renamed("a\0b"),
    "long name": hostile.renamed("n" * 100_000),
    "name of a path": hostile.renamed("../../etc/passwd"),
    "control characters": hostile.control_names,
    "declared output": SHAPES["output"],
    "declared value": SHAPES["value"],
}


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "work"
    made.mkdir()
    np.savez(made / "d.npz", x=rows())
    return made


def refused(done: Done) -> str:
    """The one sentence with which a command ended."""
    assert done.code == 2, done
    assert done.out == ""
    assert done.err.startswith("qcompile: ") and done.err.count("\n") == 1, done
    assert done.err.isascii() and len(done.err) < 800
    return done.err.removeprefix("qcompile: ").rstrip()


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, box: Sandbox, folder: Path) -> None:
    make, sentence = REFUSED[case]
    make(folder)
    before = sorted(folder.rglob("*"))
    message = refused(box.command("m.onnx", "--data", "d.npz", cwd=folder))
    assert re.search(sentence, message), message
    refused(box.command("m.onnx", "--recipe", "int4", cwd=folder))
    assert not box.command("inspect", "m.onnx", cwd=folder).crashed
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("case", HANDLED)
def test_handled(case: str, box: Sandbox, folder: Path) -> None:
    HANDLED[case](folder)
    for recipe in ("int8", "int4"):
        done = box.command("m.onnx", "--recipe", recipe, cwd=folder)
        assert done.code in (0, 4) and not done.crashed, done
        assert done.out.replace("\n", "").isprintable()


def test_hundreds_of_functions(box: Sandbox, folder: Path) -> None:
    hostile.functions(MANY, "f0")(folder)
    assert box.command("m.onnx", cwd=folder).code in (0, 4)


@pytest.mark.parametrize("case", SHAPES)
def test_shapes_far_beyond_the_file(case: str, box: Sandbox, folder: Path) -> None:
    SHAPES[case](folder)
    for words in ([], ["--data", "d.npz"], ["--recipe", "int4"]):
        done = box.command("m.onnx", *words, cwd=folder)
        assert not done.crashed, done
    if case.startswith("input"):
        assert "is too large to be made up: give samples" in refused(
            box.command("m.onnx", cwd=folder)
        )


@pytest.mark.parametrize("case", GROWING)
def test_constants_that_grow_where_nothing_runs(case: str, box: Sandbox, folder: Path) -> None:
    """In a branch that is not taken only folding could compute them, and it does not."""
    hostile.growing(case, taken=False)(folder)
    done = box.command("m.onnx", "--data", "d.npz", cwd=folder)
    if (
        case == "doubled"
    ):  # ONNX Runtime itself folds them when it loads the model, as far as memory goes
        assert "ONNX Runtime refuses m.onnx" in refused(done)
    else:
        assert done.code in (0, 4), done


@pytest.mark.parametrize("case", GROWING)
def test_constants_that_grow_on_the_way(case: str, box: Sandbox, folder: Path) -> None:
    """The model cannot run at all, which is a sentence; the few that can run are compiled."""
    hostile.growing(case, taken=True)(folder)
    done = box.command("m.onnx", "--data", "d.npz", cwd=folder)
    assert not done.crashed, done


def test_bodies_deeper_than_a_file_can_hold() -> None:
    value = ir.Value(name="c", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    body = ir.Graph([], [], nodes=[], name="inner")
    for level in range(3000):
        node = ir.Node("", "If", [value], [ir.AttrGraph("then_branch", body)], num_outputs=1)
        node.outputs[0].name = f"o{level}"
        body = ir.Graph([value] if level == 2999 else [], node.outputs, nodes=[node],
                        opset_imports={"": 17}, name=f"g{level}")  # fmt: skip
    model = ir.Model(body, ir_version=8)
    with pytest.raises(ModelError, match="more than 32 deep in each other"):
        trust.check(model, "the model given", None)
    with pytest.raises(ModelError, match="the model given is not valid"):
        io.load(model)


def test_a_model_in_memory_reads_no_file_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    model = linear_net()
    hostile.refer(model.graph.initializer[0], str(hostile.secret(tmp_path / "secret")))
    with pytest.raises(ModelError, match=r"is refused: .*secret is a link, or lies outside"):
        io.load(model)
    model = linear_net()
    hostile.refer(model.graph.initializer[0], "a\0b")
    with pytest.raises(ModelError, match="cannot be found: embedded null byte"):
        io.load(model)


def test_the_largest_sparse_weight() -> None:
    trust.check_dense((1 << 24,), 12, 4, "w")  # 64 MB are always taken
    trust.check_dense((1 << 28,), 1 << 21, 4, "w")
    for dims, stored in (((1 << 25,), 12), ((1 << 30,), 1 << 28), ((-4, -4), 12), ((1,) * 65, 12)):
        with pytest.raises(ModelError, match="sparse tensor 'w'"):
            trust.check_dense(dims, stored, 4, "w")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", [k for k in ir.DataType if k not in (0, 8)])
def test_every_type_of_tensor_passes(kind: ir.DataType, packed: bool) -> None:
    """In both forms in which ONNX stores it: as bytes, and as numbers; with too few of them it is refused."""
    values = np.array([1, 1, 1]).astype(kind.numpy())
    if packed:
        tensor = ir.to_proto(ir.tensor(values, dtype=kind, name="w"))
    else:
        tensor = helper.make_tensor("w", int(kind), [3], [1, 1, 1])
    for size in (3, 40):
        tensor.dims[0] = size
        model = from_text("g (float[N,256] x) => (float[N,256] y) { y = Relu(x) }")
        model.graph.initializer.append(tensor)
        if size == 3:
            assert np.array_equal(
                io.load(model).graph.initializers["w"].const_value.numpy(), values
            )
        else:
            with pytest.raises(ModelError, match=r"of shape .40. takes .* are there"):
                io.load(model)


def test_object_arrays_are_not_unpickled(box: Sandbox, folder: Path) -> None:
    save(linear_net(), folder / "m.onnx")
    hostile.object_array(folder)
    assert "without pickled objects" in refused(
        box.command("m.onnx", "--data", "d.npz", cwd=folder)
    )
    (folder / "d.npz").rename(folder / "d.stats")
    assert "is no statistics file" in refused(
        box.command("m.onnx", "--stats", "d.stats", cwd=folder)
    )
    assert not (folder / "pwned").exists()


def test_archives_that_unpack_to_too_much(box: Sandbox, folder: Path) -> None:
    save(linear_net(), folder / "m.onnx")
    hostile.lying_bomb(folder)
    message = refused(box.command("m.onnx", "--data", "d.npz", cwd=folder))
    assert "d.npz unpacks to 4294967280 bytes, more than 100 times its own" in message
    assert "d.npz" in refused(box.command("m.onnx", "--stats", "d.npz", cwd=folder))


def test_an_array_that_says_it_is_huge(box: Sandbox, folder: Path) -> None:
    save(linear_net(), folder / "m.onnx")
    hostile.long_header(folder)
    assert "d.npy is no array file that can be read" in refused(
        box.command("m.onnx", "--data", "d.npy", cwd=folder)
    )


@pytest.mark.parametrize(
    ("option", "name", "text", "sentence"),
    [
        ("--recipe", "r.toml", "x = " + "[" * 100_000, "nested too deeply"),
        ("--recipe", "r.toml", "x" + ".x" * 50_000 + " = 1", "nested too deeply"),
        ("--recipe", "r.toml", 'keep_float = ["' + "a." * 200 + '"]', "matches no node"),
        ("--recipe", "r.toml", "x" + ".x" * 90 + " = 1", "unknown key 'x'"),
        ("--recipe", "r.toml", "threads = 999999", "give 0 (ORT's choice) to 4096"),
        ("--recipe", "r.toml", "threads = " + "9" * 5000, "is not valid TOML"),
        ("--recipe", "r.toml", "threads = " + "9" * 4000, "which is too large"),
        ("--recipe", "r.toml", "bench_seconds = " + "9" * 400, "which is too large"),
        ("--recipe", "r.toml", "bits = 4\naccuracy_level = 7", "not one of 0, 1, 2, 3, 4"),
        ("--recipe", "r.toml", "bits = 4\naccuracy_level = true", "not one of 0, 1, 2, 3, 4"),
        ("--target", "t.toml", "x = " + "[" * 100_000, "nested too deeply"),
        ("--plan", "p.json", "[" * 100_000, "nested too deeply"),
        ("--plan", "p.json", '{"version": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("--plan", "p.json", '{"version": 1, "target": "t", "activation": "a", "nodes": ' + '{"a":' * 900 + "1" + "}" * 901, "'nodes' is"),
    ],
)  # fmt: skip
def test_texts_that_are_nested_or_long(
    option: str, name: str, text: str, sentence: str, box: Sandbox, folder: Path
) -> None:
    save(linear_net(), folder / "m.onnx")
    (folder / name).write_text(text)
    assert sentence in refused(box.command("m.onnx", option, name, cwd=folder))


def test_only_the_named_function_runs(box: Sandbox, folder: Path) -> None:
    """A module beside the model, and one that the model or the recipe names, are not imported."""
    model = linear_net()
    model.metadata_props.add(key="data", value="evil:feeds")
    save(model, folder / "m.onnx")
    for name in ("evil", "numpy", "sitecustomize", "conftest"):
        (folder / f"{name}.py").write_text("open('ran', 'w')\ndef feeds(): return []\n")
    (folder / "r.toml").write_text('name = "evil:feeds"\n')
    assert box.command("m.onnx", "--recipe", "r.toml", cwd=folder).code in (0, 4)
    assert not (folder / "ran").exists()
    (folder / "named.py").write_text(
        "import numpy as np\ndef feeds(): return [{'x': np.ones((4, 256), np.float32)}]\n"
    )
    assert box.command("m.onnx", "--data", "named:feeds", cwd=folder).code in (0, 4)
    assert not (folder / "ran").exists()


def test_nothing_is_evaluated() -> None:
    """No pickle, `eval`, `exec` or shell in the package; modules are imported by the user's own word alone."""
    import ast

    root = Path(__file__).parents[1]
    found = set()
    for path in sorted((*root.glob("qcompile/**/*.py"), *root.glob("passes/*.py"))):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            elif isinstance(node, ast.Call):
                names = [ast.unparse(node.func)]
                names += [f"{k.arg}={ast.unparse(k.value)}" for k in node.keywords]
            for name in names:
                if name.split(".")[0] in ("pickle", "marshal", "shelve", "subprocess", "eval", "exec", "compile") or name in (
                    "allow_pickle=True", "os.system", "importlib.import_module", "__import__", "yaml.load",
                ):  # fmt: skip
                    found.add((str(path.relative_to(root)), name))
    assert found == {
        ("qcompile/__init__.py", "importlib.import_module"),  # its own modules
        ("qcompile/calib/spool.py", "importlib.import_module"),  # module:function
    }


def test_names_cannot_steer_the_terminal(box: Sandbox, folder: Path) -> None:
    hostile.control_names(folder)
    for words in (["m.onnx"], ["inspect", "m.onnx"], ["plan", "m.onnx"]):
        done = box.command(*words, cwd=folder)
        assert not done.crashed, done
        assert "\x1b" not in done.out + done.err and "\r" not in done.out + done.err
    json.loads(box.command("plan", "m.onnx", "--json", cwd=folder).out)
    assert printable("a\x1b[2J\n\u202eb") == "a\\x1b[2J\\n\\u202eb"
