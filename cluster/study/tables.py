"""The tables of the study, with the same cells in a terminal, in RESULTS.md and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np

from cluster.report.numbers import MISSING, show
from cluster.study.arms import describe_arm
from cluster.study.designs import DraftKey, Gradients, Variance
from cluster.study.results import ArmRun, Compared, Runs
from cluster.study.sheet import Sheet, bounded, difference, interval, percent, ratio, share_of, with_error
from selection.analysis.screening import Agreement
from selection.analysis.variance import COMPONENTS

MEANING: Final[Mapping[str, str]] = {
    "prompt": "difficulty of the prompt; removed when advantages are centred by prompt",
    "initial": "noise that is good or bad under every prompt; state, so no credit to the policy",
    "interaction": "noise that suits this prompt; also state, a source of contrast but not of credit",
    "path": "noise of the SDE: the policy's own action, the part that the gradient can credit",
}
"""The meaning of each component of the variance for learning."""

_WITHOUT_PATH: Final = {
    "initial": "noise that is good or bad under every prompt",
    "interaction": "noise that suits this prompt: here it is the candidate",
    "path": "nothing: the same noise is the same image",
}
_DRAFTS: Final = {"path": "clean image predicted on its path", "ode": "short ODE of the same noise"}

SPEED_AXES: Final = ("steps", "trained", "sampled", "compute", "cpu_seconds")
_PUBLISHED: Final = (
    ("noise margin, 2x", "steps to the baseline's final PickScore", "2.2 times fewer", "noise_margin_2x"),
    ("prompt filter, 2x", "steps to the baseline's final PickScore", "much less", "prompt_filter_2x"),
)


def variance_sheet(result: Variance) -> Sheet:
    """Tabulate the components of the reward's variance with 95% intervals."""
    prompts, initial, paths = result.design
    ode = result.dynamics == "ode"
    what = "repetitions by the ODE" if ode else "SDE paths"
    dropped = f" {result.dropped} prompts with missing rewards were excluded." if result.dropped else ""
    return Sheet(
        title="Variance of the reward without a path" if ode else "Variance of the reward",
        note=f"{prompts} prompts x {initial} initial noises x {paths} {what}, 95% intervals.{dropped}",
        header=("component", "variance", "share", "share after group normalisation", "what it means"),
        rows=tuple(
            (
                name,
                bounded(result.raw[name].variance, result.raw[name].low, result.raw[name].high),
                share_of(result.raw[name]),
                share_of(result.normalised[name]),
                ({**MEANING, **_WITHOUT_PATH} if ode else MEANING)[name],
            )
            for name in COMPONENTS
        ),
    )


def gradient_sheet(gradients: Gradients) -> Sheet:
    """Tabulate the parts of the policy gradients' covariance, with the signal-to-noise ratio of each."""
    split = gradients.split
    between, within = max(split.between.value, 0.0), split.within.value
    rows = [
        ("between prompts", with_error(split.between), percent(between / (between + within)),
         show(split.snr_between), show(max(split.noise_between, 0.0))),
        ("within prompts", with_error(split.within), percent(within / (between + within)),
         show(split.snr_within), show(split.noise_within)),
    ]  # fmt: skip
    rows += [
        (f"of it by {name}", MISSING, percent(gradients.shares[name]), MISSING, MISSING)
        for name in COMPONENTS[1:]
    ]
    return Sheet(
        title="Covariance of the policy gradient",
        note=(
            f"{split.prompts} prompts x {split.candidates} trajectories, advantages normalised by group; "
            "signal to noise is the squared mean gradient over the trace; the last column is the rest of "
            "the trace in the mean of all these; ± 2 standard errors over prompts."
        ),
        header=("part", "trace", "share", "signal to noise", "in the mean"),
        rows=(*rows, ("mean gradient, squared", with_error(split.signal), MISSING, MISSING, MISSING)),
    )


def rank_sheet(gradients: Gradients) -> Sheet:
    """Tabulate the gradients of pairs of candidates, by the rank of their margin."""
    ranks = gradients.ranks
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


def draft_sheet(agreements: Mapping[DraftKey, Agreement], dynamics: str) -> Sheet:
    """Tabulate how well the reward of a draft predicts the final one, by kind and cost."""
    prompts = max(agreement.prompts for agreement in agreements.values())
    return Sheet(
        title="Drafts of an ODE's candidates" if dynamics == "ode" else "Drafts of stochastic candidates",
        note=(
            f"{prompts} prompts; rank correlation within a prompt, and how much of the final contrast of "
            "best and worst half is captured when the halves are chosen by draft; 95% intervals."
        ),
        header=("draft", "passes", "sigma", "rank correlation", "contrast captured"),
        rows=tuple(
            (
                _DRAFTS[kind],
                str(passes),
                show(sigma),
                interval(agreement.correlation),
                interval(agreement.captured),
            )
            for (kind, passes, sigma), agreement in agreements.items()
        ),
    )


