"""`qcompile calibrate`, and what reads its files: end to end on a small model, right and wrong."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Desk, Run
from networks import conv_net, linear_net, rows, samples, save, set_weight

from qcompile.calib import store

pytestmark = pytest.mark.usefixtures("clock")

TOP = {
    "model", "model_digest", "data", "versions", "samples", "skipped", "held_out", "forced", "unobserved", "methods",
    "tensors", "output", "passes", "together", "notes",
}  # fmt: skip


def gathered(desk: Desk, *words: str | Path) -> Run:
    """`qcompile calibrate m.onnx` and more words, which is to go well."""
    done = desk.run("calibrate", "m.onnx", *words)
    assert (done.code, done.err) == (0, ""), done
    return done


def table(desk: Desk, *words: str | Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gathered(desk, "--json", *words).out)
    return found


@pytest.fixture
def shards(desk: Desk) -> list[str]:
    """Statistics of the samples in two parts, `a.stats` and `b.stats`, and all in `d.npz`."""
    for name, part in (("a", slice(0, 6)), ("b", slice(6, 10))):
        np.savez(desk / f"{name}.npz", x=samples()[part])
        gathered(desk, "--data", f"{name}.npz", "-o", f"{name}.stats", "--held-out", "1")
    return ["a.stats", "b.stats"]


# ---- calibrate


def test_result_as_a_table(desk: Desk) -> None:
    done = gathered(desk, "--data", "d.npz")
    assert done.new == ["work/m.stats"]
    for part in (
        "6 tensors of m.onnx, 8 samples\n", "8 from 1 .npz file of d.npz\n", "widest spread first", "by mse",
        "wrote m.stats: 2 held-out samples are in it", "next: qcompile m.onnx --stats m.stats\n",
    ):  # fmt: skip
        assert part in done.out
    for name in ("x", "r0", "r1", "r2", "g"):
        assert re.search(rf"(?m) {name} *$", done.out)


def test_result_as_json(desk: Desk) -> None:
    found = table(desk, "--data", "d.npz")
    assert set(found) == TOP
    assert (found["model"], found["output"], found["passes"]) == ("m.onnx", "m.stats", 1)
    assert (found["samples"], found["skipped"], found["held_out"]) == (8, 0, 2)
    assert found["methods"] == ["minmax", "mean", "moving-average", "percentile", "mse", "kl"]
    assert found["forced"] == found["notes"] == []
    assert found["together"] in (True, False)
    (x,) = (row for row in found["tensors"] if row["name"] == "x")
    assert set(x["ranges"]) == set(found["methods"])
    assert x["count"] == 8 * 3 * 16 * 16


def test_the_command_that_is_next_works(desk: Desk) -> None:
    (desk / "my stats").mkdir()
    done = gathered(desk, "--data", "d.npz", "-o", "my stats/m 1.stats")
    command = shlex.split(done.out.rpartition("next: ")[2])
    assert command == ["qcompile", "m.onnx", "--stats", "my stats/m 1.stats"]
    assert desk.run(*command[1:]).new == ["work/m.int8.onnx"]


def test_the_same_bytes_each_time(desk: Desk) -> None:
    for name in ("1.stats", "2.stats"):
        gathered(desk, "--data", "d.npz", "-o", name, "--gram")
    assert (desk / "1.stats").read_bytes() == (desk / "2.stats").read_bytes()
    assert any(stats.gram is not None for stats in store.load(desk / "1.stats").tensors.values())


def test_none_held_out(desk: Desk) -> None:
    done = gathered(desk, "--data", "d.npz", "--held-out", "0")
    assert "6 tensors of m.onnx, 10 samples" in done.out
    assert "next: qcompile m.onnx --stats m.stats --data OTHER_SAMPLES\n" in done.out
    assert "give the data with --data too." in desk.refused("m.onnx", "--stats", "m.stats")
    assert desk.run("m.onnx", "--stats", "m.stats", "--data", "d.npz").code == 0


def test_little_memory(desk: Desk) -> None:
    done = gathered(desk, "--data", "d.npz", "--memory", "40KB")
    (times,) = re.findall(r"note: The data was read (\d) times, to observe no more than ", done.out)
    found = table(desk, "--data", "d.npz", "--memory", "0.04 mb")
    assert found["passes"] == int(times) > 1
    assert not table(desk, "--data", "d.npz", "--memory", "1g")["notes"]


# ---- merge


def test_merge(desk: Desk, shards: list[str]) -> None:
    done = gathered(desk, "--merge", *shards)
    assert done.new == ["work/m.stats"]
    assert "6 tensors of m.onnx, 8 samples\n  5 from 1 .npz file of a.npz\n" in done.out
    assert "  3 from 1 .npz file of b.npz\n" in done.out
    assert "2 held-out samples are in it" in done.out
    assert table(desk, "--merge", *shards)["passes"] == 0
    assert desk.run("m.onnx", "--stats", "m.stats").code == 0


def test_merge_and_data(desk: Desk, shards: list[str]) -> None:
    np.savez(desk / "c.npz", x=samples(13)[10:])
    found = table(desk, "--merge", *shards, "--data", "c.npz", "-o", "all.stats")
    assert [row["samples"] for row in found["data"]] == [5, 3, 2]
    assert (found["samples"], found["held_out"], found["passes"]) == (10, 3, 1)
    again = table(desk, "--merge", shards[0], "--merge", shards[1], "-o", "again.stats")
    assert again["samples"] == 8  # the option may be repeated


@pytest.mark.parametrize("data", [[], ["--data", "d.npz"]])
def test_merge_of_another_model(desk: Desk, shards: list[str], data: list[str]) -> None:
    """With and without new data the override is told, and stays in the file."""
    other = conv_net()
    set_weight(other, "w0", 2)
    save(other, desk / "m.onnx")
    words = ["calibrate", "m.onnx", "--merge", *shards, *data]
    message = desk.refused(*words)
    assert re.search(r"was gathered on another model: .*\(\w{12}\), and this is .*\(\w{12}\)\. ", message)  # fmt: skip
    assert message.endswith("Gather anew, or use it all the same with --force.")
    done = desk.run(*words, "--force")
    assert done.code == 0
    assert "another model" in done.out
    assert any("another model" in s for s in store.load(desk / "m.stats").forced)


def test_merge_of_the_same_data(desk: Desk, shards: list[str]) -> None:
    message = desk.refused("calibrate", "m.onnx", "--merge", *shards, "--data", "b.npz")
    assert "b.stats and the data hold the same data, 1 .npz file of b.npz (" in message
    message = desk.refused("calibrate", "m.onnx", "--merge", "a.stats", "a.stats")
    assert "a.stats and a.stats hold the same data" in message
    found = table(desk, "--merge", "a.stats", "a.stats", "--force")
    assert (found["samples"], len(found["forced"])) == (10, 1)


# ---- bad samples


def rooted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model behind a square root, `root = Sqrt(x)`."""
    model.graph.node[0].input[0] = "root"
    model.graph.node.insert(0, onnx.helper.make_node("Sqrt", ["x"], ["root"], "root"))
    return model


