"""Recipes: built-in ones, TOML files, options; and the sentences about what is wrong in one."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from qcompile.calib.data import DataOptions, ImageOptions
from qcompile.calib.ranges import METHODS
from qcompile.errors import RecipeError
from qcompile.options import parser_of, recipe_of
from qcompile.recipe import BUILT_IN, Format, Recipe, load_recipe

FULL = """
target = "ort-cpu-arm64"
ranges = "kl"
format = "qdq"
keep_float = ["*/head/*", "Softmax"]
static = true
dynamic = false
bias_correction = false
weight_search = true
sqnr_goal = 25
min_sqnr = 12.5
threads = 2
bench_seconds = 0.5
memory = 1000000
skip_bad = true
max_drop = "0.5%"
metric = "my:metric"
lower_is_better = true
max_size = "4MB"
max_latency = "50%"
objective = "smallest"
search_time = 30
equalize = false
absorb = false
smooth = false
masks = false
rounding = false
timing = true
[data]
samples = 32
tokenizer = "tokenizer.json"
max_tokens = 64
[data.image]
size = [224, 160]
resize = 256
crop = "center"
mean = [0.485, 0.456, 0.406]
std = [1, 1, 1]
scale = 0.004
layout = "nhwc"
color = "bgr"
"""


def loaded(folder: Path, text: str) -> Recipe:
    (folder / "r.toml").write_text(text)
    return load_recipe(folder / "r.toml")


def test_built_in() -> None:
    assert load_recipe(None) == load_recipe("int8") == Recipe()
    assert all(recipe.name == name for name, recipe in BUILT_IN.items())
    assert not load_recipe("int8-static").dynamic
    assert not load_recipe("int8-dynamic").static
    own = Recipe(ranges="mse")
    assert load_recipe(own) is own


FEW_BITS = {
    "bits",
    "bits_per_weight",
    "block",
    "symmetric",
    "algorithm",
    "accuracy_level",
    "bits_for",
    "kv_cache",
}


def test_keys_of_weights_of_few_bits(tmp_path: Path) -> None:
    text = """
