"""The settings: defaults that work, errors that name the key, and a light import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from selection.settings import SelectionSettings


def test_defaults() -> None:
    settings = SelectionSettings()
    assert (settings.candidates, settings.keep, settings.strategy) == (16, 8, "noise_margin")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 32}, r"selection.keep must be at most selection.candidates \(16\), got 32"),
        ({"keep": 7}, "selection.keep must be even, since noise_margin keeps pairs, got 7"),
        ({"keep": 7, "strategy": "global_margin"}, "since global_margin keeps pairs"),
        ({"drafts": 16}, r"selection.drafts must be more than selection.candidates \(16\), .* got 16"),
        ({"keep": 1}, "greater than or equal to 2"),
        ({"candidates": 1}, "greater than or equal to 2"),
        ({"tolerance": -1.0}, "greater than or equal to 0"),
        ({"tolerance": float("nan")}, "finite"),
        ({"strategy": "best"}, "noise_margin"),
        ({"advantages": "none"}, "batch"),
        ({"margin": "each", "strategy": "random"}, "'each' needs strategy noise_margin, got random"),
        ({"kept": 8}, "Extra inputs are not permitted"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SelectionSettings(**values)


@pytest.mark.parametrize("strategy", ["all", "random", "max_variance", "prompt_filter"])
def test_odd_keep_is_fine_without_pairs(strategy: Any) -> None:
    assert SelectionSettings(keep=7, strategy=strategy).keep == 7


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SelectionSettings().keep = 4  # type: ignore[misc]


def test_the_import_is_light() -> None:
    probe = "import sys, selection.settings; sys.exit('numpy' in sys.modules)"
    root = Path(__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", probe], cwd=root, check=False).returncode == 0
