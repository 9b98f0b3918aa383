"""The sampler's settings: the window, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rollout.settings import ModelSettings, RolloutSettings


@given(st.integers(2, 50))
def test_by_default_every_step_but_the_last_is_trained(steps: int) -> None:
    settings = RolloutSettings(steps=steps)
    assert settings.window_range == (0, steps - 1)
    assert settings.trained_steps == steps - 1


@given(st.integers(2, 20), st.integers(0, 20), st.integers(0, 25), st.integers(1, 25))
def test_a_window_is_accepted_exactly_when_it_fits(steps: int, start: int, stop: int, size: int) -> None:
    fits = start < stop <= steps - 1 and size <= stop - start
    try:
        settings = RolloutSettings(steps=steps, window_start=start, window_stop=stop, window_size=size)
    except ValidationError:
        assert not fits
    else:
        assert fits
        assert settings.trained_steps == size


def test_an_ode_has_no_stochastic_step() -> None:
    settings = RolloutSettings(dynamics="ode")
    assert (settings.window_range, settings.trained_steps, settings.same_window) == ((0, 0), 0, True)
    assert RolloutSettings(dynamics="ode", steps=2).trained_steps == 0


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, "path"),
        ({"dynamics": "cps", "solver": "dpm2"}, "path"),
        ({"dynamics": "ode"}, "path"),
        ({"dynamics": "ode", "solver": "dpm2"}, "ode"),
        ({"dynamics": "ode", "draft": "ode"}, "ode"),
    ],
)
def test_a_draft_is_continued_where_it_can_be(values: dict[str, str], kind: str) -> None:
    assert RolloutSettings(**values).draft_kind == kind  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("steps", "path", "others"), [(2, 1, 1), (3, 2, 2), (4, 2, 3), (6, 4, 5), (10, 6, 8), (40, 26, 33)]
)
def test_by_default_a_draft_keeps_most_of_the_contrast(steps: int, path: int, others: int) -> None:
    """Two thirds of the steps along an ODE's own path, and five sixths else."""
    assert RolloutSettings(steps=steps, dynamics="ode").drafted_steps == path
    assert RolloutSettings(steps=steps).drafted_steps == others
    assert RolloutSettings(steps=steps, dynamics="ode", solver="dpm2").drafted_steps == others
    assert RolloutSettings(steps=steps, draft_steps=1).drafted_steps == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 4, "window_start": 3}, r"window \[3, 3\).*end by step 3"),
        ({"steps": 4, "window_stop": 4}, r"window \[0, 4\).*end by step 3"),
        ({"steps": 6, "window_stop": 3, "window_size": 4}, r"window_size 4 .*\[0, 3\)"),
        ({"dynamics": "cps", "noise_level": 1.2}, r"at most 1 with cps, got 1\.2"),
        (
            {"dynamics": "ode", "window_start": 1},
            "window_start: got 1, but dynamics = 'ode' has no stochastic",
        ),
        ({"dynamics": "ode", "window_stop": 3}, "window_stop: got 3"),
        ({"dynamics": "ode", "window_size": 1}, "window_size: got 1"),
        ({"dynamics": "ode", "density": "unscaled"}, "density: got 'unscaled'"),
        ({"guidance": 0.5}, "guidance"),
        ({"storage": "float32"}, "storage"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_refusal_names_the_value(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutSettings(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "window", "size", "density"),
    [
        ({}, (0, 9), 9, "gaussian"),
        ({"dynamics": "cps"}, (0, 5), 3, "unscaled"),
        ({"dynamics": "cps", "steps": 4}, (0, 2), 2, "unscaled"),
        ({"dynamics": "cps", "window_start": 7}, (7, 8), 1, "unscaled"),
        ({"dynamics": "cps", "window_stop": 9}, (0, 9), 9, "unscaled"),
        ({"dynamics": "cps", "window_size": 2, "density": "gaussian"}, (0, 5), 2, "gaussian"),
        ({"density": "unscaled"}, (0, 9), 9, "unscaled"),
    ],
)
def test_cps_has_a_window_and_a_density_of_its_own(
    changes: dict[str, Any], window: tuple[int, int], size: int, density: str
) -> None:
    settings = RolloutSettings(**changes)
    assert (settings.window_range, settings.trained_steps, settings.log_density) == (window, size, density)


def test_the_sde_takes_levels_that_cps_refuses() -> None:
    assert RolloutSettings(dynamics="sde", noise_level=1.2).noise_level == 1.2


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelSettings(path="somewhere").lora_rank = 3  # type: ignore[misc]
