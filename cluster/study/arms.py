"""The arms of the study: the changes of each to a preset, under comparable budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from selection.analysis.budget import Budget, BudgetMode, plan_budget
from selection.settings import StrategyName

BASELINE: Final = "flowgrpo"
"""The arm that all others are compared with."""
BASE_OBJECTIVE: Final = "flow_grpo"
"""The objective of the baseline."""


Changes = Mapping[str, Any]
"""Values of sections of the configuration, as in a TOML file."""
Changing = Callable[[RunSettings], Changes]
"""Changes of a preset, which may depend on its own values."""


def _always(changes: Changes) -> Changing:
    return lambda _: changes


_UNCHANGED: Final = _always({})

FORWARD: Final[Changes] = {"rollout": {"dynamics": "ode"}, "learner": {"updates": 4}}
"""Changes of every arm of an objective on the forward process.

With a single optimizer step per batch nothing holds the policy back: there it is still the behaviour policy.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A strategy, its factor of oversampling, the budget equal to the baseline's, and its advantages' scale.

    ``drafts`` counts drafted candidates in multiples of the baseline's candidates, of half as many steps;
    ``early`` adds noise and trains in the first half of the steps only, so that no noise is added after a
    draft. ``objective`` names another one than the baseline's, and ``changes`` are other values beside.
    """

    strategy: StrategyName
    oversample: int = 1
    mode: BudgetMode = "fixed_train"
    rms_match: bool = False
    drafts: int = 0
    early: bool = False
    objective: str = BASE_OBJECTIVE
    changes: Changing = _UNCHANGED
    what: str


def _margin(oversample: int, what: str, **others: Any) -> Arm:
    return Arm(strategy="noise_margin", oversample=oversample, what=what, **others)


def _cheap(base: RunSettings) -> dict[str, Any]:
    """Make candidates in two thirds of the passes by a second-order solver, and evaluate as in every arm."""
    return {"solver": "dpm2", "eval_solver": "euler", "steps": 2 * base.rollout.steps // 3}


def _fast(base: RunSettings) -> Changes:
    """Take cheap steps: few passes per candidate, and half as many candidates trained."""
    return {"rollout": _cheap(base), "selection": {"keep": base.selection.keep // 2}}


def _sol_rl(base: RunSettings) -> Changes:
    return {"rollout": {"draft": "ode", "draft_steps": 2 * base.rollout.steps // 3}}


def _fast_sol_rl(base: RunSettings) -> Changes:
    cheap = _cheap(base)
    return {"rollout": {**cheap, "draft_steps": cheap["steps"] // 2}}


FAST: Final[Mapping[str, Any]] = {"objective": "nft", "changes": _fast}
"""The objective and the changes of all arms of cheap steps."""


def _keys(**keys: Any) -> Changes:
    return {"learner": {"objective": {"name": "nft", **keys}}}


NFT_VARIANTS: Final[Mapping[str, tuple[str, Changes]]] = {
    "own_noise": ("every candidate with its own noise in the learner", _keys(shared_noise="none")),
    "pairs": ("best and worst share the learner's noise in pairs", _keys(shared_noise="pair")),
    "ranks": ("rewards as ranks within the prompt", {"selection": {"advantages": "ranks"}}),
    "group": ("rewards normalised within the prompt", {"selection": {"advantages": "candidates"}}),
    "clip5": ("rewards cut at five standard deviations, not one", _keys(reward_clip=5.0)),
}
"""Other rewards and noises of nft's margin selection: the suffix of the arm, what it is, and its changes."""


def _objective(name: str) -> dict[str, Arm]:
    """Build the arms of an objective on the forward process: alone, with random selection, with margin."""
    return {
        name: Arm(strategy="all", objective=name, what=f"{name}, every candidate trained on"),
        f"{name}_random_2x": Arm(
            strategy="random", oversample=2, objective=name, what=f"control: {name}, a random half of 2x"
        ),
        f"{name}_margin_2x": _margin(2, f"{name}, widest margins of 2x candidates", objective=name),
    }


