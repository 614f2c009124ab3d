"""The artefact of a calibration: statistics of every tensor that was asked for, and of what they are.

It serves every range method later, can be added to that of other samples of the same model, and carries a few
samples, so that what is compiled from it can be judged without the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from qcompile.calib.split import MOST_HELD_OUT, TUNING, StoredSamples
from qcompile.calib.stats import TensorStats
from qcompile.errors import DataError
from qcompile.run.session import Feed

SUFFIX = ".stats"


@dataclasses.dataclass(frozen=True)
class Shard:
    """Data that statistics were gathered on: what it was, the digest of all its feeds, how many calibrated.

    `manner` tells how samples were made of what was stored: the preprocessing of images.
    """

    description: str
    digest: str
    samples: int
    manner: str = ""


@dataclasses.dataclass(frozen=True)
class Key:
    """What statistics belong to.

    Attributes:
        model: digest of the float model, see `qcompile.graph.digest`.
        title: its file name, for people.
        shards: the data, in order.
        versions: of qcompile and onnxruntime, by name.
    """

    model: str
    title: str
    shards: tuple[Shard, ...]
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics by tensor name.

    Attributes:
        key: what they belong to.
        tensors: of the prepared graph, which the versions in `key` make the same each time.
        samples: how many are in them.
        skipped: how many bad samples were left out.
        unobserved: tensors or nodes that could not be observed, and why.
        held: feeds that are in none of the statistics.
        few: some of the feeds that are.
        forced: sentences about mismatches that the user overrode.
        shared: there was one sample only, which is in `held` as well.
    """

    key: Key
    tensors: Mapping[str, TensorStats]
    samples: int
    skipped: int = 0
    unobserved: Mapping[str, str] = dataclasses.field(default_factory=dict)
    held: Sequence[Feed] = ()
    few: Sequence[Feed] = ()
    forced: tuple[str, ...] = ()
    shared: bool = False

    def judges(self) -> StoredSamples:
        """The feeds that came along.

        Raises:
            DataError: there are none.
        """
        if not self.held:
            raise DataError(
                "the statistics came without held-out samples to judge a result on: give the data with "
                "--data too."
            )
        return StoredSamples(self.held, self.few, self.samples, shared=self.shared)


def check_model(found: Statistics, where: str, model: str, title: str) -> list[str]:
    """Sentences that name both sides, if statistics are of another model than the one of that digest."""
    if found.key.model == model:
        return []
    return [
        f"{where} was gathered on another model: {_short(found.key.title, found.key.model)}, and this is "
        f"{_short(title, model)}"
    ]


def check_versions(found: Statistics, where: str, versions: Mapping[str, str]) -> list[str]:
    """Sentences that name both sides, if other versions gathered the statistics."""
    return [
        f"{where} was gathered with {name} {found.key.versions.get(name, 'unknown')}, and this is {name} {version}"
        for name, version in versions.items()
        if found.key.versions.get(name) != version
    ]


def check_data(found: Statistics, where: str, digest: str, description: str) -> list[str]:
    """Sentences that name both sides, if statistics are of other data than that of this digest."""
    if any(shard.digest == digest for shard in found.key.shards):
        return []
    theirs = " and ".join(_short(s.description, s.digest) for s in found.key.shards)
    return [
        f"{where} was gathered on other data: {theirs}, and this is {_short(description, digest)}"
    ]


def settle(mismatches: Sequence[str], *, force: bool) -> tuple[str, ...]:
    """The mismatches, if they are forced.

    Raises:
        DataError: there is one, and it is not.
    """
    if mismatches and not force:
        raise DataError(f"{mismatches[0]}. Gather anew, or use it all the same with --force.")
    return tuple(f"{sentence} (forced)." for sentence in mismatches)


def merge(parts: Sequence[tuple[str, Statistics]], *, force: bool = False) -> Statistics:
    """The statistics of all samples of the parts, in order; the parts are named for messages.

    Raises:
        DataError: the parts are of different models or versions, share data, or know different tensors.
    """
    (first_name, first), *others = parts
    mismatches: list[str] = []
    for name, part in others:
        mismatches += check_model(part, name, first.key.model, f"{first.key.title} of {first_name}")
        mismatches += check_versions(part, name, first.key.versions)
        manners = [s.manner for p in (first, part) for s in p.key.shards if s.manner]
        if len(set(manners)) > 1:
            mismatches.append(
                f"the images of {first_name} and of {name} were not read alike: {manners[0]}, and {manners[-1]}"
            )
        if part.tensors.keys() != first.tensors.keys():
            odd = min(part.tensors.keys() ^ first.tensors.keys())
            raise DataError(
                f"only one of {first_name} and {name} knows tensor {odd!r}: gather both with the same options."
            )
        if any(
            (s.gram is None) != (part.tensors[n].gram is None) for n, s in first.tensors.items()
        ):
            raise DataError(
                f"only one of {first_name} and {name} holds X'X of all its tensors: gather both with --gram, or both without."
            )
    seen: dict[str, str] = {}
    for name, part in parts:
        before = dict(seen)
        for shard in part.key.shards:
            if shard.digest in before:
                mismatches.append(
                    f"{before[shard.digest]} and {name} hold the same data, {_short(shard.description, shard.digest)}, "
                    "which would count twice"
                )
            seen[shard.digest] = name
    forced = settle(mismatches, force=force)
    tensors = {name: TensorStats() for name in first.tensors}
    for _, part in parts:
        for name, stats in part.tensors.items():
            tensors[name].add(stats)
    return Statistics(
        key=dataclasses.replace(
            first.key, shards=tuple(shard for _, part in parts for shard in part.key.shards)
        ),
        tensors=tensors,
        samples=sum(part.samples for _, part in parts),
        skipped=sum(part.skipped for _, part in parts),
        unobserved={k: v for _, part in parts for k, v in part.unobserved.items()},
        held=_interleaved([part.held for _, part in parts], MOST_HELD_OUT),
        few=_interleaved([part.few for _, part in parts], TUNING),
        forced=(*(s for _, part in parts for s in part.forced), *forced),
        shared=any(part.shared for _, part in parts),
    )


def _interleaved(groups: Sequence[Sequence[Feed]], most: int) -> list[Feed]:
    """The first of each group, then the second of each, and so on."""
    longest = max(map(len, groups), default=0)
    return [group[i] for i in range(longest) for group in groups if i < len(group)][:most]


def _short(title: str, digest: str) -> str:
    return f"{title} ({digest[:12]})"
