"""Sessions of ONNX Runtime: the only module, with `profile`, that imports it.

`exact` sessions run the graph as it is written (no optimization); `deployed` ones run what the user
will get (ORT_ENABLE_ALL).
"""

from __future__ import annotations

import dataclasses
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qcompile.errors import ModelError, RefusedError, no_room
from qcompile.graph import io
from qcompile.graph.skeleton import SHARED_BYTES, skeleton

Level = Literal["off", "basic", "extended", "all"]
Feed = Mapping[str, npt.NDArray[Any]]

_FOLDER = "session.model_external_initializers_file_folder_path"
_LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

_DTYPES: dict[str, Any] = {
    "float": np.float32, "double": np.float64, "float16": np.float16,
    "int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16,
    "int32": np.int32, "uint32": np.uint32, "int64": np.int64, "uint64": np.uint64,
    "bool": np.bool_, "string": np.object_,
}  # fmt: skip


_LARGE = 4000
"""Nodes: more take ORT 1.32's last level (layouts) minutes, as its time grows with their square."""


def quick_level(model: ir.Model) -> Level:
    """The level to run a model at whose time does not matter: the last one only where loading is quick."""
    return "all" if len(model.graph) <= _LARGE else "extended"


@dataclasses.dataclass(frozen=True)
class Options:
    """How a model is run.

    Attributes:
        level: graph optimization level.
        threads: intra-op threads; 0 leaves the choice to ORT.
        profile: file prefix for a profile, or None.
        optimized: file that receives the optimized graph, or None.
        pattern: whether ORT plans memory ahead for each set of shapes that it meets: fast where there are few,
            large where there are many.
        in_order: nodes run as soon as they can, first ones first. By default ORT goes back from each output in
            turn, so what only a late output needs of an early tensor keeps that in memory.
        arena: whether ORT keeps the memory that runs took for the next one.
        shared: large weights of a model in memory are not copied into a message for ORT first; if they are mapped from a
            file, ORT maps it as well. For float models: ORT 1.32 fuses fewer integer kernels then.
        config: further session configuration entries.
    """

    level: Level = "all"
    threads: int = 0
    profile: str | None = None
    optimized: Path | None = None
    pattern: bool = True
    in_order: bool = False
    arena: bool = True
    shared: bool = False
    config: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One input or output of a loaded model; `dtype` is None for what numpy cannot hold."""

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...]


class Session:
    """A model loaded by ONNX Runtime on the CPU."""

    def __init__(
        self, model: ir.Model | Path, options: Options | None = None, title: str = "the model"
    ) -> None:
        """Loads a file, or a model in memory, which messages call `title`.

        Raises:
            RefusedError: a ModelError, ORT refuses the model; the message is ORT's first line.
            OutputError: it cannot write a file.
        """
        self.options = options or Options()
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        settings.graph_optimization_level = _LEVELS[self.options.level]
        settings.intra_op_num_threads = self.options.threads
        settings.enable_mem_pattern = self.options.pattern
        settings.enable_cpu_mem_arena = self.options.arena
        if self.options.in_order:
            settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        # An idle session that spins would slow down the one it is compared with.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        for key, text in self.options.config:
            settings.add_session_config_entry(key, text)
        if self.options.profile:
            settings.enable_profiling = True
            settings.profile_file_prefix = self.options.profile
        if self.options.optimized:
            settings.optimized_model_filepath = str(self.options.optimized)
        try:
            self._session = ort.InferenceSession(
                self._source(model, settings), settings, providers=["CPUExecutionProvider"]
            )
        except (
            OSError
        ):  # not ORT's: a file that weights are read from is gone, or there is no room for a copy
            raise
        except Exception as error:  # ORT raises a dozen unrelated classes
            if self.options.optimized and "serialization failed" in str(error):
                raise no_room(self.options.optimized.parent, "the optimized graph") from error
            which = model if isinstance(model, Path) else title
            raise RefusedError(f"ONNX Runtime refuses {which}: {_first_line(error)}") from error
        self.inputs = tuple(map(_info, self._session.get_inputs()))
        self.outputs = tuple(map(_info, self._session.get_outputs()))
        self._names = {item.name for item in self.inputs}

    def _source(self, model: ir.Model | Path, settings: ort.SessionOptions) -> bytes | str:
        if not isinstance(model, ir.Model):
            return str(model)
        size = io.weight_bytes(model)
        if size < io.EXTERNAL_BYTES and not (self.options.shared and size >= SHARED_BYTES):
            return io.to_bytes(model)
        if size < io.EXTERNAL_BYTES:
            bones = skeleton(model)
            values = [ort.OrtValue.ortvalue_from_numpy(each) for each in bones.weights.values()]
            settings.add_external_initializers(list(bones.weights), values)
            self._weights = bones, values  # ORT keeps no reference to arrays
            if bones.folder is not None:  # ORT maps the files, as we do
                settings.add_session_config_entry(_FOLDER, str(bones.folder))
            return bones.data
        folder = tempfile.TemporaryDirectory(prefix="qcompile-")
        weakref.finalize(self, folder.cleanup)
        path = Path(folder.name) / "model.onnx"
        io.save(model, path)
        return str(path)

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[npt.NDArray[Any]]:
        """The outputs for one feed; entries that the model does not take are ignored.

        Raises:
            ModelError: ORT fails; the message is its first line.
        """
        taken = {name: value for name, value in feed.items() if name in self._names}
        try:
            results: list[npt.NDArray[Any]] = self._session.run(outputs, taken)
        except Exception as error:  # ORT raises a dozen unrelated classes
            raise ModelError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
        return results

    @property
    def native(self) -> ort.InferenceSession:
        """The session itself, for functions of the user."""
        return self._session

    def bound(self, outputs: Sequence[str]) -> Bound:
        """A way to run for these outputs again and again without copying them."""
        return Bound(self._session, self._names, outputs)

    def end_profiling(self) -> Path:
        """The file of the profile gathered so far."""
        return Path(self._session.end_profiling())


class Bound:
    """A session with its outputs bound: they are read where ORT wrote them. One thread at a time."""

    def __init__(
        self, session: ort.InferenceSession, names: AbstractSet[str], outputs: Sequence[str]
    ) -> None:
        self._session, self._names, self._outputs = session, names, list(outputs)
        self._binding = session.io_binding()
        self._shapes: list[tuple[int, ...]] | None = None

    def run(self, feed: Feed) -> list[npt.NDArray[Any]]:
        """The outputs for one feed, as views that the next run overwrites.

        Raises:
            ModelError: ORT fails; the message is its first line.
        """
        taken = {name: value for name, value in feed.items() if name in self._names}
        if any(value.dtype.kind not in "fiub" for value in taken.values()):  # text, bfloat16
            return self._copied(taken)
        try:
            return self._run(taken)
        except Exception as error:  # ORT raises a dozen unrelated classes
            raise ModelError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error

    def _run(self, feed: Feed) -> list[npt.NDArray[Any]]:
        shapes = [value.shape for value in feed.values()]
        kept = [np.ascontiguousarray(value) for value in feed.values()]
        for name, value in zip(feed, kept, strict=True):
            self._binding.bind_cpu_input(name, value)
        if shapes != self._shapes:
            self._bind_outputs()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception:  # shapes of outputs that follow from values: the old buffers do not fit
            if self._shapes is None or shapes != self._shapes:
                raise
            self._bind_outputs()
            self._session.run_with_iobinding(self._binding)
        self._shapes = shapes
        return [_view(value) for value in self._binding.get_outputs()]

    def _bind_outputs(self) -> None:
        self._shapes = None
        self._binding.clear_binding_outputs()
        for name in self._outputs:
            self._binding.bind_output(name, "cpu")

    def _copied(self, feed: Feed) -> list[npt.NDArray[Any]]:
        try:
            results: list[npt.NDArray[Any]] = self._session.run(self._outputs, dict(feed))
        except Exception as error:  # ORT raises a dozen unrelated classes
            raise ModelError(f"ONNX Runtime cannot run the model: {_first_line(error)}") from error
        return results


def _view(value: ort.OrtValue) -> npt.NDArray[Any]:
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError):  # bfloat16, text, or no elements
        copy: npt.NDArray[Any] = value.numpy()
        return copy


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip()[:300] if lines else type(error).__name__


def _info(item: ort.NodeArg) -> TensorInfo:
    kind = item.type.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype(_DTYPES[kind]) if kind in _DTYPES else None
    return TensorInfo(item.name, dtype, tuple(item.shape or ()))


def version() -> str:
    """The version of the installed ONNX Runtime."""
    return str(ort.__version__)
