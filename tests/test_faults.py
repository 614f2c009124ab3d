"""What goes wrong around a compilation: signals, kills, full disks, files that vanish, two runs at one place.

`tools/faults.py` ends whole commands at random moments; here the moments are chosen.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from conftest import Desk
from networks import from_text, linear_net, save

from qcompile import interrupt
from qcompile.errors import OutputError
from qcompile.graph import io, publish
from qcompile.graph.publish import PART, atomic

ROOT = Path(__file__).parents[1]
resource = pytest.importorskip("resource", reason="signals and limits as POSIX has them")


def python(
    code: str, *words: str, cwd: Path, **streams: object
) -> subprocess.CompletedProcess[str]:
    """A Python process of its own in `cwd`, whose temporary files go to `cwd`/temp."""
    (cwd / "temp").mkdir(exist_ok=True)
    env = {
        **os.environ, "TMPDIR": str(cwd / "temp"), "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }  # fmt: skip
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [sys.executable, "-c", code, *words], cwd=cwd, env=env, text=True, check=False, timeout=120, **pipes
    )  # fmt: skip


def left(folder: Path) -> list[str]:
    """Names in the folder, but for what ONNX Runtime itself puts among temporary files."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return sorted(name for name in found if name != "temp/.ses")


# ---- signals


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """Signals as in a terminal, for this process and its children: what starts tests in the background ignores some."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}  # fmt: skip
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


_STOP = """
import contextlib, os, sys
from qcompile.__main__ import entry
from qcompile.progress import Silent
number, where = int(sys.argv.pop(1)), sys.argv.pop(1)
true = Silent.stage
@contextlib.contextmanager
def stage(self, title, total=None):
    with true(self, title, total) as step:
        if title == where:
            os.kill(os.getpid(), number)
        yield step
Silent.stage = stage
entry()
"""


@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGINT, "loading"), (signal.SIGTERM, "calibrating"), (signal.SIGHUP, "writing")],
)
def test_signals(desk: Desk, number: signal.Signals, where: str) -> None:
    (desk / "m.int8.onnx").write_text("old")
    before = left(desk.folder)
    words = ("m.onnx", "--data", "d.npz", "-q")
    done = python(_STOP, str(int(number)), where, *words, cwd=desk.folder)
    assert (done.returncode, done.stdout) == (128 + number, "")
    assert done.stderr == "qcompile: interrupted.\n"
    assert left(desk.folder) == sorted([*before, "temp"])
    assert (desk / "m.int8.onnx").read_text() == "old"


def test_a_signal_while_threads_work(desk: Desk) -> None:
    (desk / "slow.py").write_text(
        "import os, signal, numpy as np\n"
        "def feeds():\n"
        "    for i in range(40):\n"
        "        if i == 20:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "        yield {'x': np.ones((1, 3, 16, 16), np.float32) * i}\n"
    )
    before = left(desk.folder)
    code = "from qcompile.__main__ import entry; entry()"
    done = python(code, "calibrate", "m.onnx", "--data", "slow:feeds", "-q", cwd=desk.folder)
    assert (done.returncode, done.stderr) == (130, "qcompile: interrupted.\n")
    assert [n for n in left(desk.folder) if "__pycache__" not in n] == sorted([*before, "temp"])


@pytest.fixture(name="handlers")
def keep_handlers() -> Iterator[None]:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_second_signal_does_not_end_the_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    interrupt.catch()
    with pytest.raises(interrupt.Interrupted) as caught:
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    now += 4.9
    signal.raise_signal(signal.SIGINT)  # is ignored
    now += 0.2
    with pytest.raises(interrupt.Interrupted) as caught:
        signal.raise_signal(signal.SIGINT)
    assert caught.value.code == 130
    interrupt.ignore()
    now += 100
    signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("handlers")
def test_signals_that_are_ignored_stay_so() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    interrupt.catch()
    signal.raise_signal(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


# ---- kills

_KILLS = """
import os, signal, sys
from pathlib import Path
import onnx_ir as ir
from qcompile.graph import io
limit, moments = int(sys.argv[1]), int(sys.argv[2])
io.EXTERNAL_BYTES = limit
model = io.load("m.onnx")
for moment in range(moments):
    if (pid := os.fork()) == 0:
        count, true = 0, Path.replace
        def replace(self, place):
            global count
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return true(self, place)
        Path.replace = replace
        folder = Path(str(moment))
        io.save(model, folder / "m.onnx")
        os._exit(0)
    print(os.waitpid(pid, 0)[1])
