"""The metrics of a step, as displays get them."""

from __future__ import annotations

METRICS = {
    "step": 4, "reward_mean": 0.51234, "margin_mean": 0.25, "seconds_step": 3.21, "seconds_sample": 1.04,
    "seconds_score": 0.5, "seconds_select": 0.0, "seconds_learn": 1.6, "seconds_broadcast": 0.12,
}  # fmt: skip
EVALUATED = {**METRICS, "eval_reward": 0.75, "eval_strict": 0.5}
