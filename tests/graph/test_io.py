import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from rewrites import assert_close, parse, random_feed, run

from qcompile.errors import ModelError, OutputError
from qcompile.graph import io, wire
from qcompile.graph.edit import graphs
from qcompile.graph.publish import atomic

W = ", ".join(str(i % 7) for i in range(400))
TEXT = f"g (float[3,20] x) => (float[3,20] y) <float[20,20] w = {{{W}}}> {{ y = MatMul(x, w) }}"


def model() -> ir.Model:
    return parse(TEXT)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "m.onnx"
    io.save(model(), found)
    return found


def external(folder: Path, name: str = "e.onnx") -> Path:
    """A model whose weight lies in `name`.bin beside it."""
    path = folder / name
    ir.save(model(), path, external_data=f"{name}.bin")
    return path


def test_a_path_a_string_a_model_and_a_proto(path: Path) -> None:
    wanted = ir.to_onnx_text(model())
    for source in (path, str(path), model(), onnx.load(path)):
        assert ir.to_onnx_text(io.load(source)) == wanted


def test_the_model_given_is_not_changed() -> None:
    given = model()
    loaded = io.load(given)
    loaded.graph.remove(loaded.graph[0])
    assert len(given.graph) == 1


def refused(source: Path | ir.Model | onnx.ModelProto) -> str:
    with pytest.raises(ModelError) as caught:
        io.load(source)
    return str(caught.value)


def test_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "no.onnx"
    assert refused(path) == f"{path} does not exist: give the path of an ONNX model."


def test_a_folder(tmp_path: Path) -> None:
    assert (
        refused(tmp_path) == f"{tmp_path} is a folder: give the path of the .onnx file inside it."
    )


def test_a_file_that_may_not_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert refused(path) == f"{path} cannot be read: check its permissions."


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("This is no model.\n")
    assert refused(path) == (
        f"{path} is not an ONNX model, or is truncated (18 bytes): export or copy it again."
    )


def test_a_truncated_file(path: Path) -> None:
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 9, 1):
        path.write_bytes(whole[:size])
        assert refused(path) == (
            f"{path} is not an ONNX model, or is truncated ({size} bytes): export or copy it again."
        )


def test_an_empty_file(path: Path) -> None:
    path.write_bytes(b"")
    assert refused(path) == f"{path} holds no graph: it is not an ONNX model, or is truncated."


def test_a_model_without_outputs(path: Path) -> None:
    proto = onnx.load(path)
    del proto.graph.output[:]
    path.write_bytes(proto.SerializeToString())
    assert refused(path) == f"{path} has no outputs: there is nothing to compile."
    assert refused(proto) == "the model given has no outputs: there is nothing to compile."
    given = model()
    given.graph.outputs.clear()
    assert refused(given) == "the model given has no outputs: there is nothing to compile."


def test_a_model_without_an_opset(path: Path) -> None:
    proto = onnx.load(path)
    del proto.opset_import[:]
    path.write_bytes(proto.SerializeToString())
    assert refused(path) == f"{path} names no opset: it is not a valid ONNX model."


def test_a_graph_that_contradicts_itself(path: Path) -> None:
    proto = onnx.load(path)
    proto.graph.node.append(proto.graph.node[0])
    path.write_bytes(proto.SerializeToString())
    assert refused(path).startswith(f"{path} cannot be read as an ONNX model: ")
    assert refused(proto).startswith("the model given is not valid: ")


def test_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    loaded = io.load(path)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    feed = random_feed(loaded)
    assert_close(run(loaded, feed), run(model(), feed))


def test_external_data_that_is_missing(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "e.onnx.bin").unlink()
    assert refused(path) == (
        f"the external data of tensor 'w' is missing: {tmp_path / 'e.onnx.bin'} does not exist. "
        "Put it beside e.onnx."
    )


def test_external_data_that_is_truncated(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = tmp_path / "e.onnx.bin"
    data.write_bytes(data.read_bytes()[:-1])
    assert refused(path) == (
        f"the external data of tensor 'w' is truncated: {data} has 1599 bytes of at least 1600. "
        "Copy it again."
    )


def test_a_reference_does_not_leave_its_folder(tmp_path: Path) -> None:
    """What is saved small holds its weights, wherever they came from."""
    source, target = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    target.mkdir()
    loaded = io.load(external(source))
    io.save(loaded, target / "m.onnx")
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor)
    assert io.check(loaded) is None
    for file in list(source.iterdir()):
        file.unlink()
    saved = io.load(target / "m.onnx")
    assert [file.name for file in target.iterdir()] == ["m.onnx"]
    feed = random_feed(saved)
    assert_close(run(saved, feed), run(model(), feed))