bits = 4
block = 64
symmetric = true
algorithm = "hqq"
accuracy_level = 0
bits_for = ["lm_head=8", "*/down/*=8"]
kv_cache = "int4"
"""
    (tmp_path / "r.toml").write_text(text)
    assert load_recipe(tmp_path / "r.toml") == Recipe(
        name="r", bits=4, block=64, symmetric=True, algorithm="hqq", accuracy_level=0,
        bits_for=("lm_head=8", "*/down/*=8"), kv_cache="int4",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 3}, "bits is 3: kernels take weights of 2, 4 or 8 bits"),
        ({"bits": 4, "block": 48}, "block is 48: kernels take 16, 32, 64, 128 or 256"),
        ({"symmetric": True}, "symmetric is for weights of few bits"),
        ({"accuracy_level": 0}, "accuracy_level is for weights of few bits"),
        ({"bits_for": ("a=8",)}, "bits_for is for weights of few bits"),
        ({"kv_cache": "int3"}, "kv_cache is 'int3': give one of int8, uint8, int4"),
        ({"kv_cache": "int8", "max_size": "4MB"}, "are not searched for with kv_cache"),
        ({"bits": 4, "min_sqnr": 20.0}, "are not searched for with weights of few bits"),
    ],
)
def test_what_does_not_go_with_few_bits(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        Recipe(**change)


def test_every_key(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, FULL)
    assert recipe == Recipe(
        name="r", target="ort-cpu-arm64", ranges="kl", format="qdq", keep_float=("*/head/*", "Softmax"),
        dynamic=False, bias_correction=False, weight_search=True, sqnr_goal=25.0, min_sqnr=12.5,
        threads=2, bench_seconds=0.5, memory=1000000, skip_bad=True,
        max_drop="0.5%", metric="my:metric", lower_is_better=True, max_size="4MB", max_latency="50%",
        objective="smallest", search_time=30.0, equalize=False, absorb=False, smooth=False, masks=False, rounding=False,
        data=DataOptions(
            32,
            ImageOptions(
                (224, 160), 256, "center", (0.485, 0.456, 0.406), (1.0, 1.0, 1.0), 0.004, "nhwc", "bgr"
            ),
            tmp_path / "tokenizer.json",
            64,
        ),
    )  # fmt: skip
    keys = {field.name for field in dataclasses.fields(Recipe)}
    assert all(re.search(rf"^\[?{key}\b", FULL, re.MULTILINE) for key in keys - {"name", *FEW_BITS})
    assert type(recipe.sqnr_goal) is float


def test_a_name_and_absolute_paths_are_kept(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "name = 'mine'\n[data]\ntokenizer = '/a/tokenizer.json'")
    assert recipe.name == "mine"
    assert recipe.data.tokenizer == Path("/a/tokenizer.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rangs = 'kl'", "unknown key 'rangs'. Did you mean 'ranges'? Known here: name, target,"),
        ("[data.image]\nmeen = [1]", "unknown key 'data.image.meen'. Did you mean 'mean'?"),
        ("ranges = 'minmacs'", "ranges is 'minmacs', not one of auto, minmax, mean, moving-average, percentile, mse, kl"),
        ("ranges = 3", "'ranges' is 3, expected text."),
        ("format = ['qdq']", "'format' is ['qdq'], not one of auto, qdq, fused."),
        ("static = 1", "'static' is 1, expected true or false."),
        ("threads = true", "'threads' is True, expected a whole number."),
        ("threads = 1.5", "'threads' is 1.5, expected a whole number."),
        ("threads = -1", "threads is -1: give 0 (ORT's choice) to 4096."),
        ("sqnr_goal = '20'", "'sqnr_goal' is '20', expected a number."),
        ("sqnr_goal = nan", "'sqnr_goal' is nan, expected a finite number."),
        ("bench_seconds = 0", "bench_seconds is 0: give more than 0."),
        ("keep_float = 'Conv'", "'keep_float' is 'Conv', expected a list."),
        ("keep_float = [1]", "'keep_float[0]' is 1, expected text."),
        ("target = 1", "'target' is 1, expected text."),
        ("data = 1", "'data' is 1, expected a table."),
        ("[data]\nsamples = '4'", "'data.samples' is '4', expected a whole number."),
        ("[data.image]\nsize = [224]", "'data.image.size' has 1 entries, expected 2."),
        ("[data.image]\nsize = 224", "'data.image.size' is 224, expected a list."),
        ("[data.image]\nmean = ['a']", "'data.image.mean[0]' is 'a', expected a number."),
        ("static = false\ndynamic = false", "static and dynamic are both false: nothing could be quantized."),
    ],
)  # fmt: skip
def test_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as found:
        loaded(tmp_path, text)
    assert str(found.value).startswith(f"recipe {tmp_path}/r.toml: ")
    assert str(found.value).endswith((".", "?"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = [", r"recipe .+r\.toml is not valid TOML: .+\.$"),
        (b"name = '\xff'", r"recipe .+r\.toml is not text in UTF-8: .+\.$"),
        (None, r"recipe .+r\.toml cannot be read: Is a directory\.$"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is None:
        (tmp_path / "r.toml").mkdir()
    else:
        (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(tmp_path / "r.toml")


def test_unknown_name() -> None:
    with pytest.raises(
        RecipeError, match=r"no recipe 'int8_static'\. Did you mean 'int8-static'\?"
    ):
        load_recipe("int8_static")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranges": "minmacs"}, "ranges is 'minmacs', not one of"),
        ({"format": "qd"}, "format is 'qd', not one of auto, qdq, fused. Did you mean 'qdq'?"),
        ({"keep_float": "Conv"}, "keep_float is the text 'Conv': give a tuple of patterns."),
        ({"min_sqnr": float("inf")}, "min_sqnr is inf: give a finite number of decibels."),
        ({"memory": 0}, "memory is 0: give a number of bytes above 0."),
        ({"objective": "fast"}, "objective is 'fast': give fastest or smallest."),
        ({"search_time": 0.0}, "search_time is 0: give more than 0 seconds."),
        ({"search_time": float("nan")}, "search_time is nan: give more than 0 seconds."),
    ],
)
def test_recipes_made_in_python(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        Recipe(**values)


def options(*words: str) -> Recipe:
    return recipe_of(parser_of("compile").read(["m.onnx", *words]))


def test_options_are_the_recipe(tmp_path: Path) -> None:
    assert options() == Recipe()
    words = """--ranges kl --target ort-cpu-arm64 --threads 3 --format fused --sqnr-goal 0 --min-sqnr -3.5
        --keep-float a --keep-float b/c --samples 7 --tokenizer t.json --max-tokens 9 --size 8x9 --resize 10
        --crop none --mean 1,2.5 --std=3 --scale 1 --layout nhwc --color gray"""
    assert options(*words.split()) == Recipe(
        ranges="kl", target="ort-cpu-arm64", threads=3, format="fused", sqnr_goal=0.0, min_sqnr=-3.5,
        keep_float=("a", "b/c"),
        data=DataOptions(
            7, ImageOptions((8, 9), 10, "none", (1.0, 2.5), (3.0,), 1.0, "nhwc", "gray"), Path("t.json"), 9
        ),
    )  # fmt: skip
    assert options("--size", "8").data.image.size == (8, 8)


def test_options_go_over_the_recipe_file(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(FULL)
    recipe = options("--recipe", str(tmp_path / "r.toml"), "--threads", "0", "--keep-float", "x")
    assert recipe.threads == 0
    assert recipe.keep_float == ("*/head/*", "Softmax", "x")
    assert dataclasses.replace(recipe, threads=2, keep_float=recipe.keep_float[:2]) == loaded(
        tmp_path, FULL
    )


@pytest.mark.parametrize(
    ("option", "known"),
    [
        ("--ranges", ("auto", *METHODS)),
        ("--format", get_args(Format)),
        ("--crop", ("center", "none")),
        ("--layout", ("nchw", "nhwc")),
        ("--color", ("rgb", "bgr", "gray")),
    ],
)
def test_options_offer_what_recipes_know(option: str, known: tuple[str, ...]) -> None:
    for choice in known:
        options(option, choice)
    with pytest.raises(RecipeError, match=f"{option}: 'x' is not one of {', '.join(known)}: see"):
        options(option, "x")
