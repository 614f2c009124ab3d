"""Real models and data of the shared folder, which stands beside the checkout or where QCOMPILE_SHARED says."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(os.environ.get("QCOMPILE_SHARED") or Path(__file__).parents[2] / "shared")
needed = pytest.mark.skipif(
    not (SHARED / "models").is_dir(), reason=f"{SHARED} with its models is not here"
)


def model_path(name: str) -> Path:
    """A model's file, below `models`; the test is skipped where it is missing."""
    path = SHARED / "models" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


def calibration(task: str, count: int) -> list[dict[str, Any]]:
    """The first calibration feeds of a task of the evaluation kit; skipped where the kit is missing."""
    sys.path.insert(0, str(SHARED / "eval"))
    try:
        from evaluate import TASKS
    except ImportError as error:
        pytest.skip(f"the evaluation kit cannot be imported: {error}")
    finally:
        sys.path.remove(str(SHARED / "eval"))
    source = TASKS[task].calibration()
    return [dict(feed) for _, feed in zip(range(count), source, strict=False)]