def test_weights_of_bodies_count() -> None:
    found = parse(
        """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
        y = If(c) <then_branch = a () => (float[2] p) <float[2] v = {3, 4}, int64[1] i = {0}> { p = Add(x, v) },
                   else_branch = b () => (float[2] q) <float16[3] u = {1, 2, 3}> { q = Add(x, w) }> }"""
    )
    assert io.weight_bytes(found) == 8 + 8 + 8 + 6


def test_external_data_of_a_body_is_checked(tmp_path: Path) -> None:
    found = parse(
        """g (float[80] x, bool c) => (float[80] y) {
        y = If(c) <then_branch = a () => (float[80] p) <float[1] v = {3}> { p = Add(x, v) },
                   else_branch = b () => (float[80] q) { q = Neg(x) }> }"""
    )
    body = list(graphs(found))[1]
    body.initializers["v"].const_value = ir.tensor(np.ones(80, np.float32), name="v")
    ir.save(found, tmp_path / "m.onnx", external_data="w.bin")
    (tmp_path / "w.bin").unlink()
    assert "tensor 'v' is missing" in refused(tmp_path / "m.onnx")


def test_a_small_model_is_one_file(path: Path) -> None:
    assert [file.name for file in path.parent.iterdir()] == ["m.onnx"]
    assert io.file_bytes(path) == path.stat().st_size
    assert path.stat().st_mode & 0o044 == 0o044 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_large_model_has_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 1000)
    path = tmp_path / "big.onnx"
    given = model()
    io.save(given, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    proto = onnx.load(path, load_external_data=False)
    (entry,) = [e.value for e in proto.graph.initializer[0].external_data if e.key == "location"]
    assert entry == "big.onnx.data"
    assert io.file_bytes(path) == path.stat().st_size + 1600
    (tmp_path / "link.onnx").symlink_to(path)
    assert io.file_bytes(tmp_path / "link.onnx") == path.stat().st_size + 1600
    assert not isinstance(given.graph.initializers["w"].const_value, ir.ExternalTensor)
    feed = random_feed(given)
    monkeypatch.undo()
    assert_close(run(io.load(path), feed), run(given, feed))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in (path, tmp_path / "big.onnx.data"):
        file.replace(moved / file.name)
    assert_close(run(io.load(moved / "big.onnx"), feed), run(given, feed))


def test_a_large_model_over_the_one_it_was_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 1000)
    path = tmp_path / "big.onnx"
    io.save(model(), path)
    loaded = io.load(path)
    io.save(loaded, path)  # reads the data file that it replaces
    feed = random_feed(loaded)
    monkeypatch.undo()
    assert_close(run(io.load(path), feed), run(model(), feed))


def test_a_large_model_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 1)
    broken = model()
    broken.graph[0].op_type = "NoSuchOp"
    assert io.check(broken) is None
    monkeypatch.undo()
    assert "NoSuchOp" in str(io.check(broken))


def unwritable(path: Path) -> str:
    with pytest.raises(OutputError) as caught:
        io.save(model(), path)
    return str(caught.value)


def test_an_output_that_is_a_folder(tmp_path: Path) -> None:
    assert unwritable(tmp_path) == f"{tmp_path} is a folder: name a file with -o."


def test_an_output_folder_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "no" / "m.onnx"
    assert unwritable(path) == f"the folder {path.parent} does not exist: create it, or change -o."


def test_an_output_folder_that_is_a_file(path: Path) -> None:
    below = path / "m.onnx"
    assert unwritable(below) == f"the folder {path} does not exist: create it, or change -o."


def test_an_output_that_may_not_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = f"{path} cannot be written: check permissions, or choose another with -o."
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert unwritable(path) == message
    monkeypatch.setattr(os, "access", lambda place, _: Path(place) != path)
    assert unwritable(path) == message


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300 + ".onnx")
    assert unwritable(path) == f"{path} could not be written: File name too long."
    assert "File name too long" in refused(path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(wire, "write", fail)
    assert unwritable(path) == f"{path} could not be written: No space left on device."
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 1)
    monkeypatch.setattr(ir, "save", fail)
    assert unwritable(path) == f"{path} could not be written: No space left on device."
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["m.onnx"]


