"""Recipes: every option of a compilation, from defaults, a TOML file and the command line.

Unknown keys are errors that offer the nearest known one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from qcompile.calib.data import DataOptions
from qcompile.calib.observe import MEMORY
from qcompile.calib.ranges import method
from qcompile.errors import RecipeError, nearest
from qcompile.limits import Limit, parse_limit
from qcompile.quant.cache import KINDS, Kind
from qcompile.table import fill, read_text, read_toml

_MOST_THREADS = 4096
Format = Literal["auto", "qdq", "fused"]
BLOCKS = (16, 32, 64, 128, 256)  # that kernels take
USUAL_BLOCK = 32


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to do, apart from the model and its data.

    Attributes:
        name: shown in reports.
        target: a target's name, a target file, or `auto` for this machine.
        ranges: how activation ranges are chosen: a method of `qcompile.calib.ranges`, or `auto`, which tries
            several on held-out samples.
        format: `qdq` is portable Q/DQ, `fused` writes ORT's integer operators, `auto` takes the faster.
        keep_float: patterns of node names or operator types that stay float.
        static, dynamic: whether these forms may be used at all.
        bias_correction: correct biases for the mean error of quantization.
        weight_search: search weight scales by squared error instead of taking the full range.
        sqnr_goal: decibels on held-out samples that the compiler tries to reach by leaving the most
            harmful nodes float, as long as the result stays faster than float; 0 turns it off.
        min_sqnr: decibels that must be reached; missing them is exit code 3. None: no limit.
        max_drop: how much worse than the float model the result may be, `0.5%` of its value or a number in the
            unit of `metric`; without a metric, the share of decisions that differ, or of the cosine that is lost.
        metric: `module:function` or a function of an `onnxruntime.InferenceSession`, which scores it on labelled data.
        lower_is_better: of the metric.
        max_size, max_latency: limits in MB (10^6 bytes) and ms, or shares of the float model as `50%`. With `bits`, bits and
            blocks are shared out so that the file keeps `max_size`, and the other limits are refused.
        objective: what is best among the results within the limits.
        search_time: seconds that the search for a result within the limits may take.
        equalize: fold scales of channels into the neighbouring weights of convolutions, where that helps.
        absorb: move what all values of a channel exceed behind the activation, into the biases of the next layers.
        smooth: scales moved likewise for products, as SmoothQuant does, and side paths for outlier channels.
        masks: constants as -1e9 before a Softmax give way to numbers that fit 8 bits, where an integer Add then pays.
        rounding: search codes of weights for the least error of what layers compute, not of the weights.
        timing: kernels and results are timed on this machine, and decide. Without, the target's costs do: the same model,
            data and recipe then give the same bytes.
        bits: of weights, 2, 4 or 8, with float activations (MatMulNBits); None: 8-bit weights and activations.
        block: weights of a row that share a scale, 16 to 256; None: 32, or what fits where bits are shared out.
        bits_per_weight: on average, 2 to 8, of codes, scales and zero points: each matrix then gets the bits and the block
            that cost the model least, whatever `bits` says.
        symmetric: weights of `bits` have no zero points: smaller by bits / block a weight, and less exact.
        algorithm: that rounds weights of `bits`: one of `qcompile.algo.choose`, or `auto`, the best for each matrix.
        accuracy_level: of MatMulNBits: 4 rounds activations to 8 bits by blocks and is fast, 0 and 1 do not.
        bits_for: other bits for some matrices, as `lm_head=8`; patterns as in `keep_float`.
        kv_cache: a decoder keeps keys and values as int8, uint8 or int4, two in a byte; None: as the model has them.
        threads: intra-op threads for all runs; 0 leaves it to ORT.
        memory: bytes that observed tensors may take while samples run; with less, the data is read more often.
        skip_bad: leave out samples for which the float model makes NaN or infinities, instead of failing.
        bench_seconds: how long each timing lasts.
        data: where samples come from is given apart; this is how they are read.

    Raises:
        RecipeError: a number is out of its range, or a choice is unknown.
    """

    name: str = "int8"
    target: str = "auto"
    ranges: str = "auto"
    format: Format = "auto"
    keep_float: tuple[str, ...] = ()
    static: bool = True
    dynamic: bool = True
    bias_correction: bool = True
    weight_search: bool = False
    sqnr_goal: float = 18.0
    min_sqnr: float | None = None
    max_drop: str | None = None
    metric: str | Callable[[Any], Any] | None = None
    lower_is_better: bool = False
    max_size: str | None = None
    max_latency: str | None = None
    objective: Literal["fastest", "smallest"] = "fastest"
    search_time: float = 60.0
    equalize: bool = True
    absorb: bool = True
    smooth: bool = True
    masks: bool = True
    rounding: bool = True
    timing: bool = True
    bits: int | None = None
    block: int | None = None
    bits_per_weight: float | None = None
    symmetric: bool = False
    algorithm: str = "auto"
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    bits_for: tuple[str, ...] = ()
    kv_cache: Kind | None = None
    threads: int = 0
    memory: int = MEMORY
    skip_bad: bool = False
    bench_seconds: float = 1.0
    data: DataOptions = dataclasses.field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        if self.ranges != "auto":
            method(self.ranges)
        if self.format not in get_args(Format):
            known = get_args(Format)
            raise RecipeError(
                f"format is {self.format!r}, not one of {', '.join(known)}.{nearest(self.format, known)}"
            )
        if self.memory < 1:
            raise RecipeError(f"memory is {self.memory}: give a number of bytes above 0.")
        if isinstance(self.keep_float, str):
            raise RecipeError(
                f"keep_float is the text {self.keep_float!r}: give a tuple of patterns."
            )
        if not 0 <= self.threads <= _MOST_THREADS:
            raise RecipeError(
                f"threads is {self.threads}: give 0 (ORT's choice) to {_MOST_THREADS}."
            )
        if not (math.isfinite(self.bench_seconds) and self.bench_seconds > 0):
            raise RecipeError(f"bench_seconds is {self.bench_seconds:g}: give more than 0.")
        for name, decibels in (("sqnr_goal", self.sqnr_goal), ("min_sqnr", self.min_sqnr)):
            if decibels is not None and not math.isfinite(decibels):
                raise RecipeError(f"{name} is {decibels:g}: give a finite number of decibels.")
        self._check_budget()
        self._check_weights()
        if not self.static and not self.dynamic and self.bits is None and self.kv_cache is None:
            raise RecipeError("static and dynamic are both false: nothing could be quantized.")

    def _check_weights(self) -> None:
        if self.bits not in (None, 2, 4, 8):
            raise RecipeError(f"bits is {self.bits}: kernels take weights of 2, 4 or 8 bits.")
        if self.block not in (None, *BLOCKS):
            raise RecipeError(
                f"block is {self.block}: kernels take 16, 32, 64, 128 or 256 weights."
            )
        average = self.bits_per_weight
        if average is not None and not 2 <= average <= 8:
            raise RecipeError(f"bits_per_weight is {average:g}: give 2 to 8.")
        mine = ("bits_for", "symmetric", "algorithm", "block", "accuracy_level", "bits_per_weight")
        usual = {field.name: field.default for field in dataclasses.fields(self)}
        changed = [name for name in mine if getattr(self, name) != usual[name]]
        if self.bits is None and changed:
            raise RecipeError(
                f"{changed[0]} is for weights of few bits: choose the recipe int4 or int8-weights, or give bits."
            )
        if self.kv_cache not in (None, *KINDS):
            raise RecipeError(
                f"kv_cache is {self.kv_cache!r}: give one of {', '.join(KINDS)}.{nearest(str(self.kv_cache), KINDS)}"
            )
        if self.kv_cache is not None and self.limited:
            raise RecipeError(
                "max_drop, min_sqnr, max_size and max_latency are not searched for with kv_cache: leave them out."
            )
        if self.bits is not None and self.limited:
            others = (self.max_drop, self.min_sqnr, self.max_latency)
            if any(limit is not None for limit in others):
                raise RecipeError(
                    "max_drop, min_sqnr and max_latency are not searched for with weights of few bits: leave them out, or give max_size."
                )

    def _check_budget(self) -> None:
        for name, text, unit in (
            ("max_drop", self.max_drop, ""),
            ("max_size", self.max_size, "MB"),
            ("max_latency", self.max_latency, "ms"),
        ):
            if text is not None:
                parse_limit(text, name, unit)
        if self.objective not in ("fastest", "smallest"):
            raise RecipeError(f"objective is {self.objective!r}: give fastest or smallest.")
        if not (math.isfinite(self.search_time) and self.search_time > 0):
            raise RecipeError(f"search_time is {self.search_time:g}: give more than 0 seconds.")
        if self.max_latency is not None and not self.timing:
            raise RecipeError(
                "max_latency is a limit of time, and timing is off: leave out one of them."
            )
        if self.metric is not None and self.max_drop is None:
            raise RecipeError("metric is given without max_drop: say how much it may drop.")

    @property
    def keeps_weights(self) -> bool:
        """Whether weights and activations stay float, so that only caches become integers."""
        return self.bits is None and not self.static and not self.dynamic

    @property
    def usual_block(self) -> int:
        """Weights that share a scale where nothing else decides."""
        return USUAL_BLOCK if self.block is None else self.block

    @property
    def shares_bits(self) -> bool:
        """Whether bits and blocks are shared out among the matrices, within a size."""
        return self.bits is not None and (
            self.bits_per_weight is not None or self.max_size is not None
        )

    @property
    def size_limit(self) -> Limit | None:
        """`max_size`, read; None if there is none."""
        return None if self.max_size is None else parse_limit(self.max_size, "max_size", "MB")

    @property
    def limited(self) -> bool:
        """Whether anything limits the result but being faster than the float model."""
        limits = (self.max_drop, self.min_sqnr, self.max_size, self.max_latency)
        return any(limit is not None for limit in limits)