ARMS: Final[dict[str, Arm]] = {
    BASELINE: Arm(strategy="all", what="every candidate trained on"),
    "random_2x": Arm(strategy="random", oversample=2, what="control: a random half of 2x candidates"),
    "all_2x": Arm(strategy="all", oversample=2, what="control: 2x candidates, all trained on"),
    "noise_margin_2x": _margin(2, "widest margins of 2x candidates"),
    "noise_margin_4x": _margin(4, "widest margins of 4x candidates"),
    "noise_margin_2x_rms": _margin(2, "2x, advantages as large as the baseline's", rms_match=True),
    "noise_margin_4x_rms": _margin(4, "4x, advantages as large as the baseline's", rms_match=True),
    "noise_margin_2x_fixed_rollout": _margin(2, "2x candidates, half the prompts", mode="fixed_rollout"),
    "noise_margin_4x_fixed_rollout": _margin(4, "4x candidates, quarter the prompts", mode="fixed_rollout"),
    "max_variance_2x": Arm(strategy="max_variance", oversample=2, what="most varied half of 2x (PODS)"),
    "global_margin_2x": Arm(strategy="global_margin", oversample=2, what="widest margins of the batch"),
    "prompt_filter_2x": Arm(strategy="prompt_filter", oversample=2, what="2x prompts, the most varied half"),
    "screened_4x": Arm(strategy="all", drafts=4, what="4x begun, the most promising 1x finished"),
    "screened_4x_margin_2x": _margin(2, "4x begun, 2x finished, widest margins of them", drafts=4),
    "screened_4x_global_2x": Arm(
        strategy="global_margin", oversample=2, drafts=4, what="4x begun, 2x finished, widest of the batch"
    ),
    "flowgrpo_4u": Arm(
        strategy="all",
        changes=_always({"learner": {"updates": 4}}),
        what="control: as many optimizer steps per batch as nft",
    ),
    "flowgrpo_early": Arm(
        strategy="all", early=True, what="control: noise and training in the first half of steps"
    ),
    "noise_margin_2x_early": _margin(2, "2x margin, noise and training in the first half", early=True),
    "screened_4x_margin_2x_early": _margin(
        2, "4x begun, 2x finished, noise and training in the first half", drafts=4, early=True
    ),
    **_objective("nft"),
    **_objective("awm"),
    **_objective("dpo"),
    "nft_all_2x": Arm(
        strategy="all",
        oversample=2,
        objective="nft",
        what="control: nft, 2x candidates, all trained on, each weighted by its advantage",
    ),
    **{
        f"nft_margin_2x_{suffix}": _margin(
            2, f"nft, 2x margin, {what}", objective="nft", changes=_always(changes)
        )
        for suffix, (what, changes) in NFT_VARIANTS.items()
    },
    "nft_fast": _margin(2, "nft, the widest quarter of 2x candidates, cheap steps", **FAST),
    "nft_fast_random": Arm(
        strategy="random", oversample=2, what="control: nft, a random quarter of 2x, cheap steps", **FAST
    ),
    "nft_fast_sol_rl": Arm(
        strategy="all",
        drafts=4,
        objective="nft",
        changes=_fast_sol_rl,
        what="Sol-RL in cheap steps: 4x drafted by an ODE of half of them, best and worst regenerated",
    ),
    "nft_adaptive_2x": _margin(
        2,
        "nft, 2x margin, half of the noise allotted to prompts of narrow margins",
        objective="nft",
        changes=lambda base: {"selection": {"adaptive": base.selection.keep}},
    ),
    "nft_margin_4x": _margin(4, "nft, widest margins of 4x candidates", objective="nft"),
    "nft_sol_rl": Arm(
        strategy="all",
        drafts=4,
        objective="nft",
        changes=_sol_rl,
        what="Sol-RL: 4x drafted by an ODE of two thirds of the steps, best and worst regenerated, nft",
    ),
    "nft_drafts_4x_margin_2x": _margin(
        2, "nft, 4x drafted half-way, 2x finished, widest margins of them", drafts=4, objective="nft"
    ),
}
"""Every arm by its name on the command line."""

RETIRED: Final[Mapping[str, str]] = {
    "branched_2x": "2x as 4 paths from each initial noise",
    "antithetic_2x": "2x, initial noises in opposite pairs",
}
"""Descriptions of arms that were measured and then removed, since they did not improve learning."""


def arm_settings(name: str, base: RunSettings) -> RunSettings:
    """Apply an arm to a preset; the baseline samples and keeps the preset's ``selection.keep``.

    Raises:
        UserError: if the arm is unknown, or its budget does not fit the preset.
    """
    if name in RETIRED:
        raise UserError(f"arms: {name} was removed after version 0.1.0; its finished runs are still reported")
    if name not in ARMS:
        raise UserError(f"arms: no arm {name!r}; arms are {', '.join(ARMS)}")
    arm = ARMS[name]
    if base.learner.objective.name != BASE_OBJECTIVE:
        raise UserError(
            f"learner.objective.name: got {base.learner.objective.name!r}, but arms change a preset of "
            f"{BASE_OBJECTIVE}, their baseline, such as shapes, words or preference"
        )
    try:
        budget = _budget(arm, base.groups_per_step, base.selection.keep)
        chosen = {
            "candidates": budget.candidates,
            "keep": budget.keep,
            "strategy": arm.strategy,
            "rms_match": arm.rms_match,
        }
        values = base.model_dump()
        values["selection"] |= chosen | {"drafts": arm.drafts * base.selection.keep}
        if arm.drafts:
            values["rollout"]["draft_steps"] = base.rollout.steps // 2
        if arm.early:
            values["rollout"]["window_stop"] = base.rollout.steps // 2
        if arm.objective != BASE_OBJECTIVE:
            values["learner"]["objective"] = {"name": arm.objective}
        for changes in (FORWARD if arm.objective != BASE_OBJECTIVE else {}, arm.changes(base)):
            for section, changed in changes.items():
                values[section] |= changed
        return RunSettings.model_validate(values | {"groups_per_step": budget.groups})
    except ValueError as error:
        raise UserError(f"arm {name}: {error}") from None


def describe_arm(name: str) -> str:
    """Describe an arm, also a retired one, in a few words; empty if it is unknown."""
    return ARMS[name].what if name in ARMS else RETIRED.get(name, "")


def _budget(arm: Arm, groups: int, candidates: int) -> Budget:
    times = arm.oversample
    if arm.strategy == "all":
        return Budget(groups=groups, candidates=times * candidates, keep=times * candidates)
    if arm.strategy == "prompt_filter":  # oversamples prompts, not noise
        if candidates % times:
            raise ValueError(f"a filter that keeps 1 of {times} prompts needs selection.keep to divide by it")
        return Budget(groups=times * groups, candidates=candidates, keep=candidates // times)
    return plan_budget(arm.mode, groups=groups, candidates=candidates, oversample=times)