@pytest.fixture
def bad(desk: Desk) -> Desk:
    """`root.onnx`, which takes square roots, and `bad.npz` with a -1 in samples 2 and 9, the last one."""
    save(rooted(conv_net()), desk / "root.onnx")
    data = np.abs(samples())
    data[[2, 9], 0, 0, 5] = -1
    np.savez(desk / "bad.npz", x=data)
    return desk


def test_skip_bad(bad: Desk) -> None:
    words = ["calibrate", "root.onnx", "--data", "bad.npz"]
    message = bad.refused(*words)
    assert re.match(
        r"tensor 'root' is NaN at index \[0, 0, 0, 5\] for sample 2 of the calib", message
    )
    assert message.endswith("with --skip-bad.")
    done = bad.run(*words, "--skip-bad")
    assert done.code == 0
    assert "of root.onnx, 7 samples, 2 bad ones left out\n" in done.out
    assert "note: 2 bad samples were left out: tensor 'root' is NaN" in done.out
    assert json.loads(bad.run(*words, "--skip-bad", "--json").out)["skipped"] == 2


def test_skip_bad_while_compiling(bad: Desk) -> None:
    words = ["root.onnx", "--data", "bad.npz", "--skip-bad", "--json"]
    found = json.loads(bad.run(*words).out)
    assert found["samples"] == {"calibration": 7, "held_out": 1}
    assert any("2 bad samples were left out" in note for note in found["notes"])


def test_skip_bad_where_all_that_judge_are_bad(bad: Desk) -> None:
    data = np.abs(samples())
    data[[4, 9], 0, 0, 5] = -1
    np.savez(bad / "bad.npz", x=data)
    assert "held" in bad.refused("root.onnx", "--data", "bad.npz", "--skip-bad")


