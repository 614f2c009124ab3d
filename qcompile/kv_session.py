"""Runs a decoder whose caches are integers on feeds of the float one, so that the two can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.graph import io
from qcompile.graph.kv_cache import StoredCache, stored_caches
from qcompile.quant.cache import decode, encode
from qcompile.run.session import Feed, Options, Session, TensorInfo
from qcompile.verify.latency import Runs


class KvSession(Session):
    """A session that takes float caches (batch, heads, tokens, width) and returns such ones.

    Attributes:
        plain: the session itself, which takes and returns codes.
    """

    def __init__(self, plain: Session, caches: Sequence[StoredCache]) -> None:
        """`caches` are those that hold codes."""
        self.plain = plain
        self.options, self._session = plain.options, plain.native
        self._names = {info.name for info in plain.inputs}
        self._pasts = {cache.past: cache for cache in caches}
        self._presents = {cache.present: cache for cache in caches}
        self.inputs = tuple(_as_float(info, self._pasts) for info in plain.inputs)
        self.outputs = tuple(_as_float(info, self._presents) for info in plain.outputs)

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> list[npt.NDArray[Any]]:
        """The outputs for one feed: see `Session.run`.

        Raises:
            ModelError: ORT fails; the message is its first line.
        """
        names = [info.name for info in self.outputs] if outputs is None else list(outputs)
        made = self.plain.run(self.encoded(feed), names)
        caches = (self._presents.get(name) for name in names)
        return [
            values if cache is None else decode(values, cache.params, cache.packing)
            for values, cache in zip(made, caches, strict=True)
        ]

    def encoded(self, feed: Feed) -> Feed:
        """The feed with codes in its caches."""
        return {name: self._encoded(name, values) for name, values in feed.items()}

    def _encoded(self, name: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        cache = self._pasts.get(name)
        return values if cache is None else encode(values, cache.params, cache.packing)


@dataclasses.dataclass(frozen=True)
class _Ready:
    """Runs on a feed whose codes were made before the clock started."""

    session: Session
    feed: Feed

    def run(self, feed: Feed) -> object:
        """One run, whatever is given."""
        del feed
        return self.session.run(self.feed)


def timed(session: Session, feed: Feed) -> Runs:
    """What runs a session on this feed as its user would: with codes in the caches from the start."""
    return (
        _Ready(session.plain, session.encoded(feed)) if isinstance(session, KvSession) else session
    )


def open_session(model: ir.Model | Path, options: Options | None = None) -> Session:
    """A session; one that takes float caches if qcompile made the model's caches integers.

    Raises:
        ModelError: ORT refuses the model, or what it tells of its caches does not fit.
    """
    caches = stored_caches(model if isinstance(model, ir.Model) else io.load(model))
    plain = Session(model, options)
    return KvSession(plain, caches) if caches else plain


def _as_float(info: TensorInfo, caches: Mapping[str, StoredCache]) -> TensorInfo:
    cache = caches.get(info.name)
    if cache is None:
        return info
    width = int(cache.params.scale.shape[1])
    return dataclasses.replace(info, dtype=np.dtype(np.float32), shape=(*info.shape[:-1], width))
