"""Objectives on the forward process: losses and gradients by hand, their pairs, and what they declare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.noised import Noised
from learner.objectives.base import Models, Terms
from learner.objectives.forward_process import ForwardObjective
from learner.objectives.registry import load_objective, objective_settings
from learner.settings import LearnerSettings
from rollout.settings import RolloutSettings
from selection.records import Kept

ROWS, SIZE = 4, 3
ADVANTAGES = (2.5, -0.4, 0.7, -1.0)
"""The first one is beyond a clip of 1."""
LEVELS = (0.9, 0.2, 0.55, 0.55)
THETA = (0.7, -0.2, 0.4)
OLD = (0.5, 0.1, 0.3)
START = (0.2, 0.3, -0.1)


def velocity_of(theta: Any, x: Any, t: Any) -> Any:
    """A model of three parameters; works for numbers and for tensors."""
    return theta[0] * x + theta[1] * x * x * t + theta[2] * t


class Model:
    """A predictor with the parameters of `velocity_of`."""

    def __init__(self, theta: Sequence[float]) -> None:
        self.theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)

    def velocity(self, part: Noised) -> Tensor:
        found: Tensor = velocity_of(self.theta, part.states, part.levels)
        return found


def rows(*, old: Sequence[float] | None = OLD, clip: float = 1.0) -> Noised:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, ROWS, SIZE, generator=generator, dtype=torch.float64)
    plain = Noised(
        advantages=torch.tensor(ADVANTAGES, dtype=torch.float64).clamp(-clip, clip),
        weights=torch.full((ROWS,), 1 / ROWS),
        steps=torch.zeros(ROWS, dtype=torch.long),
        candidates=torch.arange(ROWS),
        groups=torch.zeros(ROWS, dtype=torch.long),
        embeddings={},
        clean=clean,
        noise=noise,
        sigmas=torch.tensor(LEVELS, dtype=torch.float64),
        timesteps=torch.tensor(LEVELS) * 1000,
        behaviour=torch.empty(0),
    )
    return plain if old is None else replace(plain, behaviour=Model(old).velocity(plain).detach())


def objective(name: str, **keys: Any) -> ForwardObjective:
    found = load_objective(objective_settings({"name": name, **keys}))
    assert isinstance(found, ForwardObjective)
    return found


def loss(name: str, part: Noised, theta: Sequence[float] = THETA, **keys: Any) -> tuple[Terms, Model]:
    """The terms of an objective and the model of its policy; the start policy is there if it is needed."""
    made, policy = objective(name, **keys), Model(theta)
    models: Any = Models(policy=policy, reference=Model(START) if made.needs_reference else None)  # type: ignore[arg-type]
    return made.loss(models, part), policy


def by_element(part: Noised, row: int) -> list[tuple[float, float, float, float]]:
    """The clean value, the noise, the state and the noise level of every element of a row."""
    t = LEVELS[row]
    pairs = zip(part.clean[row].tolist(), part.noise[row].tolist(), strict=True)
    return [(clean, noise, (1 - t) * clean + t * noise, t) for clean, noise in pairs]


def implicit(sign: int, old: float, policy: float, beta: float) -> float:
    """The velocity of the implicit positive policy, or of the negative one."""
    return (1 - beta) * old + beta * policy if sign > 0 else (1 + beta) * old - beta * policy


def scalar_nft(
    part: Noised, row: int, theta: Sequence[float], frozen: Sequence[float], beta: float, kl: float
) -> float:
    """DiffusionNFT's loss by numbers alone; the normalisation is that of the ``frozen`` parameters."""
    reward = min(max(ADVANTAGES[row] / 1.0 / 2 + 0.5, 0.0), 1.0)
    total, strayed = 0.0, 0.0
    for sign, weight in ((1, reward), (-1, 1 - reward)):
        squares, sizes = 0.0, 0.0
        for clean, _noise, x, t in by_element(part, row):
            old = velocity_of(OLD, x, t)

            errors = [
                x - t * implicit(sign, old, velocity_of(parameters, x, t), beta) - clean
                for parameters in (theta, frozen)
            ]
            squares += errors[0] ** 2 / SIZE
            sizes += abs(errors[1]) / SIZE
        total += weight * squares / sizes / beta
    for _clean, _noise, x, t in by_element(part, row):
        strayed += (velocity_of(theta, x, t) - velocity_of(START, x, t)) ** 2 / SIZE
    return total + kl * strayed


