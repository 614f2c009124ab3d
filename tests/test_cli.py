"""The commands, end to end on small models: files, tables, JSON, exit codes, plans."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Desk
from networks import conv_net, linear_net, samples, save

from qcompile.cli import main
from qcompile.options import COMMANDS

Clock = Callable[[float], None]
pytestmark = pytest.mark.usefixtures("clock")

KEYS = {
    "model", "output", "target", "recipe", "seconds", "peak_rss_mb", "size_mb", "latency", "outputs",
    "kernels", "kept_float", "warnings",
}  # fmt: skip
OUR_KEYS = {
    "search",
    "kv_cache",
    "format",
    "ranges",
    "samples",
    "notes",
    "next_command",
    "exit_code",
    "plan",
    "goal_missed",
}


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


# ---- compile


def test_result_as_a_table(desk: Desk) -> None:
    done = desk.run("m.onnx", "--data", "d.npz")
    assert done.code == 0
    assert done.err == ""
    assert done.new == ["work/m.int8.onnx"]
    for part in (
        "2.00x as fast", "wrote m.int8.onnx", "size", "latency 1x3x16x16", "2.00 ms", "1.00 ms", "SQNR",
        "kernels:", "left float:", "(/head/MatMul)", "8 calibration and 2 held-out samples",
        "next: qcompile m.onnx",
    ):  # fmt: skip
        assert part in done.out
    onnx.checker.check_model(desk / "m.int8.onnx", full_check=False)


def test_result_as_json(desk: Desk) -> None:
    table = desk.compiled()
    assert set(table) == KEYS | OUR_KEYS
    assert (table["model"], table["output"]) == ("m.onnx", "m.int8.onnx")
    assert (table["target"][:8], table["recipe"]) == ("ort-cpu-", "int8")
    assert set(table["size_mb"]) == {"before", "after"}
    assert table["size_mb"]["before"] == (desk / "m.onnx").stat().st_size / 1e6
    assert table["size_mb"]["after"] == (desk / "m.int8.onnx").stat().st_size / 1e6
    assert table["latency"] == {
        "fp32_ms": 2.0, "result_ms": 1.0, "speedup": 2.0,
        "feeds": [{"feed": "1x3x16x16", "fp32_ms": 2.0, "result_ms": 1.0, "speedup": 2.0, "rounds": 3}],
    }  # fmt: skip
    (output,) = table["outputs"]
    assert set(output) == {"name", "slices", "exact"}
    assert output["name"] == "y"
    figures = {"slice", "sqnr_db", "cosine", "max_abs_error", "agreement", "divergence", "dead"}
    assert [set(part) for part in output["slices"]] == [figures]
    assert output["slices"][0]["sqnr_db"] > 30
    kernels = table["kernels"]
    assert set(kernels) == {"integer", "float", "leftover_qdq", "operators", "nodes"}
    assert kernels["integer"] >= 2
    for node in kernels["nodes"]:
        assert set(node) == {"node", "op", "form", "verdict", "kernel", "why"}
    assert {row["node"] for row in table["kept_float"]} >= {"/head/MatMul"}
    assert all(set(row) == {"node", "op", "why"} and row["why"] for row in table["kept_float"])
    assert [row["node"] for row in table["plan"]][:2] == ["/conv0/Conv", "/conv0/Relu"]
    assert table["samples"] == {"calibration": 8, "held_out": 2}
    (warning,) = table["warnings"]
    assert warning.startswith("Only 2 samples were held out to judge the result")
    assert table["seconds"] > 0
    assert table["peak_rss_mb"] > 10


def test_json_is_all_of_stdout_and_progress_is_on_stderr(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    (desk / "chatty.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    print('I print')\n"
        "    return [{'x': np.ones((1, 3, 16, 16), np.float32) * i} for i in range(1, 5)]\n"
    )
    assert main(["m.onnx", "--data", "chatty:feeds", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("{\n")
    json.loads(out)
    assert "I print\n" in err
    for stage in ("loading", "preparing", "calibrating", "verifying", "writing"):
        assert f"{stage}: " in err


def test_the_same_input_gives_the_same_file(desk: Desk) -> None:
    contents = []
    for name in ("a.onnx", "b.onnx"):
        desk.compiled("-o", name)
        contents.append((desk / name).read_bytes())
    assert contents[0] == contents[1]


def test_output_is_replaced_and_the_input_is_not_touched(desk: Desk) -> None:
    before = (desk / "m.onnx").read_bytes()
    (desk / "m.int8.onnx").write_text("old")
    desk.compiled()
    assert "QLinearConv" in operators(desk / "m.int8.onnx") or "QuantizeLinear" in operators(
        desk / "m.int8.onnx"
    )
    assert (desk / "m.onnx").read_bytes() == before


@pytest.mark.parametrize(("form", "op"), [("qdq", "DequantizeLinear"), ("fused", "QLinearConv")])
def test_formats(desk: Desk, form: str, op: str) -> None:
    assert desk.compiled("--format", form)["format"] == form
    assert op in operators(desk / "m.int8.onnx")


@pytest.mark.parametrize("ranges", ["mean", "minmax", "percentile", "mse", "kl"])
def test_ranges(desk: Desk, ranges: str) -> None:
    assert desk.compiled("--ranges", ranges)["ranges"] == ranges


def test_external_data_in_and_names_with_spaces(desk: Desk) -> None:
    folder = desk / "my mödels"
    folder.mkdir()
    save(conv_net(), folder / "größe 1.onnx", data="größe 1.data")
    np.savez(folder / "dätä 1.npz", x=samples())
    report = folder / "der bericht"
    done = desk.run(folder / "größe 1.onnx", "--data", folder / "dätä 1.npz", "--report", report)
    assert done.code == 0
    assert {Path(name).name for name in done.new} == {
        "größe 1.int8.onnx", "der bericht", "report.md", "report.json", "plan.json",
    }  # fmt: skip
    assert f"next: read {report / 'report.md'}" in done.out
    done = desk.run(folder / "größe 1.onnx", "--data", folder / "dätä 1.npz", "--samples", "4")
    again = shlex.split(done.out.rpartition("next: ")[2].partition("#")[0])
    assert again[:2] == ["qcompile", str(folder / "größe 1.onnx")]
    assert "--samples 4" in shlex.join(again)
    assert again[-2:] == ["--report", "report/"]
    table = json.loads((report / "report.json").read_text("utf-8"))
    assert table["size_mb"]["before"] > 0.05
    assert "größe 1.int8.onnx" in (report / "report.md").read_text("utf-8")


def test_without_data_only_what_needs_none_is_quantized(desk: Desk) -> None:
    save(linear_net(), desk / "l.onnx")
    done = desk.run("l.onnx", "--json")
    table = json.loads(done.out)
    assert done.code == 0
    assert [row["form"] for row in table["plan"] if row["op"] == "MatMul"] == ["dynamic"] * 2
    assert table["samples"] == {"calibration": 0, "held_out": 0}
    assert any("stand-in inputs, not on real ones" in warning for warning in table["warnings"])


def test_data_by_flags(desk: Desk) -> None:
    from PIL import Image

    (desk / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 255)).save(desk / "photos" / f"{i}.png")
    words = [
        "--mean",
        "0.5,0.5,0.5",
        "--std",
        "0.5",
        "--color",
        "bgr",
        "--samples",
        "2",
        "--crop",
        "none",
    ]
    done = desk.run("m.onnx", "--data", "photos", "--json", *words)
    table = json.loads(done.out)
    assert table["samples"] == {"calibration": 1, "held_out": 1}
    assert any("size 16x16 from the input shape" in note for note in table["notes"])
    assert not any("ImageNet" in note for note in table["notes"])


def test_threads_and_goal_and_recipe(desk: Desk) -> None:
    (desk / "mine.toml").write_text("ranges = 'minmax'\nsqnr_goal = 0\n[data]\nsamples = 4\n")
    table = desk.compiled("--recipe", "mine.toml", "--threads", "1")
    assert (table["recipe"], table["ranges"]) == ("mine", "minmax")
    assert table["samples"] == {"calibration": 3, "held_out": 1}
    assert (
        desk.compiled("--recipe", "mine.toml", "--ranges", "mse", "--samples", "5")["ranges"]
        == "mse"
    )


def test_target_of_another_machine_is_noted(desk: Desk) -> None:
    table = desk.compiled("--target", "ort-cpu-arm64")
    assert table["target"] == "ort-cpu-arm64"
    assert "ort-cpu-arm64 is not this machine: the times are those of this one." in table["notes"]


# ---- exit codes


def test_exit_3_where_a_limit_is_missed(desk: Desk) -> None:
    done = desk.run("m.onnx", "--data", "d.npz", "--min-sqnr", "200")
    assert done.code == 3
    assert done.new == ["work/m.int8.onnx"]
    assert "NOT within the limits: the worst output slice has" in done.out
    assert "the limit is 200 dB" in done.out
    assert "wrote m.int8.onnx" in done.out


def test_exit_4_where_the_result_is_slower(desk: Desk, clock: Clock) -> None:
    clock(0.5)
    done = desk.run("m.onnx", "--data", "d.npz")
    assert done.code == 4
    assert done.new == ["work/m.int8.onnx"]
    assert "NOT a success: " in done.out


def test_exit_4_where_nothing_is_quantized(desk: Desk) -> None:
    done = desk.run("m.onnx")
    assert done.code == 4
    assert (
        "NOT a success: nothing was quantized: Conv /conv0/Conv and 2 more like it need calibration data"
        in done.out
    )
    assert "next: qcompile m.onnx --data FOLDER_OF_SAMPLES" in done.out


def test_exit_0_for_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        out, err = capsys.readouterr()
        assert out.startswith(("usage: qcompile", "qcompile "))
        assert err == ""


# ---- keep float


def test_keep_float(desk: Desk) -> None:
    table = desk.compiled("--keep-float", "/conv1", "--keep-float", "re:conv9|head")
    why = {row["node"]: row["why"] for row in table["kept_float"]}
    assert why["/conv1/Conv"] == "kept float by '/conv1'"
    assert why["/head/MatMul"] == "kept float by 're:conv9|head'"
    assert "/conv2/Conv" not in why


def test_keep_float_of_what_a_node_would_absorb(desk: Desk) -> None:
    table = desk.compiled("--keep-float", "/conv1/Relu")
    why = {row["node"]: row["why"] for row in table["kept_float"]}
    assert why["/conv1/Conv"] == "/conv1/Relu after it stays float"
    assert "/conv2/Conv" not in why


def test_keep_float_takes_names_that_were_folded_away(desk: Desk) -> None:
    save(conv_net(norm=True), desk / "m.onnx")
    for pattern, gone in (
        ("/norm0", "BatchNormalization"),
        ("BatchNormalization", "/norm0"),
        ("/same", "Identity"),
    ):
        table = desk.compiled("--keep-float", pattern)
        (note,) = (note for note in table["notes"] if "--keep-float" in note)
        assert repr(pattern) in note
        assert gone in note
