"""The held-out images: their prompts and noise."""

from __future__ import annotations

from typing import Any

from cluster.record.held_out import held_out
from tests.support.fake_stages import PROMPTS


def test_held_out_noise_is_fixed_and_everyones_own(configure: Any) -> None:
    drawn = held_out(PROMPTS, configure(eval_samples=3))
    assert {(prompt.index, sample) for prompt, sample, _ in drawn} == {
        (p, s) for p in range(5) for s in range(3)
    }
    seeds = {noise.initial for _, _, noise in drawn}
    assert len(seeds) == len(drawn) == 15
    assert drawn == held_out(PROMPTS, configure(eval_samples=3, steps=9))
    assert not seeds & {noise.initial for _, _, noise in held_out(PROMPTS, configure(eval_samples=3, seed=1))}
