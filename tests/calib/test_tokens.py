"""Text files: tokenizer, the arrays for each kind of input, and the sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qcompile.calib.data import Data, DataOptions, InputSpec, open_data
from qcompile.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pathlib import Path

WORDS = ["[UNK]", "[CLS]", "[SEP]", "a", "b", "c", "[PAD]"]


def made(folder: Path, *, unknown: bool = True, silent: bool = False) -> Path:
    """A tokenizer of single words; it asks for padding to 16, as some published files do.

    Not `unknown`: other words are an error. `silent`: every word is dropped.
    """
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]" if unknown else "<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if silent:
        tokenizer.model = models.BPE()
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(4)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def spec(name: str, shape: Any = ("B", "S"), dtype: Any = np.int64, **more: Any) -> InputSpec:
    return InputSpec(name, np.dtype(dtype), shape, **more)


IDS = spec("input_ids")


def opened(
    folder: Path,
    *inputs: InputSpec,
    text: str = "a b c\n",
    max_tokens: int = 128,
    pack: bool = False,
    **kind: bool,
) -> Data:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    options = DataOptions(tokenizer=made(folder, **kind), max_tokens=max_tokens, pack=pack)
    return open_data(folder / "text.txt", inputs or (IDS,), options)


def test_each_line_is_a_sample(tmp_path: Path) -> None:
    data = opened(tmp_path, text="\ufeffa b\n\n  \n c zebra\r\n" + "a " * 200)
    for _ in range(2):
        assert [feed["input_ids"].tolist() for feed in data] == [
            [[1, 3, 4, 2]],
            [[1, 5, 0, 2]],
            [[1, *[3] * 126, 2]],
        ]
    assert len(data) == 3
    assert data.description == str(tmp_path / "text.txt")
    assert data.notes == ("lines are cut to 128 tokens: set --max-tokens to change that.",)


def test_lines_as_one_text(tmp_path: Path) -> None:
    """Without the tokens that stand around each line; newlines are what the tokenizer makes of them."""
    data = opened(tmp_path, text="a b\n\nc a\n" + "b " * 5 + "\nc", max_tokens=4, pack=True)
    for _ in range(2):
        found = [feed["input_ids"].tolist() for feed in data]
        assert found == [[[3, 4, 5, 3]], [[4, 4, 4, 4]]]  # 4 and 5 are left
    assert len(data) == 2
    assert data.notes == (
        "all lines are one text, in samples of 4 tokens: set --max-tokens to change that.",
    )
    (short,) = opened(tmp_path, text="a\nb\n", pack=True)
    assert short["input_ids"].tolist() == [[3, 4]]


def test_known_inputs_are_filled_with_their_types(tmp_path: Path) -> None:
    inputs = [
        spec("position_ids", dtype=np.int32),
        spec("token_type_ids"),
        IDS,
        spec("attention_mask", dtype=np.float32),
        spec("bias", required=False),
    ]
    (feed,) = opened(tmp_path, *inputs)
    assert {name: array.tolist() for name, array in feed.items()} == {
        "position_ids": [[0, 1, 2, 3, 4]],
        "token_type_ids": [[0] * 5],
        "input_ids": [[1, 3, 4, 5, 2]],
        "attention_mask": [[1.0] * 5],
    }
    assert [array.dtype for array in feed.values()] == [np.int32, np.int64, np.int64, np.float32]


def test_fixed_length_pads_and_cuts(tmp_path: Path) -> None:
    inputs = [spec("input_ids", (1, 6)), spec("attention_mask", (1, 6)), spec("position_ids")]
    data = opened(tmp_path, *inputs, text="a\na b c a b c\n")
    first, second = data
    assert first["input_ids"].tolist() == [[1, 3, 2, 6, 6, 6]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0]]
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    assert second["input_ids"].tolist() == [[1, 3, 4, 5, 3, 2]]
    assert data.notes[1] == "lines are padded to the 6 tokens that the input shape fixes."
    (cut,) = opened(tmp_path, *inputs, text="a b c a b c\n", max_tokens=3)
    assert cut["input_ids"].tolist() == [[1, 3, 2, 6, 6, 6]]
    (one,) = opened(tmp_path, max_tokens=1)
    assert one["input_ids"].tolist() == [[1]]


def test_cache_inputs_are_empty(tmp_path: Path) -> None:
    inputs = [
        IDS,
        spec("past_key_values.0.key", ("B", 2, "past", 64), np.float16),
        spec("past_key_values.0.value", (1, 2, None, 64), np.float32),
        spec("past_0", (2, "B", 4, "past_sequence", 8), np.float32, required=False),
    ]
    data = opened(tmp_path, *inputs)
    (feed,) = data
    shapes = {name: array.shape for name, array in feed.items() if "past" in name}
    assert shapes == {
        "past_key_values.0.key": (1, 2, 0, 64),
        "past_key_values.0.value": (1, 2, 0, 64),
        "past_0": (2, 1, 4, 0, 8),
    }
    assert feed["past_key_values.0.key"].dtype == np.float16
    assert data.notes[-1] == "the 3 cache inputs are empty, as at the start of a text."


@pytest.mark.parametrize(
    "unfit",
    [
        spec("pixels", (1, 3, 8, 8), np.float32),
        spec("past_key_values.0.key", (1, 2, 16, 64), np.float32),
        spec("past_key_values.0.key", ("B", "heads", "len", 64), np.float32),
        spec("past_key_values.0.key", None, np.float32),
        spec("past_length", ("B", "S")),
    ],
)
def test_other_inputs_cannot_be_filled(unfit: InputSpec, tmp_path: Path) -> None:
    sentence = (
        rf"text cannot fill input '{unfit.name}' \(.+\), only input_ids, attention_mask,"
        r" token_type_ids, position_ids and a cache with one open dimension: give \.npz files"
    )
    with pytest.raises(DataError, match=sentence):
        opened(tmp_path, IDS, unfit)


def test_another_batch_or_rank_is_refused(tmp_path: Path) -> None:
    for shape in ((8, "S"), ("S",), ()):
        with pytest.raises(
            DataError, match=r"text\.txt \(line 1\): 'input_ids' has shape \[1, 5\]"
        ):
            list(opened(tmp_path, spec("input_ids", shape)))


def test_tokenizer_may_be_a_folder(tmp_path: Path) -> None:
    made(tmp_path)
    (tmp_path / "text.txt").write_text("a")
    (feed,) = open_data(tmp_path / "text.txt", [IDS], DataOptions(tokenizer=tmp_path))
    assert feed["input_ids"].tolist() == [[1, 3, 2]]


def test_wrong_options(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a")
    with pytest.raises(
        RecipeError, match=r"text\.txt is text, which needs a tokenizer: set --tokenizer tokeniz"
    ):
        open_data(text, [IDS], DataOptions())
    with pytest.raises(RecipeError, match=r"--max-tokens is 0: give 1 or more\."):
        opened(tmp_path, max_tokens=0)
    for path in (text, tmp_path / "missing.json"):
        with pytest.raises(
            DataError, match=rf"{path.name} is no tokenizer that can be read \(.+\): give a token"
        ):
            open_data(text, [IDS], DataOptions(tokenizer=path))


def test_wrong_text(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"text\.txt \(line 2\) cannot be tokenized \(.+\): correct the line\."
    ):
        list(opened(tmp_path, text="a\nzebra\n", unknown=False))
    with pytest.raises(
        DataError, match=r"text\.txt \(line 3\) has no tokens: remove the line or give another"
    ):
        list(opened(tmp_path, text="\n\na\n", silent=True))
    data = opened(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"a\n\xff\n")
    for read in (list, len):
        with pytest.raises(
            DataError, match=r"text\.txt is no text that can be read \(.+\): save it as UTF-8\."
        ):
            read(data)
    with pytest.raises(DataError, match=r"there is no sample in it"):
        list(opened(tmp_path, text="\n \n"))
