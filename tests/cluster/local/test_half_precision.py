"""Learning in emulated half precision, against float32 with the same seed; BENCHMARKS.md has five seeds."""

from __future__ import annotations

import pytest

from tests.support.half_precision import curve, late


@pytest.fixture(scope="module")
def exact() -> list[float]:
    return curve("float32", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["float16", "bfloat16, the learner's old log-probs"])
def test_half_precision_learns_as_float32_does(arm: str, exact: list[float]) -> None:
    """At least half as much: runs that differ by rounding alone end up to 0.05 apart, and gain 0.27."""
    scores = curve(arm, seed=0)
    assert scores[0] == pytest.approx(exact[0], abs=0.02)
    gain = late(exact) - exact[0]
    assert gain > 0.1
    assert late(scores) - scores[0] > gain / 2