def test_skip_bad_where_nothing_is_static(desk: Desk) -> None:
    save(rooted(linear_net()), desk / "l.onnx")
    data = np.abs(rows())
    data[9, 0] = -1
    np.savez(desk / "l.npz", x=data)
    done = desk.run("l.onnx", "--data", "l.npz", "--skip-bad", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["samples"]["held_out"] == 1


# ---- what reads statistics


def test_compile(desk: Desk) -> None:
    gathered(desk, "--data", "d.npz")
    words = ["m.onnx", "--threads", "1", "--json", "--ranges"]
    for ranges in ("mean", "kl"):
        made = []
        for more in (["--data", "d.npz"], ["--stats", "m.stats"]):
            found = json.loads(desk.run(*words, ranges, *more).out)
            assert found["samples"] == {"calibration": 8, "held_out": 2}
            made.append((desk / "m.int8.onnx").read_bytes())
        assert made[0] == made[1]


def test_compile_with_other_data(desk: Desk) -> None:
    gathered(desk, "--data", "d.npz")
    np.savez(desk / "e.npz", x=samples(5))
    words = ["m.onnx", "--stats", "m.stats", "--data", "e.npz"]
    message = desk.refused(*words)
    assert message.startswith("m.stats was gathered on other data: 1 .npz file of d.npz (")
    assert "and this is 1 .npz file of e.npz (" in message
    done = desk.run(*words, "--force")
    assert done.code == 0
    assert "note: m.stats was gathered on other data" in done.out


def test_inspect(desk: Desk) -> None:
    made = gathered(desk, "--data", "d.npz")
    done = desk.run("inspect", "m.stats")
    assert (done.code, done.err, done.new) == (0, "", [])
    assert done.out == made.out.partition("wrote ")[0]
    found = json.loads(desk.run("inspect", "m.stats", "--json").out)
    assert set(found) == TOP - {"output", "passes", "together", "notes"}
    assert len(found["tensors"]) == 6


# ---- wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["calibrate"], "MODEL.onnx is missing: see `qcompile calibrate --help`."),
        (["calibrate", "m.onnx"], "there is nothing to gather: give samples with --data, or files with --merge."),
        (["calibrate", "m.onnx", "--merge"], "--merge: expected at least one argument: see"),
        (["calibrate", "m.onnx", "--data", "d.npz", "--memory", "much"], "--memory: 'much' is not a size such as 512MB or"),
        (["calibrate", "m.onnx", "--data", "d.npz", "--memory", "0"], "--memory: '0' is not a size such as 512MB or 2GB:"),
        (["calibrate", "m.onnx", "--data", "d.npz", "--memory", "-1"], "--memory: '-1' is not a size such as 512MB or 2GB:"),
        (["calibrate", "m.onnx", "--data", "d.npz", "--held-out", "-1"], "--held-out"),
        (["calibrate", "m.onnx", "--data", "d.npz", "--held-out", "few"], "--held-out: 'few' is not a whole number of 0"),
        (["calibrate", "m.onnx", "--data", "d.npz", "--ranges", "mse"], "there is no option --ranges: see `qcompile cal"),
        (["calibrate", "m.onnx", "--data", "none.npz"], "there is no calibration data at 'none.npz'"),
        (["calibrate", "none.onnx", "--data", "d.npz"], "none.onnx does not exist: give the path of an ONNX model."),
        (["calibrate", "d.npz", "--data", "d.npz"], "d.npz is not an ONNX model, or is truncated"),
        (["calibrate", "m.onnx", "--data", "d.npz", "-o", "none/m.stats"], "the folder none does not exist: create it"),
        (["calibrate", "m.onnx", "--merge", "none.stats"], "there are no statistics at none.stats: make them with"),
        (["calibrate", "m.onnx", "--merge", "d.npz"], "d.npz is no statistics file, or is damaged (KeyError"),
        (["calibrate", "m.onnx", "--merge", "m.onnx"], "m.onnx is no statistics file, or is damaged (BadZipFile"),
        (["m.onnx", "--stats", "none.stats"], "there are no statistics at none.stats: make them with `qcompile cal"),
        (["m.onnx", "--stats", "m.onnx"], "m.onnx is no statistics file, or is damaged (BadZipFile"),
        (["m.onnx", "--stats"], "--stats needs a value"),
        (["inspect", "none.stats"], "there are no statistics at none.stats: make them with `qcompile calibrate`."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_words(desk: Desk, words: list[str], message: str) -> None:
    assert message in desk.refused(*words)


@pytest.mark.parametrize("damage", ["short", "flipped", "text", "format"])
def test_damaged_statistics(desk: Desk, damage: str) -> None:
    gathered(desk, "--data", "d.npz")
    data = (desk / "m.stats").read_bytes()
    middle = len(data) // 2
    damaged = {
        "short": data[:middle], "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :],
        "text": b"hello\n", "format": data.replace(b"statistics.json", b"statistics.yaml"),
    }  # fmt: skip
    (desk / "m.stats").write_bytes(damaged[damage])
    for words in (["m.onnx", "--stats", "m.stats"], ["inspect", "m.stats"],
                  ["calibrate", "m.onnx", "--merge", "m.stats", "-o", "n.stats"]):  # fmt: skip
        assert "m.stats is no statistics file, or is damaged (" in desk.refused(*words)


def test_statistics_of_another_version_or_model(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    gathered(desk, "--data", "d.npz")
    save(conv_net(norm=True), desk / "n.onnx")
    message = desk.refused("n.onnx", "--stats", "m.stats")
    assert message.startswith("m.stats was gathered on another model: m.onnx (")
    assert ", and this is n.onnx (" in message
    monkeypatch.setattr("qcompile.opened.__version__", "99.0")
    message = desk.refused("m.onnx", "--stats", "m.stats")
    assert re.match(r"m\.stats was gathered with qcompile [\d.]+, and this is qcompile 99\.0\. ", message)  # fmt: skip
    assert desk.run("m.onnx", "--stats", "m.stats", "--force").code == 0


def test_what_is_read_is_never_overwritten(desk: Desk, shards: list[str]) -> None:
    """Neither a file that is given, nor one in a folder, nor one that belongs to the model."""
    (desk / "folder").mkdir()
    np.savez(desk / "folder" / "1.npz", x=samples())
    save(conv_net(), desk / "ext.onnx", data="ext.data")
    before = {path: path.read_bytes() for path in desk.folder.rglob("*") if path.is_file()}
    cases = {
        "m.onnx": ["m.onnx", "--data", "d.npz"], "d.npz": ["m.onnx", "--data", "d.npz"],
        "a.stats": ["m.onnx", "--merge", *shards], "b.stats": ["m.onnx", "--data", "d.npz", "--merge", "b.stats"],
        "folder/1.npz": ["m.onnx", "--data", "folder"], "ext.data": ["ext.onnx", "--data", "d.npz"],
    }  # fmt: skip
    written = [name for name, words in cases.items() if desk.run("calibrate", *words, "-o", name).code != 2]  # fmt: skip
    assert written == []
    assert {path: path.read_bytes() for path in before} == before
    assert "m.onnx is the model itself" in desk.refused("calibrate", "m.onnx", "--data", "d.npz", "-o", "m.onnx")  # fmt: skip
    gathered(desk, "--data", "d.npz")
    assert "m.stats is the statistics itself" in desk.refused("m.onnx", "--stats", "m.stats", "-o", "m.stats")  # fmt: skip


# ---- what a new user ran into


def test_skip_bad_takes_inputs_that_are_bad_themselves(desk: Desk) -> None:
    data = samples()
    data[3, 0, 0, 0] = np.nan
    np.savez(desk / "nan.npz", x=data)
    assert "holds NaN or infinity" in desk.refused("calibrate", "m.onnx", "--data", "nan.npz")
    found = json.loads(
        desk.run("calibrate", "m.onnx", "--data", "nan.npz", "--skip-bad", "--json").out
    )
    assert (found["samples"], found["skipped"]) == (7, 1)
    assert "tensor 'x' is NaN at index [0, 0, 0, 0] for sample 3" in found["notes"][0]


def test_a_file_that_holds_no_statistics_is_not_replaced(desk: Desk) -> None:
    save(linear_net(), desk / "precious.onnx")
    before = (desk / "precious.onnx").read_bytes()
    message = desk.refused("calibrate", "m.onnx", "--data", "d.npz", "-o", "precious.onnx")
    assert "precious.onnx exists and holds no statistics" in message
    assert (desk / "precious.onnx").read_bytes() == before
    gathered(desk, "--data", "d.npz")
    gathered(desk, "--data", "d.npz")  # those of before are replaced


def test_other_data_judges_what_all_samples_calibrated(desk: Desk) -> None:
    np.savez(desk / "other.npz", x=samples()[:4] + np.float32(0.25))
    gathered(desk, "--data", "d.npz", "--held-out", "0")
    words = ["m.onnx", "--stats", "m.stats", "--json", "--data"]
    found = json.loads(desk.run(*words, "other.npz").out)
    assert found["samples"] == {"calibration": 10, "held_out": 1}
    assert not any("both calibrate and judge" in note for note in found["notes"])
    found = json.loads(desk.run(*words, "d.npz").out)
    assert any("both calibrate and judge" in note for note in found["notes"])
