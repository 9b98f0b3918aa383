"""The arms: their budgets, and shared prompts and noise."""

from __future__ import annotations

import pytest

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import resolve
from cluster.study.arms import ARMS, BASELINE, RETIRED, arm_settings, describe_arm
from cluster.study.compare import group_ids


@pytest.fixture(scope="module")
def base() -> RunSettings:
    return resolve("shapes", {})


def sampled(settings: RunSettings) -> int:
    return settings.groups_per_step * settings.selection.candidates


def trained(settings: RunSettings) -> int:
    selection = settings.selection
    kept = selection.candidates if selection.strategy == "all" else selection.keep
    return settings.groups_per_step * kept


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_fits_the_budget_of_its_name(base: RunSettings, arm: str) -> None:
    baseline, found = arm_settings(BASELINE, base), arm_settings(arm, base)
    assert sampled(baseline) == trained(baseline) == 64
    times = ARMS[arm].oversample
    if ARMS[arm].mode == "fixed_rollout":
        assert sampled(found) == 64
        assert trained(found) == 64 // times
    else:
        assert sampled(found) == 64 * times
        quarter = arm in ("nft_fast", "nft_fast_random")
        assert trained(found) == (128 if arm.endswith("all_2x") else 32 if quarter else 64)
    assert found.selection.rms_match == arm.endswith("_rms")


def test_an_arm_changes_nothing_but_selection_noise_and_prompts_per_step(base: RunSettings) -> None:
    for arm in [arm for arm in ARMS if ARMS[arm].objective == "flow_grpo"]:
        found = arm_settings(arm, base)
        changed: dict[str, object] = {"selection": base.selection, "groups_per_step": base.groups_per_step}
        half: dict[str, object] = {"draft_steps": 3} if ARMS[arm].drafts else {}
        half |= {"window_stop": 3} if ARMS[arm].early else {}
        changed |= {"rollout": base.rollout, "learner": base.learner}
        assert found.rollout == base.rollout.model_copy(update=half)
        assert found.learner == base.learner or arm == "flowgrpo_4u"
        assert found.model_copy(update=changed) == base
        assert found.selection.drafts == ARMS[arm].drafts * base.selection.keep


def test_arms_of_another_objective_differ_in_nothing_but_what_is_said(base: RunSettings) -> None:
    for arm in [arm for arm in ARMS if ARMS[arm].objective != "flow_grpo"]:
        found = arm_settings(arm, base)
        assert found.rollout.dynamics == "ode"
        assert found.learner.objective.name == ARMS[arm].objective
        assert found.learner.updates == 4
        same = {"objective": base.learner.objective, "updates": base.learner.updates}
        assert found.learner.model_copy(update=same) == base.learner


@pytest.mark.parametrize(
    ("arm", "random"),
    [(f"{name}_margin_2x", f"{name}_random_2x") for name in ("nft", "awm", "dpo")]
    + [("nft_fast", "nft_fast_random"), ("noise_margin_2x", "random_2x")],
)
def test_margin_and_its_control_differ_in_the_strategy_alone(
    base: RunSettings, arm: str, random: str
) -> None:
    margin, control = arm_settings(arm, base), arm_settings(random, base)
    strategy = {"strategy": margin.selection.strategy}
    assert control.selection.strategy == "random"
    assert control.model_copy(update={"selection": control.selection.model_copy(update=strategy)}) == margin


@pytest.mark.parametrize("arm", RETIRED)
def test_a_retired_arm_is_described_and_does_not_run(base: RunSettings, arm: str) -> None:
    assert describe_arm(arm) == RETIRED[arm]
    with pytest.raises(UserError, match=f"{arm} was removed after version 0.1.0"):
        arm_settings(arm, base)
    assert not describe_arm("nonesuch")


def test_the_filter_oversamples_prompts_and_not_noise(base: RunSettings) -> None:
    found = arm_settings("prompt_filter_2x", base)
    assert (found.groups_per_step, found.selection.candidates, found.selection.keep) == (16, 8, 4)


def test_arms_share_the_groups_of_a_step() -> None:
    baseline = [group_ids(step, 8, 8) for step in range(3)]
    assert baseline == [[*range(8)], [*range(8, 16)], [*range(16, 24)]]
    assert group_ids(2, 8, 4) == baseline[2][:4]
    wide = [group_ids(step, 8, 16) for step in range(3)]
    assert [ids[:8] for ids in wide] == baseline
    assert len({group for ids in wide for group in ids}) == 48


@pytest.mark.parametrize(
    ("arm", "changes", "message"),
    [
        ("noise_margin_3x", {}, "no arm 'noise_margin_3x'; arms are flowgrpo, random_2x"),
        (
            BASELINE,
            {"learner": {"objective": {"name": "nft"}}},
            "got 'nft', but arms change a preset of flow",
        ),
        ("noise_margin_4x_fixed_rollout", {"groups_per_step": 6}, "6 / 4 is not whole"),
        ("noise_margin_2x", {"selection": {"keep": 7, "strategy": "all"}}, "must be even"),
        ("prompt_filter_2x", {"selection": {"keep": 7, "strategy": "all"}}, "needs selection.keep to divide"),
    ],
)
def test_what_does_not_fit_is_said(arm: str, changes: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(UserError, match=message):
        arm_settings(arm, resolve("shapes", changes))