BUILT_IN: Mapping[str, Recipe] = {
    "int8": Recipe(),
    "int8-static": Recipe(name="int8-static", dynamic=False),
    "int8-dynamic": Recipe(name="int8-dynamic", static=False),
    "int4": Recipe(name="int4", bits=4),
    "int8-weights": Recipe(name="int8-weights", bits=8, block=64, symmetric=True),
    "kv-cache": Recipe(name="kv-cache", static=False, dynamic=False, kv_cache="int8"),
}


def load_recipe(source: str | Path | Recipe | None) -> Recipe:
    """The built-in recipe of that name, or that of a TOML file, whose paths start at its folder.

    Raises:
        RecipeError: no such recipe, not TOML, an unknown key or a value of the wrong kind.
    """
    if isinstance(source, Recipe):
        return source
    if source is None:
        return Recipe()
    if str(source) in BUILT_IN:
        return BUILT_IN[str(source)]
    path = Path(source)
    if not path.exists():
        known = list(BUILT_IN)
        raise RecipeError(
            f"there is no recipe {str(source)!r}.{nearest(str(source), known)} Known: {', '.join(known)}; or give a .toml file."
        )
    where = f"recipe {path}"
    table = read_toml(read_text(path, where), where)
    table.setdefault("name", path.stem)
    recipe = fill(Recipe, table, where)
    if recipe.data.tokenizer is None:
        return recipe
    data = dataclasses.replace(recipe.data, tokenizer=path.parent / recipe.data.tokenizer)
    return dataclasses.replace(recipe, data=data)
