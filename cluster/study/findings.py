"""The findings of a comparison, as sentences computed from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from cluster.study.arms import BASELINE
from cluster.study.results import Compared, Runs, final_gains
from cluster.study.sheet import difference, ratio
from selection.analysis.speedup import Speedup

MARGIN: Final = "noise_margin_2x"
SCREENED: Final = "screened_4x_margin_2x"
EARLY: Final = "_early"
"""The suffix of arms that add noise and train in the first half of the steps only."""
PUBLISHED: Final = 2.2
"""The published ratio of steps of 2x noise margin."""

Arms = Mapping[str, Compared]


def findings(compared: Mapping[str, Sequence[Compared]], runs: Mapping[str, Runs]) -> list[str]:
    """Compute a sentence or two per question from the runs of every task, skipping questions without runs."""
    tasks = {task: {arm.arm: arm for arm in arms} for task, arms in compared.items()}
    sentences = [
        _margin(tasks),
        _against(tasks, runs, "random_2x", "a random half of the same candidates, the control"),
        _against(tasks, runs, "prompt_filter_2x", "the prompt filter at equal samples"),
        _fixed_rollout(tasks),
        _screened(tasks, runs),
        _early(tasks, runs),
        _best(tasks, "steps"),
        _best(tasks, "compute"),
        _hacking(tasks),
    ]
    return [sentence for sentence in sentences if sentence]


def _margin(tasks: Mapping[str, Arms]) -> str:
    found = _ratios(tasks, MARGIN, "steps")
    if not found:
        return ""
    sure = _count(found, lambda speedup: speedup.ratio.low > 1)
    inside = _count(found, lambda speedup: speedup.ratio.low <= PUBLISHED <= speedup.ratio.high)
    return (
        "2x noise margin with as much training reaches FlowGRPO's final held-out score in fewer steps, by a "
        f"factor of {_each(found)}: the interval is above 1 on {sure}, "
        f"and contains the published {PUBLISHED} on {inside}."
    )


def _against(tasks: Mapping[str, Arms], runs: Mapping[str, Runs], arm: str, what: str) -> str:
    theirs, ours = _ratios(tasks, arm, "steps"), _ratios(tasks, MARGIN, "steps")
    both = {task: ours[task] for task in theirs if task in ours}
    if not both:
        return ""
    apart = sum(ours[task].ratio.low > theirs[task].ratio.high for task in both)
    ahead = sum(ours[task].ratio.value > theirs[task].ratio.value for task in both)
    ends, higher, _ = _paired({task: runs[task] for task in both}, MARGIN, arm)
    return (
        f"For {what}, the ratio is {_each(theirs)}. 2x noise margin is ahead of it on {ahead} of {len(both)} "
        f"comparisons, with intervals apart on {apart}; paired by seed it ends {ends}, higher beyond the "
        f"interval on {higher}."
    )


def _fixed_rollout(tasks: Mapping[str, Arms]) -> str:
    arm = f"{MARGIN}_fixed_rollout"
    ends = {task: arms[arm].differences["eval_reward"] for task, arms in tasks.items() if arm in arms}
    if not ends:
        return ""
    worse = sum(end.high < 0 for end in ends.values())
    gains = ", ".join(f"{difference(end)} on {task}" for task, end in ends.items())
    return (
        f"With no more samples than FlowGRPO and half the training, 2x noise margin ends {gains} (worse "
        f"beyond its interval on {worse} of {len(ends)} comparisons) and needs less compute to FlowGRPO's "
        f"final score, by a factor of {_each(_ratios(tasks, arm, 'compute'))}."
    )


def _screened(tasks: Mapping[str, Arms], runs: Mapping[str, Runs]) -> str:
    steps = _ratios(tasks, SCREENED, "steps")
    ends, higher, count = _paired({task: runs[task] for task in steps}, SCREENED, MARGIN)
    if not count:
        return ""
    return (
        "When 4x candidates are begun and previews choose the half that is finished, the widest margins of "
        f"these need fewer steps by a factor of {_each(steps)}, and less compute by "
        f"{_each(_ratios(tasks, SCREENED, 'compute'))}; paired by seed this ends {ends} from 2x noise "
        f"margin, higher beyond the interval on {higher} of {count} comparisons."
    )


def _early(tasks: Mapping[str, Arms], runs: Mapping[str, Runs]) -> str:
    arm, control = f"{SCREENED}{EARLY}", f"{BASELINE}{EARLY}"
    steps = _ratios(tasks, arm, "steps")
    ends, higher, count = _paired({task: runs[task] for task in steps}, arm, control)
    if not count:
        return ""
    return (
        "With noise and training in the first half of the steps only, where previews are taken when no more "
        f"noise comes, the same needs fewer steps by a factor of {_each(steps)}, and less compute by "
        f"{_each(_ratios(tasks, arm, 'compute'))}. FlowGRPO confined alike, the control, needs less compute "
        f"by {_each(_ratios(tasks, control, 'compute'))}; paired by seed, selection ends {ends} from it, "
        f"higher beyond the interval on {higher} of {count} comparisons."
    )


def _best(tasks: Mapping[str, Arms], axis: str) -> str:
    best = {task: _fastest(arms, axis) for task, arms in tasks.items()}
    named = [f"{arm.arm} on {task} ({ratio(arm.speedups[axis])})" for task, arm in best.items() if arm]
    opening = f"The best ratio of {axis}, without more training per step and reached on all seeds"
    return f"{opening}: {', '.join(named)}." if named else ""


def _hacking(tasks: Mapping[str, Arms]) -> str:
    checks = []
    for task, arms in tasks.items():
        if fastest := _fastest(arms, "steps"):
            checks += [
                f"{name.removeprefix('eval_')} {difference(gain)} on {task}"
                for name, gain in fastest.differences.items()
                if name != "eval_reward"
            ]
    return (
        f"Independent checks of the arm with the fewest steps, against FlowGRPO: {', '.join(checks)}."
        if checks
        else ""
    )


def _fastest(arms: Arms, axis: str) -> Compared | None:
    """Find the fastest arm that reached the score on every seed without more training per step."""
    able = [arm for arm in arms.values() if axis in arm.speedups and _comparable(arm)]
    return max(able, key=lambda arm: arm.speedups[axis].ratio.value, default=None)


def _comparable(arm: Compared) -> bool:
    steps, trained = arm.speedups["steps"], arm.speedups["trained"]
    return steps.reached == steps.seeds and trained.ratio.value >= 0.99 * steps.ratio.value


def _ratios(tasks: Mapping[str, Arms], arm: str, axis: str) -> dict[str, Speedup]:
    return {
        task: arms[arm].speedups[axis]
        for task, arms in tasks.items()
        if arm in arms and axis in arms[arm].speedups
    }


def _paired(runs: Mapping[str, Runs], arm: str, other: str) -> tuple[str, int, int]:
    """Describe how much higher one arm ends than another; count the tasks with certainty, and all tasks."""
    gains = {task: gain for task, known in runs.items() if (gain := final_gains(known, arm, other))}
    ends = ", ".join(f"{difference(gain)} on {task}" for task, gain in gains.items())
    return ends, sum(gain.low > 0 for gain in gains.values()), len(gains)


def _count(found: Mapping[str, Speedup], holds: Callable[[Speedup], bool]) -> str:
    return f"{sum(map(holds, found.values()))} of {len(found)} comparisons"


def _each(found: Mapping[str, Speedup]) -> str:
    return ", ".join(f"{ratio(speedup)} on {task}" for task, speedup in found.items())