def scalar_awm(part: Noised, row: int, theta: Sequence[float], power: float | None, proximal: float) -> float:
    """AWM's loss by numbers alone, with a ratio that its clip of 0.1 may cut."""
    error = {"new": 0.0, "old": 0.0}
    moved = 0.0
    for clean, noise, x, t in by_element(part, row):
        new, old = velocity_of(theta, x, t), velocity_of(OLD, x, t)
        error["new"] += (new - (noise - clean)) ** 2 / SIZE
        error["old"] += (old - (noise - clean)) ** 2 / SIZE
        moved += (new - old) ** 2 / SIZE
    logs = {
        which: -value if power is None else -LEVELS[row] * (value + 1e-10) ** power / power
        for which, value in error.items()
    }
    ratio = math.exp(logs["new"] - logs["old"])
    advantage = max(-1.0, min(1.0, ADVANTAGES[row]))
    return max(-advantage * ratio, -advantage * max(0.9, min(1.1, ratio))) + proximal * moved


def scalar_dpo(part: Noised, pair: int, theta: Sequence[float], scale: float) -> float:
    """Diffusion-DPO's loss of a pair by numbers alone; its rows follow each other, the better one first."""
    gains = []
    for row in (2 * pair, 2 * pair + 1):
        gain = 0.0
        for clean, noise, x, t in by_element(part, row):
            target = noise - clean
            gain += (velocity_of(START, x, t) - target) ** 2 / SIZE
            gain -= (velocity_of(theta, x, t) - target) ** 2 / SIZE
        gains.append(gain)
    return math.log1p(math.exp(-scale / 2 * (gains[0] - gains[1])))


def slopes(value: Any) -> list[float]:
    """Finite differences of a function of the three parameters, at `THETA`."""
    found = []
    for place in range(3):
        step = 1e-6
        up, down = ([v + sign * step * (i == place) for i, v in enumerate(THETA)] for sign in (1, -1))
        found.append((value(up) - value(down)) / (2 * step))
    return found