"""


@pytest.mark.parametrize(("limit", "moves"), [(1 << 30, 1), (1, 4)])
def test_a_kill_at_each_move(tmp_path: Path, limit: int, moves: int) -> None:
    """Of a model, or of a model and its data: aside with the old ones, and the new ones in their places."""
    save(linear_net(), tmp_path / "m.onnx")
    names = ["m.onnx", "m.onnx.data"][: 1 if moves == 1 else 2]
    for moment in range(moves + 1):
        (tmp_path / str(moment)).mkdir()
        for name in names:
            (tmp_path / str(moment) / name).write_text("old")
    done = python(_KILLS, str(limit), str(moves + 1), cwd=tmp_path)
    assert done.stdout.split() == ["9"] * moves + ["0"], done.stderr
    for moment in range(moves + 1):
        folder = tmp_path / str(moment)
        stand = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
        parts = [path for path in folder.iterdir() if path.name not in names]
        assert [path.name.endswith(PART) for path in parts] == [True] * (moment < moves)
        if "m.onnx" in stand:  # then all belongs together
            assert len(set(stand) & set(names)) == len(names)
            assert len({data == b"old" for data in stand.values()}) == 1
        # What is left is swept away by the next result, which is whole.
        io.save(ir.load(tmp_path / "m.onnx"), folder / "m.onnx")
        onnx.checker.check_model(str(folder / "m.onnx"))
        assert not list(folder.glob(f"*{PART}"))


# ---- two at one place


def test_two_at_one_place(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with atomic(path) as first:
        first.write_text("first")
        with atomic(path) as second:
            second.write_text("second")
            assert first.read_text() == "first"  # it was not swept away
        assert path.read_text() == "second"
    assert path.read_text() == "first"
    assert left(tmp_path) == ["m.onnx"]


def test_a_folder_swept_away_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = publish._locked, 0

    def locked(folder: Path, *, wait: bool = False) -> int | None:
        nonlocal calls
        calls += 1
        if calls == 1:
            folder.rmdir()
        return true(folder, wait=wait)

    monkeypatch.setattr(publish, "_locked", locked)
    publish.write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text() == "a"
    assert calls == 2


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    (tmp_path / f".theirs{PART}").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f".link{PART}").symlink_to("elsewhere")
    (tmp_path / "mine.qcompile-part").mkdir()
    before = left(tmp_path)
    publish.write_text(tmp_path / "a.txt", "a")
    assert left(tmp_path) == sorted([*before, "a.txt"])


# ---- full disks


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Meanwhile no file of this process grows beyond so many bytes, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


_ROOM = ": free space there, or set TMPDIR to another folder."


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("words", "size", "sentence"),
    [
        (["m.onnx", "--data", "d.npz"], 1000, f"(File too large){_ROOM}"),
        (["m.onnx", "--data", "made:feeds"], 1000, f"(File too large){_ROOM}".replace("(", "")),
        (["m.onnx"], 1000, f"(the optimized graph){_ROOM}"),
        (["l.onnx", "--recipe", "int4"], 1000, f"(the optimized graph){_ROOM}"),
        (["calibrate", "m.onnx", "--data", "d.npz"], 35_000, "m.stats could not be written: File too large."),
        (["plan", "m.onnx", "-o", "p.json"], 100, "p.json could not be written: File too large."),
    ],
)  # fmt: skip
def test_full_disk(desk: Desk, words: list[str], size: int, sentence: str) -> None:
    save(linear_net(), desk / "l.onnx")
    (desk / "made.py").write_text(
        "import numpy as np\ndef feeds():\n    for i in range(9): yield {'x': np.ones((1, 3, 16, 16), 'f')}\n"
    )
    with largest_file(size):
        assert desk.refused(*words).endswith(sentence)


def test_a_profile_that_is_cut_off(desk: Desk) -> None:
    from qcompile.run.profile import kernels

    with largest_file(3000), pytest.raises(OutputError, match="ONNX Runtime's profile is cut off"):
        kernels(desk / "m.onnx", {"x": np.zeros((1, 3, 16, 16), np.float32)}, threads=1)


@pytest.mark.usefixtures("clock")
def test_no_room_for_the_report(desk: Desk) -> None:
    save(from_text("g (float[1,4] x) => (float[1,4] y) { y = Relu(x) }"), desk / "r.onnx")
    with largest_file(1500):
        done = desk.run("r.onnx", "--report", "r")
    assert done.code == 2
    assert done.err == (
        "qcompile: r/report.json could not be written: File too large. The model is whole: r.int8.onnx.\n"
    )
    assert done.new == ["work/r", "work/r.int8.onnx"]


# ---- streams that cannot be written


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_streams(tmp_path: Path) -> None:
    code = "from qcompile.__main__ import entry; entry()"
    with Path("/dev/full").open("w") as full:
        done = python(code, "targets", cwd=tmp_path, stdout=full)
        assert (done.returncode, done.stderr) == (
            2,
            "qcompile: the answer could not be printed: No space left on device. The files asked for are written.\n",
        )
        assert python(code, "no.onnx", cwd=tmp_path, stderr=full).returncode == 2


def test_closed_streams(tmp_path: Path) -> None:
    code = "import os; os.close(1); os.close(2); os.execv(sys.executable, [sys.executable, '-c', {!r}, {!r}])"
    start = "from qcompile.__main__ import entry; entry()"
    for word, exit_code in (("targets", 0), ("no.onnx", 2)):
        assert (
            python("import sys; " + code.format(start, word), cwd=tmp_path).returncode == exit_code
        )


# ---- files that vanish


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("words", [[], ["--recipe", "int4"]])
@pytest.mark.parametrize("gone", ["e.onnx", "e.bin"])
def test_inputs_removed_meanwhile(desk: Desk, words: list[str], gone: str) -> None:
    save(linear_net(), desk / "e.onnx", data="e.bin")
    thief = f"thief_of_{Path(gone).suffix[1:]}_{len(words)}"  # imported once a process
    (desk / f"{thief}.py").write_text(
        "import numpy as np\nfrom pathlib import Path\n"
        "def feeds():\n    for i in range(9):\n"
        f"        Path({gone!r}).unlink(missing_ok=True)\n"
        "        yield {'x': np.full((1, 256), i, 'f')}\n"
    )
    before = desk.files()
    done = desk.run("e.onnx", "--data", f"{thief}:feeds", *words)
    assert (done.code, done.err) == (
        2, f"qcompile: {gone} does not exist, or was removed meanwhile.\n"
    )  # fmt: skip
    assert [n for n in desk.files() if "pycache" not in n] == [
        n for n in before if not n.endswith(gone)
    ]


# ---- names


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("where", ["a folder, mit ümlaut/模型 🙂.onnx", f"{'x' * 240}.onnx"])
def test_names_of_files(desk: Desk, where: str) -> None:
    path = desk / where
    path.parent.mkdir(exist_ok=True)
    (desk / "m.onnx").rename(path)
    done = desk.run(where, "--data", "d.npz", "-o", desk / f"{where[:-5]}.q.onnx")
    assert done.code == 0, done
    assert done.new == [f"work/{where[:-5]}.q.onnx"]


@pytest.mark.usefixtures("clock")
def test_names_of_tensors_that_are_very_long(desk: Desk) -> None:
    model, long = onnx.load(desk / "m.onnx"), "/".join(["ein sehr langer Name"] * 5000)
    for node in model.graph.node:
        node.name = f"{node.name}{long}"
        node.input[:] = [f"{n}{long}" if n != "x" else n for n in node.input]
        node.output[:] = [f"{n}{long}" if n != "y" else n for n in node.output]
    for weight in model.graph.initializer:
        weight.name = f"{weight.name}{long}"
    onnx.save(model, desk / "m.onnx")
    assert desk.run("m.onnx", "--data", "d.npz").code == 0
    onnx.checker.check_model(str(desk / "m.int8.onnx"))


@pytest.mark.usefixtures("clock")
def test_external_data_in_a_folder_below(desk: Desk) -> None:
    (desk / "weights").mkdir()
    model = linear_net()
    onnx.save_model(
        model, desk / "e.onnx", save_as_external_data=True, location="weights/all of them.bin", size_threshold=0
    )  # fmt: skip
    done = desk.run("e.onnx")
    assert (done.code, done.new) == (0, ["work/e.int8.onnx"])


def test_external_data_by_an_absolute_path(desk: Desk) -> None:
    save(linear_net(), desk / "e.onnx", data="e.bin")
    model = onnx.load(desk / "e.onnx", load_external_data=False)
    for weight in model.graph.initializer:
        for entry in weight.external_data:
            if entry.key == "location":
                entry.value = str(desk / "e.bin")
    onnx.save(model, desk / "e.onnx")
    said = desk.refused("e.onnx")
    assert "e.onnx" in said
    assert "Absolute path not allowed" in said or "e.bin" in said  # ORT 1.32, and those before