def test_a_folder_that_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "mkdtemp", fail)
    assert unwritable(path) == f"{path} could not be written: Read-only file system."


def test_an_interruption_leaves_nothing(path: Path) -> None:
    before = path.read_bytes()

    def interrupted() -> None:
        with atomic(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["m.onnx"]


def test_another_opset() -> None:
    old = parse(
        "g (float[4] x) => (float[4] y) { [mine] y = Clip<min = 0.0, max = 6.0>(x) }", 10, 3
    )
    old.metadata_props["author"] = "me"
    raised = io.convert_opset(old, 13)
    assert raised.opset_imports[""] == 13
    assert raised.ir_version == 8
    assert raised.metadata_props["author"] == "me"
    assert [node.name for node in raised.graph if node.op_type == "Clip"] == ["mine"]
    feed = random_feed(old)
    assert_close(run(raised, feed), run(old, feed))


def test_an_old_model_with_weights_that_are_no_inputs() -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"
    assert io.convert_opset(parse(text, 9, 3), 13).opset_imports[""] == 13


def test_an_opset_that_cannot_be_reached() -> None:
    text = "g (float[4] x) => (float[4] y) { y = NoSuchOp(x) }"
    with pytest.raises(ModelError, match=r"the model cannot be raised to opset 13: .+\."):
        io.convert_opset(parse(text, 7), 13)


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_external_data_that_is_a_link(tmp_path: Path, link: Callable[[Path, Path], None]) -> None:
    (tmp_path / "a").mkdir()
    path = external(tmp_path / "a")
    (file,) = [file for file in path.parent.iterdir() if file != path]
    file.rename(tmp_path / "elsewhere")
    link(file, tmp_path / "elsewhere")
    for mapped in (False, True):
        with pytest.raises(ModelError, match="is refused") as caught:
            io.load(path, mapped=mapped)
        message = str(caught.value)
        assert message.endswith("Copy both into one folder.")


def test_a_model_and_its_data_go_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / name).write_text(f"old {name}")
    true = Path.replace

    def fail(file: Path, place: Path) -> Path:
        if Path(place) == path and file.name == path.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return true(file, place)

    monkeypatch.setattr(Path, "replace", fail)
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 1)
    assert "Input/output error" in unwritable(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    for name in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / name).read_text() == f"old {name}"
    monkeypatch.undo()
    monkeypatch.setattr(io, "EXTERNAL_BYTES", 1)
    io.save(model(), path)
    assert (tmp_path / "m.onnx.data").stat().st_size == 1600


def test_a_file_is_checked_where_it_stands(tmp_path: Path) -> None:
    io.save(model(), tmp_path / "m.onnx")
    assert io.check_file(tmp_path / "m.onnx") is None
    broken = model()
    broken.graph[0].op_type = "NoSuchOp"
    io.save(broken, tmp_path / "n.onnx")
    assert "NoSuchOp" in str(io.check_file(tmp_path / "n.onnx"))
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["m.onnx", "n.onnx"]


def unsorted() -> onnx.ModelProto:
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[2,2] x, bool c) => (float[2,2] y) {
            r = Relu(x) n = Neg(x) s = Sub(r, n)
            y = If(c) <then_branch = a () => (float[2,2] u) { u = Exp(s) }, else_branch = b () => (float[2,2] v) { v = Neg(s) }> }""")
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    return model


def test_nodes_in_any_order_are_sorted(tmp_path: Path) -> None:
    """ONNX asks for sorted ones, ONNX Runtime takes others."""
    model = unsorted()
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    for found in (io.load(path), io.load(path, mapped=True), io.load(model)):
        assert [node.op_type for node in found.graph] in (
            ["Neg", "Relu", "Sub", "If"],
            ["Relu", "Neg", "Sub", "If"],
        )
        found.clone()
    with pytest.raises(ModelError, match="the nodes of the model given are not sorted"):
        io.load(ir.from_proto(model))


def test_nodes_that_wait_for_each_other(tmp_path: Path) -> None:
    model = unsorted()
    model.graph.node[-1].input[0] = "s"  # the Relu
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"m.onnx is not valid: its nodes wait for each other\."):
        io.load(path)