def assert_gradient(terms: Terms, policy: Model, value: Any) -> None:
    (gradient,) = torch.autograd.grad(terms.losses.sum(), policy.theta)
    assert gradient.tolist() == pytest.approx(slopes(value), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize(("beta", "kl"), [(1.0, 0.0), (0.1, 0.0), (0.5, 0.3)])
def test_nft_is_its_formula_and_so_is_its_gradient(beta: float, kl: float) -> None:
    part = rows()
    terms, policy = loss("nft", part, strength=beta, kl_weight=kl)
    expected = [scalar_nft(part, row, THETA, THETA, beta, kl) for row in range(ROWS)]
    assert terms.losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert_gradient(
        terms, policy, lambda theta: sum(scalar_nft(part, row, theta, THETA, beta, kl) for row in range(ROWS))
    )


@pytest.mark.parametrize(("weighting", "power"), [("uniform", None), ("root", 0.5), ("quarter", 0.25)])
def test_awm_is_its_formula_and_so_is_its_gradient(weighting: str, power: float | None) -> None:
    part = rows()
    terms, policy = loss("awm", part, weighting=weighting, ratio_clip=0.1, proximal_weight=0.7)
    expected = [scalar_awm(part, row, THETA, power, 0.7) for row in range(ROWS)]
    assert terms.losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert 0 < terms.metrics["clip_fraction"].double().mean() < 1
    assert_gradient(
        terms, policy, lambda theta: sum(scalar_awm(part, row, theta, power, 0.7) for row in range(ROWS))
    )


def test_dpo_is_its_formula_and_so_is_its_gradient() -> None:
    part = rows(old=None)
    terms, policy = loss("dpo", part, draws=1, preference_scale=3.0)
    expected = [scalar_dpo(part, pair, THETA, 3.0) for pair in (0, 0, 1, 1)]
    assert terms.losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert_gradient(
        terms, policy, lambda theta: 2 * sum(scalar_dpo(part, pair, theta, 3.0) for pair in (0, 1))
    )
    assert terms.metrics["preferred"].tolist() == [
        expected[0] < math.log(2), expected[0] < math.log(2),
        expected[2] < math.log(2), expected[2] < math.log(2),
    ]  # fmt: skip


def test_dpo_pairs_the_draws_of_two_candidates() -> None:
    """With two draws, rows 0 and 1 are the better candidate's, 2 and 3 the worse one's."""
    part = rows(old=None)
    order = [0, 2, 1, 3]
    columns = [one.name for one in fields(part) if isinstance(getattr(part, one.name), Tensor)]
    moved = {name: getattr(part, name)[order] for name in columns if name != "behaviour"}
    mixed = replace(part, **moved)
    two, _ = loss("dpo", part, draws=2, preference_scale=3.0)
    one, _ = loss("dpo", mixed, draws=1, preference_scale=3.0)
    assert two.losses[order].tolist() == pytest.approx(one.losses.tolist())


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_without_known_velocities_the_policys_own_are_the_old_ones(name: str) -> None:
    fresh, policy = loss(name, rows(old=None))
    known, same = loss(name, rows(old=THETA))
    assert torch.allclose(fresh.losses, known.losses)
    assert fresh.metrics["moved"].tolist() == [0.0] * ROWS
    ours, theirs = (
        torch.autograd.grad(terms.losses.sum(), model.theta)[0]
        for terms, model in ((fresh, policy), (known, same))
    )
    assert torch.allclose(ours, theirs)


def test_at_the_behaviour_policy_the_gradient_of_nft_is_that_of_weighted_matching() -> None:
    """There the negative policy is the positive one, so a reward of a half teaches nothing."""
    part = rows(old=THETA)
    half = replace(part, advantages=torch.zeros(ROWS, dtype=torch.float64))
    terms, policy = loss("nft", half)
    (gradient,) = torch.autograd.grad(terms.losses.sum(), policy.theta)
    assert gradient.abs().max() < 1e-12


def kept(counts: Sequence[int]) -> list[Kept]:
    return [
        Kept(group_id=group, candidate=7 * place, advantage=float(place))
        for group, count in enumerate(counts)
        for place in range(count)
    ]


PAIRS = {0: [[3.0, 0.0], [2.0, 1.0]], 1: [[2.0, 0.0]], 3: [[1.0, 0.0]]}


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("dpo", {}, [(group, [pair]) for group, pairs in PAIRS.items() for pair in pairs]),
        (
            "nft",
            {"shared_noise": "pair"},
            [(0, PAIRS[0]), (1, [*PAIRS[1], [1.0]]), (2, [[0.0]]), (3, PAIRS[3])],
        ),
        ("awm", {}, [(g, [[float(place) for place in range(n)]]) for g, n in enumerate([4, 3, 1, 2])]),
        (
            "nft",
            {"shared_noise": "none"},
            [(g, [[float(place)] for place in range(n)]) for g, n in enumerate([4, 3, 1, 2])],
        ),
    ],
    ids=["dpo", "pairs", "groups", "alone"],
)
def test_what_is_one_optimizer_step_and_what_shares_its_noise(
    name: str, keys: dict[str, str], expected: list[Any]
) -> None:
    """A prompt is one step, a pair of dpo too; pairs are best and worst, however the strategy orders them."""
    candidates = kept([4, 3, 1, 2])
    for order in (candidates, sorted(candidates, key=lambda one: (one.group_id, -one.advantage))):
        units = objective(name, **keys).units(order)
        found = [
            (order[unit.sets[0][0]].group_id, [[order[i].advantage for i in places] for places in unit.sets])
            for unit in units
        ]
        assert found == expected
        assert {unit.whole for unit in units} == {name == "dpo"}


