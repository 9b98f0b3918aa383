"""The findings of a comparison: numbers computed from it, and a sentence for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.study.arms import BASELINE, NFT_VARIANTS
from cluster.study.results import Compared, Runs, cost_gain, final_gains
from cluster.study.sheet import difference, gained, ratio
from selection.analysis.speedup import Speedup

MARGIN: Final = "noise_margin_2x"
NFT: Final = "nft_margin_2x"
SOL_RL: Final = {"nft_sol_rl": "as published", "nft_fast_sol_rl": "in cheap steps"}
"""The arms of Sol-RL's recipe, and how each makes candidates."""
CHEAP: Final = "nft_fast"
PUBLISHED: Final = 2.2
"""The published ratio of steps of 2x noise margin."""

Arms = Mapping[str, Compared]


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to a question of the study: its name, the numbers that decide it, and a sentence."""

    about: str
    numbers: Mapping[str, Any]
    sentence: str


def findings(compared: Mapping[str, Sequence[Compared]], runs: Mapping[str, Runs]) -> list[Finding]:
    """Answer each question from the runs of every task, skipping questions without runs."""
    tasks = {task: {arm.arm: arm for arm in arms} for task, arms in compared.items()}
    answers = [
        _margin(tasks),
        _against(tasks, runs, "random_2x", "a random half of the same candidates, the control"),
        _against(tasks, runs, "prompt_filter_2x", "the prompt filter at equal samples"),
        _fixed_rollout(tasks),
        _early(tasks, runs),
        *(_forward(tasks, runs, name) for name in ("nft", "awm", "dpo")),
        _cheap(tasks, runs),
        *(_variant(runs, f"{NFT}_{suffix}", what) for suffix, (what, _) in NFT_VARIANTS.items()),
        _variant(runs, "nft_all_2x", "twice the training, on all of them, each weighted by its advantage"),
        _best(tasks, "steps"),
        _best(tasks, "compute"),
        _best(tasks, "cpu_seconds"),
        *(_against_sol_rl(tasks, runs, rival) for rival in SOL_RL),
        _hacking(tasks),
    ]
    return [answer for answer in answers if answer]


def _margin(tasks: Mapping[str, Arms]) -> Finding | None:
    found = _ratios(tasks, MARGIN, "steps")
    if not found:
        return None
    sure = _count(found, lambda speedup: speedup.ratio.low > 1)
    inside = _count(found, lambda speedup: speedup.ratio.low <= PUBLISHED <= speedup.ratio.high)
    return Finding(
        "margin",
        {"above one": sure, "contain the published": inside, "of": len(found)},
        "2x noise margin with as much training reaches FlowGRPO's final held-out score in fewer steps, by a "
        f"factor of {_each(found)}: the interval is above 1 on {sure} of {len(found)} comparisons, "
        f"and contains the published {PUBLISHED} on {inside} of {len(found)} comparisons.",
    )


def _against(tasks: Mapping[str, Arms], runs: Mapping[str, Runs], arm: str, what: str) -> Finding | None:
    theirs, ours = _ratios(tasks, arm, "steps"), _ratios(tasks, MARGIN, "steps")
    both = {task: ours[task] for task in theirs if task in ours}
    if not both:
        return None
    apart = sum(ours[task].ratio.low > theirs[task].ratio.high for task in both)
    ahead = sum(ours[task].ratio.value > theirs[task].ratio.value for task in both)
    ends, higher, _ = _paired({task: runs[task] for task in both}, MARGIN, arm)
    return Finding(
        f"against {arm}",
        {"ahead": ahead, "apart": apart, "higher": higher, "of": len(both)},
        f"For {what}, the ratio is {_each(theirs)}. 2x noise margin is ahead of it on {ahead} of {len(both)} "
        f"comparisons, with intervals apart on {apart}; paired by seed it ends {ends}, higher beyond the "
        f"interval on {higher}.",
    )


def _fixed_rollout(tasks: Mapping[str, Arms]) -> Finding | None:
    arm = f"{MARGIN}_fixed_rollout"
    ends = {task: arms[arm].differences["eval_reward"] for task, arms in tasks.items() if arm in arms}
    if not ends:
        return None
    worse = sum(end.high < 0 for end in ends.values())
    gains = ", ".join(f"{difference(end)} on {task}" for task, end in ends.items())
    return Finding(
        "fixed rollout",
        {"worse": worse, "of": len(ends)},
        f"With no more samples than FlowGRPO and half the training, 2x noise margin ends {gains} (worse "
        f"beyond its interval on {worse} of {len(ends)} comparisons) and needs less compute to FlowGRPO's "
        f"final score, by a factor of {_each(_ratios(tasks, arm, 'compute'))}.",
    )


def _early(tasks: Mapping[str, Arms], runs: Mapping[str, Runs]) -> Finding | None:
    arm, control = "screened_4x_margin_2x_early", f"{BASELINE}_early"
    steps = _ratios(tasks, arm, "steps")
    ends, higher, count = _paired({task: runs[task] for task in steps}, arm, control)
    if not count:
        return None
    return Finding(
        "early",
        {"higher": higher, "of": count},
        "With noise and training in the first half of the steps only, and the widest margins of 4x drafted "
        f"and 2x finished candidates, fewer steps are needed by a factor of {_each(steps)}, and less compute "
        f"by {_each(_ratios(tasks, arm, 'compute'))}. FlowGRPO confined alike, the control, needs less by "
        f"{_each(_ratios(tasks, control, 'compute'))}; paired by seed, selection ends {ends} from it, "
        f"higher beyond the interval on {higher} of {count} comparisons.",
    )


def _forward(tasks: Mapping[str, Arms], runs: Mapping[str, Runs], name: str) -> Finding | None:
    margin, control = f"{name}_margin_2x", f"{name}_random_2x"
    alone, chosen = _ratios(tasks, name, "compute"), _ratios(tasks, margin, "compute")
    ends, higher, count = _paired(runs, margin, control)
    if not (alone and chosen and count):
        return None
    return Finding(
        name,
        {"higher": higher, "of": count},
        f"With the objective {name} on candidates of an ODE, FlowGRPO's final score takes less compute by "
        f"{_each(alone)}, and with 2x noise margin by {_each(chosen)}. Paired by seed, margin ends {ends} "
        "from a random half of the same candidates, with as many samples and as much training: higher beyond "
        f"the interval on {higher} of {count} comparisons.",
    )


def _variant(runs: Mapping[str, Runs], arm: str, what: str) -> Finding | None:
    ends, higher, count = _paired(runs, NFT, arm)
    if not count:
        return None
    return Finding(
        f"against {arm}",
        {"higher": higher, "of": count},
        f"Against {what}, nft on the widest margins of 2x candidates ends {ends}: higher beyond the "
        f"interval on {higher} of {count} comparisons.",
    )


def _cheap(tasks: Mapping[str, Arms], runs: Mapping[str, Runs]) -> Finding | None:
    ends, higher, count = _paired(runs, CHEAP, f"{CHEAP}_random")
    costs = _ratios(tasks, CHEAP, "compute")
    if not (costs and count):
        return None
    return Finding(
        CHEAP,
        {"higher": higher, "of": count},
        "With the widest quarter of 2x candidates, nft in cheap steps takes less compute to FlowGRPO's final "
        f"score by {_each(costs)}. Paired by seed it ends {ends} from a random quarter of the same "
        f"candidates: higher beyond the interval on {higher} of {count} comparisons.",
    )


def _against_sol_rl(tasks: Mapping[str, Arms], runs: Mapping[str, Runs], rival: str) -> Finding | None:
    others = {task: {n: arm for n, arm in arms.items() if n not in SOL_RL} for task, arms in tasks.items()}
    gains = {
        task: (arm.arm, gain)
        for task, arms in others.items()
        if (arm := _fastest(arms, "compute")) and (gain := cost_gain(runs[task], arm.arm, rival, "compute"))
    }
    if not gains:
        return None
    less = sum(gain.sure for _, gain in gains.values())
    each = ", ".join(f"{gained(gain)} on {task} ({arm})" for task, (arm, gain) in gains.items())
    return Finding(
        f"against Sol-RL {SOL_RL[rival]}",
        {"less": less, "of": len(gains)},
        f"Sol-RL's recipe {SOL_RL[rival]} (4x drafted by a short ODE, best and worst regenerated, nft) takes "
        f"more compute to FlowGRPO's final score than the arm with the least, by {each}: beyond the interval "
        f"on {less} of {len(gains)} comparisons.",
    )


def _best(tasks: Mapping[str, Arms], axis: str) -> Finding | None:
    best = {task: arm for task, arms in tasks.items() if (arm := _fastest(arms, axis))}
    if not best:
        return None
    named = [f"{arm.arm} on {task} ({ratio(arm.speedups[axis])})" for task, arm in best.items()]
    opening = (
        f"The best ratio of {axis.replace('_', ' ')}, without more training per step and reached on all seeds"
    )
    arms = {task: arm.arm for task, arm in best.items()}
    return Finding(f"best {axis}", arms, f"{opening}: {', '.join(named)}.")


def _hacking(tasks: Mapping[str, Arms]) -> Finding | None:
    checks = []
    for task, arms in tasks.items():
        if fastest := _fastest(arms, "compute"):
            checks += [
                f"{name.removeprefix('eval_')} {difference(gain)} on {task}"
                for name, gain in fastest.differences.items()
                if name != "eval_reward"
            ]
    if not checks:
        return None
    sentence = f"Independent checks of the arm with the least compute, against FlowGRPO: {', '.join(checks)}."
    return Finding("independent checks", {"of": len(checks)}, sentence)


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


def _count(found: Mapping[str, Speedup], holds: Callable[[Speedup], bool]) -> int:
    return sum(map(holds, found.values()))


def _each(found: Mapping[str, Speedup]) -> str:
    return ", ".join(f"{ratio(speedup)} on {task}" for task, speedup in found.items())
