"""The study's tables: the same cells on the terminal, in RESULTS.md and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from cluster.report.numbers import MISSING, show
from cluster.study.arms import what_differs
from cluster.study.designs import Gradients, PreviewKey, Variance
from cluster.study.results import ArmRun, Compared, Runs
from cluster.study.sheet import Sheet, bounded, difference, erring, interval, percent, ratio, share_of
from selection.analysis.screening import Agreement
from selection.analysis.variance import COMPONENTS

MEANING: Final[Mapping[str, str]] = {
    "prompt": "which prompt it is; gone once advantages are centred by prompt",
    "initial": "noise that is good or bad under every prompt; state, so no credit to the policy",
    "interaction": "noise that suits this prompt; state too, a source of contrast but not of credit",
    "path": "what the SDE drew: the policy's own action, the part that the gradient can credit",
}
"""What each component of the variance means for learning."""

_PREVIEWS: Final = {"path": "clean image predicted on the SDE's path", "ode": "short ODE of the same noise"}

SPEED_AXES: Final = ("steps", "trained", "sampled", "compute", "cpu_seconds")
_PUBLISHED: Final = (
    ("noise margin, 2x", "steps to the baseline's final PickScore", "2.2 times fewer", "noise_margin_2x"),
    ("prompt filter, 2x", "steps to the baseline's final PickScore", "much less", "prompt_filter_2x"),
)


def variance_sheet(found: Variance) -> Sheet:
    """The components of the reward's variance with 95% intervals."""
    prompts, initial, paths = found.design
    dropped = f" {found.dropped} prompts with missing rewards were left out." if found.dropped else ""
    return Sheet(
        title="Variance of the reward",
        note=f"{prompts} prompts x {initial} initial noises x {paths} SDE paths, 95% intervals.{dropped}",
        header=("component", "variance", "share", "share after group normalisation", "what it means"),
        rows=tuple(
            (
                name,
                bounded(found.raw[name].variance, found.raw[name].low, found.raw[name].high),
                share_of(found.raw[name]),
                share_of(found.normalised[name]),
                MEANING[name],
            )
            for name in COMPONENTS
        ),
    )


def gradient_sheet(found: Gradients) -> Sheet:
    """How the covariance of policy gradients splits, and how much signal stands against each part."""
    split = found.split
    between, within = max(split.between.value, 0.0), split.within.value
    rows = [
        ("between prompts", erring(split.between), percent(between / (between + within)),
         show(split.snr_between), show(max(split.noise_between, 0.0))),
        ("within prompts", erring(split.within), percent(within / (between + within)),
         show(split.snr_within), show(split.noise_within)),
    ]  # fmt: skip
    rows += [
        (f"of it by {name}", MISSING, percent(found.shares[name]), MISSING, MISSING)
        for name in COMPONENTS[1:]
    ]
    return Sheet(
        title="Covariance of the policy gradient",
        note=(
            f"{split.prompts} prompts x {split.candidates} trajectories, advantages normalised by group; "
            "signal to noise is the squared mean gradient over the trace; the last column is what is left of "
            "the trace in the mean of all these; ± 2 standard errors over prompts."
        ),
        header=("part", "trace", "share", "signal to noise", "in the mean"),
        rows=(*rows, ("mean gradient, squared", erring(split.signal), MISSING, MISSING, MISSING)),
    )


def rank_sheet(found: Gradients) -> Sheet:
    """What pairs of candidates say, by the rank of their margin."""
    ranks = found.ranks
    return Sheet(
        title="Which candidates carry the gradient",
        note="Nested pairs, widest first; cosine with the mean gradient of the other prompts, ± 2 errors.",
        header=("margin rank", "pairs", "mean margin", "cosine", "share of the gradient"),
        rows=tuple(
            (
                str(place + 1),
                show(int(ranks.pairs[place])),
                show(float(ranks.margin[place])),
                f"{show(float(ranks.cosine[place]))} ± {show(2 * float(ranks.cosine_error[place]))}",
                percent(float(ranks.aligned[place])),
            )
            for place in range(len(ranks.cosine))
        ),
    )


def preview_sheet(found: Mapping[PreviewKey, Agreement]) -> Sheet:
    """How well the reward of a preview tells the final one, by kind and cost."""
    prompts = max(one.prompts for one in found.values())
    return Sheet(
        title="Screening by preview",
        note=(
            f"{prompts} prompts; rank correlation within a prompt, and how much of the final contrast of "
            "best and worst half is captured when the halves are chosen by preview; 95% intervals."
        ),
        header=("preview", "passes", "sigma", "rank correlation", "contrast captured"),
        rows=tuple(
            (_PREVIEWS[kind], str(passes), show(sigma), interval(one.correlation), interval(one.captured))
            for (kind, passes, sigma), one in found.items()
        ),
    )


