"""The end of a compilation: exit codes, warnings, files, and what the file says of itself."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from networks import conv_net, from_text, samples, save
from workbench import QUICK, costless, images, weight

import qcompile
from qcompile import compile_model, finish
from qcompile.budget import Point
from qcompile.errors import ModelError, OutputError
from qcompile.graph import io
from qcompile.plan.plan import Form, NodePlan, Plan
from qcompile.report import GOOD, INACCURATE, NOT_FASTER, to_markdown
from qcompile.search import History
from qcompile.verify.compare import Comparison
from qcompile.verify.kernels import Kernels, Verdict
from qcompile.verify.metrics import Error, Part
from qcompile.workshop import Attempt


def feeds_of(count: int) -> list[dict[str, Any]]:
    return [{"x": x[None]} for x in samples(count)]


FEEDS = feeds_of(6)
pytestmark = pytest.mark.usefixtures("clock")


# ---- where the result goes


def test_beside_the_input_or_nowhere(tmp_path: Path) -> None:
    path = save(conv_net(), tmp_path / "my.model.onnx")
    assert finish.output_path(path, None) == tmp_path / "my.model.int8.onnx"
    assert finish.output_path(str(path), None) == tmp_path / "my.model.int8.onnx"
    assert finish.output_path(path, tmp_path / "other.onnx") == tmp_path / "other.onnx"
    assert finish.output_path(conv_net(), None) is None
    assert finish.output_path(conv_net(), str(tmp_path / "o.onnx")) == tmp_path / "o.onnx"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.model.onnx"]


def test_never_over_the_input(tmp_path: Path) -> None:
    path = save(conv_net(), tmp_path / "m.onnx")
    link = tmp_path / "link.onnx"
    link.symlink_to(path)
    for place in (path, link, tmp_path / "." / "m.onnx"):
        with pytest.raises(OutputError, match="is the input itself"):
            finish.output_path(path, place)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        finish.output_path(tmp_path / "no.onnx", tmp_path / "o.onnx")


# ---- exit codes


def verdict(name: str, *, good: bool) -> Verdict:
    return Verdict(
        name, "Conv", "static", "integer" if good else "float", "QLinearConv" if good else "Conv"
    )


def code(
    *, db: float = 30.0, speedup: float = 2.0, limit: float | None = None, missed: int = 0, nodes: int = 40,
    quantizes: bool = True, dead: bool = False,
) -> tuple[int, str]:  # fmt: skip
    """What is said of a result with these figures."""
    error = Error(Part("all"))
    y = np.linspace(-1, 1, 100)
    error.add(y, np.zeros(100) if dead else y * (1 + 10 ** (-db / 20)))
    kernels = Kernels(tuple(verdict(f"n{i}", good=i >= missed) for i in range(nodes)), 1, 1, 1, {})
    form = Form.STATIC if quantizes else Form.FLOAT
    plan = Plan("t", "a", (NodePlan("/head/Softmax", "Conv", form, why="it is slow"),))

    class Shop:
        recipe = dataclasses.replace(QUICK, min_sqnr=limit)
        found: ClassVar[dict[str, Any]] = {}

    class Opened:
        samples = object()

    class Best:
        pass

    best = Best()
    best.plan = plan  # type: ignore[attr-defined]
    history = History()
    if limit is not None:
        missed = (f"the worst output slice has {db:.1f} dB SQNR, the limit is {limit:g} dB",)
        history.points.append(
            Point(
                "it",
                1,
                0,
                db,
                0.0,
                None,
                None,
                None,
                1.0,
                speedup,
                1.0,
                missed if db < limit else (),
            )
        )
    return finish._exit_code(
        Shop, best, Comparison({"y": [error]}, 1), kernels, speedup, Opened, history  # type: ignore[arg-type]
    )  # fmt: skip


def test_good() -> None:
    assert code() == (GOOD, "")
    assert code(speedup=1.0) == (GOOD, "")
    assert code(missed=2) == (GOOD, "")
    assert code(limit=29.9) == (GOOD, "")


@pytest.mark.parametrize(
    ("figures", "wanted", "words"),
    [({"limit": 31.0}, INACCURATE, "the worst output slice has 30.0 dB SQNR, the limit is 31 dB."),
     ({"dead": True}, INACCURATE, "output 'y' is constant"), ({"speedup": 0.99}, NOT_FASTER, "the result is not faster than the float model: 0.99x."),
     ({"missed": 3}, NOT_FASTER, "3 of 40 planned nodes did not become integer kernels."),
     ({"quantizes": False}, NOT_FASTER, "nothing was quantized: Conv /head/Softmax: it is slow."),
     ({"limit": 31.0, "speedup": 0.5}, INACCURATE, "the limit is 31 dB")],
)  # fmt: skip
def test_not_good(figures: dict[str, Any], wanted: int, words: str) -> None:
    found, why = code(**figures)
    assert found == wanted
    assert words in why


@pytest.mark.parametrize(("speed", "wanted"), [(1.5, GOOD), (0.7, NOT_FASTER)])
def test_a_result_that_is_slower_is_written_and_named_as_such(
    speed: float, wanted: int, clock: Any, tmp_path: Path
) -> None:
    clock(speed)
    result = compile_model(conv_net(), FEEDS, output=tmp_path / "o.onnx", recipe=QUICK)
    assert result.exit_code == wanted
    assert (tmp_path / "o.onnx").exists()
    assert ("NOT a success" in result.verdict()) == (wanted == NOT_FASTER)


def test_a_limit_that_nothing_reaches(tmp_path: Path) -> None:
    result = compile_model(
        conv_net(),
        FEEDS,
        output=tmp_path / "o.onnx",
        recipe=dataclasses.replace(QUICK, min_sqnr=200.0),
    )
    assert result.exit_code == INACCURATE
    assert (tmp_path / "o.onnx").exists()
    assert result.verdict().startswith("NOT within the limits: the worst output slice has ")
    assert result.next_command.startswith("qcompile plan ")


# ---- warnings


def words(result: qcompile.Result) -> str:
    return " ".join(result.warnings)


def test_one_sample_for_both() -> None:
    assert "it both calibrated and judged the result" in words(
        compile_model(conv_net(), FEEDS[:1], recipe=QUICK)
    )
    assert "it both calibrated" not in words(compile_model(conv_net(), FEEDS, recipe=QUICK))


@pytest.mark.parametrize(
    ("count", "held"),
    [(2, "1 sample was"), (9, "1 sample was"), (19, "3 samples were"), (20, None)],
)
def test_few_samples_that_judge(
    monkeypatch: pytest.MonkeyPatch, count: int, held: str | None
) -> None:
    """A result may be far worse on other inputs than on the one or two that judge it: that is said."""
    monkeypatch.setattr("qcompile.opened.load_target", costless)
    result = compile_model(conv_net(), feeds_of(count), recipe=QUICK)
    few = [w for w in result.warnings if w.startswith("Only ")]
    if held is None:
        assert few == []
        return
    assert few == [
        f"Only {held} held out to judge the result, which says little of other inputs: give 20 samples and more with --data, "
        "of which 4 and more judge."
    ]
    assert f"- {few[0]}" in to_markdown(result)


def test_samples_that_differ_a_hundredfold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The large samples decide the ranges and the figure; what is left of the small ones is said."""
    monkeypatch.setattr("qcompile.opened.load_target", costless)
    model = from_text(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) { [c] y = Conv(x, k) }", k=weight(4, 4, 1, 1)
    )
    alike = images(40)
    feeds = [{"x": f["x"] * np.float32(1 if i % 2 else 0.01)} for i, f in enumerate(alike)]
    result = compile_model(model, feeds, recipe=QUICK)
    (told,) = (w for w in result.warnings if "dB in the worst" in w)
    assert "less than the goal of 18 dB SQNR in 4 of 8 samples" in told
    assert f"- {told}" in to_markdown(result)
    calm = compile_model(model, alike, recipe=QUICK)
    assert not any("dB in the worst" in w for w in calm.warnings)


