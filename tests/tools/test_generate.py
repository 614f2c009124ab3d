"""The generation helper: windows, and the whole command on a small decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
from decoders import VOCABULARY, decoder
from generate import feeds, main, windows
from tokenizers import Tokenizer, models, pre_tokenizers

from qcompile.graph import io

WORDS = [f"w{i}" for i in range(VOCABULARY)]


@pytest.fixture
def kit(tmp_path: Path) -> dict[str, str]:
    """Paths of a float model, a tokenizer of words, a text, and a model to be made."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(" ".join(WORDS[i * i % VOCABULARY] for i in range(80)))
    io.save(decoder(), tmp_path / "float.onnx")
    names = ("tokenizer.json", "text.txt", "float.onnx", "made.onnx")
    return {name.partition(".")[0]: str(tmp_path / name) for name in names}


def test_windows_are_spread_over_the_text() -> None:
    ids = list(range(100))
    assert [part[0] for part in windows(ids, 3, 20)] == [0, 40, 80]
    assert {len(part) for part in windows(ids, 3, 20)} == {20}
    assert windows(ids, 5, 100) == [ids]
    assert windows(ids, 2, 101) == []


def test_samples_begin_with_an_empty_cache(kit: dict[str, str]) -> None:
    first, *_ = feeds(Path(kit["float"]), [1, 2, 3])
    assert first["past_k"].shape == (1, 2, 0, 4)
    assert first["input_ids"].tolist() == [[1, 2, 3]]


def test_quantizes_decodes_and_compares(
    kit: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--tokenizer", kit["tokenizer"], "--prompt", "w1 w2 w3", "--tokens", "6"]
    code = main(
        [kit["made"], *common, "--against", kit["float"], "--quantize", "int8", "--text", kit["text"],
         "--length", "20", "--windows", "2", "--threads", "1"]
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert lines[0].startswith("2 caches as int8")
    # the prompt, and all tokens made but the last, which nobody has read yet
    assert f"cache of {2 * 8 * (3 + 5)} bytes" in next(
        x for x in lines if x.startswith("made.onnx")
    )
    assert f"cache of {8 * 8 * (3 + 5)} bytes" in next(
        x for x in lines if x.startswith("float.onnx")
    )
    assert "perplexity" in lines[-1]


def test_decodes_alone(kit: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    main([kit["float"], "--tokenizer", kit["tokenizer"], "--prompt", "w1", "--tokens", "3"])
    assert "tokens/s" in capsys.readouterr().out.splitlines()[-1]


def test_what_is_missing_is_said(kit: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--tokenizer", kit["tokenizer"], "--prompt", "w1", "--tokens", "2"]
    with pytest.raises(SystemExit):
        main([kit["made"], *common, "--quantize", "int8"])
    assert "--quantize needs --against" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([kit["float"], *common, "--against", kit["float"], "--text", kit["text"]])
    assert "--text has 80 tokens left, fewer than --length 512" in capsys.readouterr().err