def test_pairs_that_tie_are_no_preference() -> None:
    tied = [Kept(group_id=0, candidate=i, advantage=float(i == 3)) for i in range(4)]
    (unit,) = objective("dpo").units(tied)
    assert [tied[place].advantage for place in unit.sets[0]] == [1.0, 0.0]
    with pytest.raises(ValueError, match="dpo: none of the 3 kept candidates has a partner"):
        objective("dpo").units(tied[:3])


@pytest.mark.parametrize("name", ["nft", "awm", "dpo"])
def test_any_dynamics_will_do_and_rows_are_draws(name: str) -> None:
    made = objective(name, draws=3)
    for dynamics in ("sde", "cps", "ode"):
        made.check(RolloutSettings(dynamics=dynamics))
        assert made.rows(RolloutSettings(dynamics=dynamics)) == 3
    assert made.keeps == {"clean"}


def test_steps_of_an_ode_have_no_ratio() -> None:
    with pytest.raises(ValueError, match=r"got 'ode', whose .* but flow_grpo learns from cps, sde; nft, awm"):
        load_objective(objective_settings({"name": "flow_grpo"})).check(RolloutSettings(dynamics="ode"))


@pytest.mark.parametrize(
    ("keys", "decays"),
    [
        ({}, {0: 0.0, 10: 0.0, 10_000: 0.0}),
        ({"behaviour_decay": 0.5}, {0: 0.0, 100: 0.1, 500: 0.5, 10_000: 0.5}),
        (
            {"behaviour_decay": 0.999, "behaviour_ramp": 7.5e-3, "behaviour_hold": 75},
            {0: 0.0, 75: 0.0, 175: 0.75, 1000: 0.999},
        ),
    ],
    ids=["none", "published", "published for OCR"],
)
def test_the_behaviour_policy_follows_by_the_published_ramps(
    keys: dict[str, float], decays: dict[int, float]
) -> None:
    made = objective("nft", **keys)
    assert {updates: made.behaviour_decay(updates) for updates in decays} == pytest.approx(decays)
    assert made.lags == bool(keys)
    assert made.prepared_passes(4) == (1.0 if keys else 0.75)


@pytest.mark.parametrize("name", ["nft", "awm"])
def test_an_update_that_nothing_holds_back_is_in_doubt(name: str) -> None:
    made, held = objective(name), objective(name, kl_weight=1e-4)
    doubt = made.doubts({"moved": 0.0}, on_policy=True)
    assert "does not lag" in doubt
    assert "raise learner.updates to 2 or more" in doubt
    late = objective(name, behaviour_decay=0.5, behaviour_hold=75).doubts({"moved": 0.0}, on_policy=True)
    assert "follows it for 75 optimizer steps (behaviour_hold)" in late
    assert name in doubt
    assert made.doubts({"moved": 1e-9}, on_policy=True) == held.doubts({"moved": 0.0}, on_policy=True) == ""


def test_settings_of_an_objective_come_back_from_a_record() -> None:
    for name in ("nft", "awm", "dpo"):
        before = LearnerSettings.model_validate({"objective": {"name": name, "draws": 5}})
        assert LearnerSettings.model_validate(before.model_dump(mode="json")) == before
        assert before.objective.name == name


def test_a_mini_batch_of_dpo_holds_whole_pairs_and_the_plan_counts_them() -> None:
    dpo, nft = objective("dpo", draws=3), objective("nft", draws=3)
    assert [dpo.whole(size) for size in (1, 6, 11, 12)] == [6, 6, 6, 12]
    assert [nft.whole(size) for size in (1, 7)] == [1, 7]