def test_a_goal_that_was_missed() -> None:
    recipe = dataclasses.replace(QUICK, sqnr_goal=90.0)
    assert "dB SQNR, below the goal of 90 dB" in words(
        compile_model(conv_net(), FEEDS, recipe=recipe)
    )


def found_indices() -> onnx.ModelProto:
    """`i`: where something is not zero. How many that are may differ between a model and its result.

    Codes round small negatives to 0: fewer are found, of so many that the two numbers are never equal by chance.
    """
    return from_text(
        "g (float[1,4,32,32] x) => (float[1,4,32,32] y, int64[4,M] i) "
        "{ [c] y = Conv(x, k) [f] z = Floor(y) [n] i = NonZero(z) }",
        k=weight(4, 4, 1, 1),
    )


def test_outputs_that_cannot_always_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what was found, a result may find more or less: that is no error, and not silent either."""
    monkeypatch.setattr("qcompile.opened.load_target", costless)
    feeds = images(10, side=32)
    feeds[9] = {"x": np.ones((1, 4, 32, 32), np.float32)}  # held out, and the same in both
    result = compile_model(found_indices(), feeds, recipe=QUICK)
    (remark,) = (w for w in result.warnings if "another shape" in w)
    assert remark.startswith(
        "output 'i' has another shape than that of the float model for 1 of 2 samples"
    )


def test_an_output_that_was_never_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of it: no success, and no crash."""
    monkeypatch.setattr("qcompile.opened.load_target", costless)
    result = compile_model(found_indices(), images(10, side=32), recipe=QUICK)
    assert result.exit_code == INACCURATE
    assert "output 'i' never had the shape of the float model's." in result.warnings


