"""What `bench_budget.py` makes of a report: whether the promise was kept."""

from __future__ import annotations

from typing import Any

import pytest
from bench_budget import main, table


def found(
    value: float, change: float, sigma: float, speed: float = 2.0, **more: Any
) -> dict[str, Any]:
    row = {
        "name": "top1 %", "change": change, "change_sigma": sigma, "exit": 0, "mb": 1.0, "seconds": 9.0,
        "latency": {"feed": {"speedup": speed}}, **more,
    }  # fmt: skip
    return {"rows": [{"name": "top1 %", "value": value}, row]}


def kept(task: str, drop: str = "0.5%", **more: Any) -> str:
    line = table({"tasks": {task: found(**more)}}, drop).splitlines()[2]
    return line.split("|")[6].strip()


def test_a_promise_is_kept_within_the_limit_and_its_noise() -> None:
    assert kept("imagenet", value=80.0, change=-0.3, sigma=0.1) == "yes"  # 0.4 are allowed
    assert kept("imagenet", value=80.0, change=-0.49, sigma=0.1) == "yes"
    assert kept("imagenet", value=80.0, change=-0.51, sigma=0.1) == "**no**"
    assert kept("imagenet", value=80.0, change=+9.0, sigma=0.0) == "yes"
    assert kept("imagenet", drop="1", value=80.0, change=-0.9, sigma=0.0) == "yes"


def test_error_rates_may_not_rise() -> None:
    assert kept("ocr_rec", value=2.0, change=+0.1, sigma=0.0) == "**no**"
    assert kept("ocr_rec", value=2.0, change=-5.0, sigma=0.0) == "yes"


def test_the_mean_of_speed_ups_and_what_failed() -> None:
    report = {
        "tasks": {
            "imagenet": found(80.0, 0.0, 0.1, speed=2.0), "stsb": found(80.0, 0.0, 0.1, speed=8.0),
            "coco": {"rows": [{"name": "mAP50 %", "value": 35.0}, {"why": "crashes"}]},
        }
    }  # fmt: skip
    text = table(report, "0.5%")
    assert "Geometric mean of the speed-ups: 4.00x." in text
    assert "| coco | crashes |" in text


def test_without_a_kit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench_budget.py", "--eval", "nowhere"])
    assert main() == 2
    assert "there is no evaluate.py in nowhere" in capsys.readouterr().err