def speed_sheet(compared: Sequence[Compared]) -> Sheet:
    """Tabulate by what factor each arm reaches the baseline's final score sooner or more cheaply."""
    return Sheet(
        title="To the baseline's final held-out score",
        note=(
            "Ratios, baseline over arm, above 1 is better: geometric mean over seeds, paired, with bootstrap "
            "95% intervals. A ratio marked ≤ counts seeds that never reached it as the whole run."
        ),
        header=("arm", "reached", *(axis.replace("_", " ") for axis in SPEED_AXES)),
        rows=tuple(
            (
                arm.arm,
                f"{arm.speedups['steps'].reached} of {arm.seeds}" if arm.speedups else f"0 of {arm.seeds}",
                *(ratio(arm.speedups.get(axis)) for axis in SPEED_AXES),
            )
            for arm in compared
        ),
    )


def final_sheet(compared: Sequence[Compared]) -> Sheet:
    """Tabulate the final held-out metrics and their differences from the baseline's."""
    names = list(compared[0].finals)
    return Sheet(
        title="Final held-out metrics",
        note=(
            "Mean of the last three evaluations and, in brackets, the paired difference from the baseline "
            "with its 95% interval. Strict and single rewards beside the trained one, and how much images "
            "of one prompt differ (diversity), are the checks for reward hacking."
        ),
        header=("arm", *(name.removeprefix("eval_") for name in names)),
        rows=tuple((arm.arm, *(_final(arm, name) for name in names)) for arm in compared),
    )


def ledger_sheet(runs: Runs) -> Sheet:
    """Tabulate the counted cost of a step of each arm."""
    names = ("sampled", "trained", "forwards", "backwards", "decodes", "scores")
    return Sheet(
        title="Compute per step",
        note="Means over steps and seeds; passes are rows of the transformer. Evaluation is not included.",
        header=("arm", *names, "seconds", "CPU seconds", "what"),
        rows=tuple(
            (
                arm,
                *(show(round(_per_step(seeds, name))) for name in names),
                show(_seconds(seeds, "seconds")),
                show(_seconds(seeds, "cpu_seconds")),
                describe_arm(arm) or MISSING,
            )
            for arm, seeds in runs.items()
        ),
    )


def tuning_sheet(tuned: Mapping[float, Runs], runs: Runs) -> Sheet:
    """Tabulate the final reward of every arm with every tried learning rate, and the chosen rate."""
    arms = [arm for arm in runs if any(arm in tried for tried in tuned.values())]
    return Sheet(
        title="Learning rates",
        note=(
            "Final held-out reward on the first seed; every arm, the baseline included, keeps the rate with "
            "the highest one."
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
    """Tabulate the published figures beside ours."""
    tasks = {task: {arm.arm: arm for arm in arms} for task, arms in compared.items()}
    rows = [
        (what, measure, theirs, *(_ours(arms.get(arm)) for arms in tasks.values()))
        for what, measure, theirs, arm in _PUBLISHED
    ]
    last = ("noise margin, 2x", "final PickScore, against FlowGRPO's", "23.14 against 22.92")
    ours = tuple(_gain(arms.get("noise_margin_2x")) for arms in tasks.values())
    return Sheet(
        title="Published, and ours",
        note="Theirs: SD3.5-M, PickScore, one run. Ours: bundled tasks; ratios and differences as above.",
        header=("what", "measure", "published", *tasks),
        rows=(*rows, (*last, *ours)),
    )


def _ours(arm: Compared | None) -> str:
    return ratio(arm.speedups.get("steps")) if arm else MISSING


def _gain(arm: Compared | None) -> str:
    return difference(arm.differences["eval_reward"]) if arm else MISSING


def _per_step(seeds: Mapping[int, ArmRun], name: str) -> float:
    return float(np.mean([row[name] for run in seeds.values() for row in run.rows[1:]]))


def _seconds(seeds: Mapping[int, ArmRun], clock: str) -> float:
    return sum(_per_step(seeds, f"{clock}_{stage}") for stage in ("sample", "score", "learn"))


def _final(arm: Compared, name: str) -> str:
    return f"{show(arm.finals[name])} ({difference(arm.differences[name])})"