def speed_sheet(compared: Sequence[Compared]) -> Sheet:
    """How many times sooner or cheaper each arm reaches the baseline's final score."""
    return Sheet(
        title="To the baseline's final held-out score",
        note=(
            "Ratios, baseline over arm, above 1 is better: geometric mean over seeds, paired, with bootstrap "
            "95% intervals. A ratio marked ≤ counts seeds that never got there (reached) as the whole run."
        ),
        header=("arm", "reached", *(axis.replace("_", " ") for axis in SPEED_AXES)),
        rows=tuple(
            (
                one.arm,
                f"{one.speedups['steps'].reached} of {one.seeds}" if one.speedups else f"0 of {one.seeds}",
                *(ratio(one.speedups.get(axis)) for axis in SPEED_AXES),
            )
            for one in compared
        ),
    )


def final_sheet(compared: Sequence[Compared]) -> Sheet:
    """Final held-out figures and their differences from the baseline's."""
    names = list(compared[0].finals)
    return Sheet(
        title="Final held-out figures",
        note=(
            "Mean of the last three evaluations and, in brackets, the paired difference from the baseline "
            "with its 95% interval. Strict and single rewards beside the trained one, and how much images "
            "of one prompt differ (diversity), are the checks for reward hacking."
        ),
        header=("arm", *(name.removeprefix("eval_") for name in names)),
        rows=tuple((one.arm, *(_final(one, name) for name in names)) for one in compared),
    )


def ledger_sheet(runs: Runs) -> Sheet:
    """What a step of each arm costs, counted."""
    names = ("sampled", "trained", "forwards", "backwards", "decodes", "scores")
    return Sheet(
        title="Compute per step",
        note="Counted, means over steps and seeds; passes are rows of the transformer. Evaluation is extra.",
        header=("arm", *names, "seconds", "CPU seconds", "what"),
        rows=tuple(
            (
                arm,
                *(show(round(_per_step(seeds, name))) for name in names),
                show(_seconds(seeds, "seconds")),
                show(_seconds(seeds, "cpu_seconds")),
                what_differs(arm) or MISSING,
            )
            for arm, seeds in runs.items()
        ),
    )


def tuning_sheet(tuned: Mapping[float, Runs], runs: Runs) -> Sheet:
    """The final reward of every arm with the learning rates it was tried with, and the one it kept."""
    arms = [arm for arm in runs if any(arm in tried for tried in tuned.values())]
    return Sheet(
        title="Learning rates",
        note=(
            "Final held-out reward on the first seed; every arm keeps the rate with which it ends highest, "
            "the baseline as well."
        ),
        header=("arm", *(f"{rate:g}" for rate in tuned), "kept"),
        rows=tuple(
            (
                arm,
                *(
                    "; ".join(show(run.final) for run in tried.get(arm, {}).values()) or MISSING
                    for tried in tuned.values()
                ),
                ", ".join(sorted({f"{run.learning_rate:g}" for run in runs[arm].values()})),
            )
            for arm in arms
        ),
    )


def published_sheet(compared: Mapping[str, Sequence[Compared]]) -> Sheet:
    """The published figures beside ours."""
    found = {task: {one.arm: one for one in arms} for task, arms in compared.items()}
    rows = [
        (what, measure, theirs, *(_ours(arms.get(arm)) for arms in found.values()))
        for what, measure, theirs, arm in _PUBLISHED
    ]
    last = ("noise margin, 2x", "final PickScore, against FlowGRPO's", "23.14 against 22.92")
    ours = tuple(_gain(arms.get("noise_margin_2x")) for arms in found.values())
    return Sheet(
        title="Published, and ours",
        note="Theirs: SD3.5-M, PickScore, one run. Ours: bundled tasks; ratios and differences as above.",
        header=("what", "measure", "published", *found),
        rows=(*rows, (*last, *ours)),
    )


def _ours(one: Compared | None) -> str:
    return ratio(one.speedups.get("steps")) if one else MISSING


def _gain(one: Compared | None) -> str:
    return difference(one.differences["eval_reward"]) if one else MISSING


def _per_step(seeds: Mapping[int, ArmRun], name: str) -> float:
    return float(np.mean([row[name] for run in seeds.values() for row in run.rows[1:]]))


def _seconds(seeds: Mapping[int, ArmRun], clock: str) -> float:
    return sum(_per_step(seeds, f"{clock}_{stage}") for stage in ("sample", "score", "learn"))


def _final(one: Compared, name: str) -> str:
    return f"{show(one.finals[name])} ({difference(one.differences[name])})"