# ---- the file


def test_where_a_file_comes_from(tmp_path: Path) -> None:
    result = compile_model(
        conv_net(), FEEDS, output=tmp_path / "o.onnx", recipe=QUICK, target="ort-cpu-x64-vnni"
    )
    model = onnx.load(tmp_path / "o.onnx")
    assert (model.producer_name, model.producer_version) == ("qcompile", qcompile.__version__)
    props = {p.key: p.value for p in model.metadata_props}
    assert props["qcompile.target"] == result.target == "ort-cpu-x64-vnni"
    assert props["qcompile.recipe"] == "int8"
    assert props["qcompile.format"] == result.format
    assert props["qcompile.ranges"] == result.ranges
    assert props["qcompile.version"] == qcompile.__version__


def test_sizes(tmp_path: Path) -> None:
    """Of files where there are files, else of the weights."""
    path = save(conv_net(), tmp_path / "m.onnx")
    result = compile_model(path, FEEDS, recipe=QUICK)
    assert result.size_mb == {
        "before": path.stat().st_size / 1e6,
        "after": (tmp_path / "m.int8.onnx").stat().st_size / 1e6,
    }
    bare = compile_model(conv_net(), FEEDS, recipe=QUICK)
    assert bare.output is None
    assert bare.size_mb["before"] == pytest.approx(io.weight_bytes(io.load(conv_net())) / 1e6)
    assert bare.size_mb["after"] < bare.size_mb["before"] / 2


def test_a_result_that_is_not_valid_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = conv_net()
    monkeypatch.setattr(
        io, "check", lambda model: None if model.producer_name == "float" else "node 3 is broken"
    )
    original.producer_name = "float"
    true_build = qcompile.workshop.build  # type: ignore[attr-defined]

    def build(*words: Any) -> Any:
        made = true_build(*words)
        made.producer_name = ""
        return made

    monkeypatch.setattr("qcompile.workshop.build", build)
    with pytest.raises(
        ModelError,
        match=r"the result is not a valid model: node 3 is broken\. This is a defect of qcompile\.",
    ):
        compile_model(original, FEEDS, output=tmp_path / "o.onnx", recipe=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_report(tmp_path: Path) -> None:
    result = compile_model(conv_net(), FEEDS, recipe=QUICK, report=tmp_path / "a" / "b")
    folder = tmp_path / "a" / "b"
    assert sorted(p.name for p in folder.iterdir()) == ["plan.json", "report.json", "report.md"]
    assert json.loads((folder / "report.json").read_text())["exit_code"] == result.exit_code
    assert [row["node"] for row in json.loads((folder / "plan.json").read_text())["nodes"]] == [
        row["node"] for row in result.plan
    ]
    assert "## Kernels" in (folder / "report.md").read_text()


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("")
    with pytest.raises(OutputError, match="the report cannot be written to"):
        compile_model(conv_net(), FEEDS, recipe=QUICK, report=taken)


def test_what_stays_float_and_why() -> None:
    """Nodes that could have been expected to be quantized, not every node."""
    model = from_text(
        "g (float[1,4,8,8] x) => (float[1,4,8,8] y) { [up] a = ConvTranspose(x, k) [act] b = Tanh(a) [soft] y = Softmax(b) }",
        k=weight(4, 4, 1, 1),
    )
    result = compile_model(model, images(6), recipe=QUICK)
    assert result.kept_float == [{"node": "up", "op": "ConvTranspose", "why": "no integer kernel"}]
    assert result.exit_code == NOT_FASTER
    assert result.warnings[0] == "nothing was quantized: ConvTranspose up: no integer kernel."


def test_attempts_before_they_were_judged() -> None:
    made = Attempt(Plan("t", "a", ()), None, "fused", None, None)  # type: ignore[arg-type]
    assert (made.noise, made.db) == (0.0, np.inf)
