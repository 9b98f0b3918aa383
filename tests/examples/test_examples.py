"""The examples as a user has them: a file outside the checkout, named in the configuration."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.config.errors import UserError
from cluster.config.preflight import check
from cluster.config.settings import RunSettings
from cluster.config.sources import parse_overrides, resolve
from cluster.record.run_data import RecordedRun
from cluster.report.charts import diagnostic_charts
from learner.objectives.registry import load_objective, metric_names
from learner.settings import LearnerSettings
from rewards.combine import Scores
from rollout.families.registry import load_policy
from rollout.settings import ModelSettings
from selection.selector import Selector
from selection.settings import SelectionSettings
from tests.support.paths import ROOT
from tests.support.tiny_learner import (
    learner_settings,
    model_settings,
    rollout_settings,
    sample,
    start,
    update,
    weights,
)

OBJECTIVE = "my_objective:RewardWeightedRegression"
STRATEGY = "my_strategy:best_and_middle"
FAMILY = "my_family:LateStepsSD3"


@pytest.fixture(scope="module", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder outside the checkout with the examples, on the path of this process and of those it starts."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for path in (ROOT / "examples").glob("my_*.py"):
        shutil.copy(path, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))
        yield folder


def learner(**keys: Any) -> LearnerSettings:
    return learner_settings(objective={"name": OBJECTIVE, **keys})


def configured(*flags: str) -> RunSettings:
    return resolve("shapes", parse_overrides(list(flags), "prog"))


@pytest.mark.usefixtures("process_group")
def test_the_objective_trains(pipeline_folder: Path) -> None:
    """The likelier a step is made the higher its advantage, and the states are all it takes."""
    model, rollout, settings = model_settings(pipeline_folder), rollout_settings(), learner(temperature=2.0)
    batch = sample(model, rollout, keeps=load_objective(settings.objective).keeps)
    assert not any(one.log_probs.size or one.means.size for one in batch.trajectories.values())
    worker = start(model, rollout, settings)
    before = weights(worker)
    found = [update(worker, *batch.calls()[0]) for _ in range(3)]
    assert not np.array_equal(weights(worker), before)
    assert found[-1]["log_prob"] > found[0]["log_prob"]
    assert found[-1]["log_prob.t0"] != found[-1]["log_prob.t1"]
    highest = max(kept.advantage for kept in batch.kept)
    assert found[0]["largest_weight"] == pytest.approx(np.exp(highest / 2.0), rel=1e-5)
    whole = {name for name in found[0] if "." not in name}
    assert whole == {*metric_names(load_objective(settings.objective)), "updates"}


def test_the_objective_is_checked_before_a_run(judged_here: None) -> None:
    settings = configured("--learner.objective", f'{{"name": "{OBJECTIVE}", "temperature": 0.5}}')
    check(settings)
    assert load_objective(settings.learner.objective).settings.temperature == 0.5
    wrong = configured("--learner.objective", f'{{"name": "{OBJECTIVE}", "temperature": -1}}')
    with pytest.raises(UserError, match=r"learner\.objective\.temperature: .*greater than 0, got -1"):
        check(wrong)


def test_the_objective_says_what_is_wrong() -> None:
    objective = load_objective(learner().objective)
    assert "temperature (1)" in objective.healthy({"largest_weight": 1e6}, on_policy=True, dtype="float32")
    assert not objective.healthy({"largest_weight": 3.0}, on_policy=True, dtype="float32")


def test_the_report_draws_what_the_objective_declares(tmp_path: Path) -> None:
    config = {"learner": {"objective": {"name": OBJECTIVE}}}
    rows = tuple({"step": step, "reward_mean": 0.5, "log_prob": -1.0, "kl": 0.1} for step in (1, 2))
    run = RecordedRun(folder=tmp_path, config=config, metrics=rows, checkpoint=None, notes=())
    assert [chart.title for chart in diagnostic_charts(run)] == ["Log-probability"]


def test_the_strategy_selects() -> None:
    """Of eight candidates with one invalid: the two best, and two in the middle of the rest."""
    rewards = np.array([0.1, 0.9, 0.5, 0.7, np.nan, 0.2, 0.4, 0.8])
    valid = np.isfinite(rewards)
    scores = Scores(rewards={"r": rewards}, weights={"r": 1.0}, valid=valid, total=rewards, strict=None)
    settings = SelectionSettings(candidates=8, keep=4, strategy=STRATEGY)
    selection = Selector(settings, seed=0).select(0, [7], [scores])
    assert {kept.candidate for kept in selection.kept} == {1, 7, 5, 6}
    assert selection.kept[-1].candidate == 1


def test_the_strategy_is_checked_before_a_run(judged_here: None) -> None:
    check(configured("--selection.strategy", STRATEGY))
    with pytest.raises(UserError, match=r"selection\.strategy: got 'my_strategy:best'.* has no 'best'"):
        check(configured("--selection.strategy", "my_strategy:best"))


@pytest.mark.usefixtures("process_group")
def test_the_family_samples_and_learns(pipeline_folder: Path) -> None:
    """Its noise levels are its own, in the sampler as in the learner: on-policy ratios are one."""
    model = model_settings(pipeline_folder, family=FAMILY)
    rollout = rollout_settings()
    own, usual = (
        load_policy(ModelSettings(path=model.path, family=name), rollout, device="meta", seed=0, whole=False)
        for name in (FAMILY, None)
    )
    assert (own.schedule(4).sigmas[1:-1] < usual.schedule(4).sigmas[1:-1]).all()
    worker = start(model, rollout, learner_settings())
    assert torch.equal(worker.policy.schedule(4).sigmas, own.schedule(4).sigmas)
    batch = sample(model, rollout)
    before = weights(worker)
    assert update(worker, *batch.calls()[0])["ratio_max_deviation"] <= 1e-5
    assert not np.array_equal(weights(worker), before)
    usual_batch = sample(model_settings(pipeline_folder), rollout)
    assert not np.array_equal(batch.trajectories[0, 0].states, usual_batch.trajectories[0, 0].states)


def test_the_family_is_checked_before_a_run(judged_here: None) -> None:
    check(configured("--model.family", FAMILY))
    with pytest.raises(UserError, match=r"model\.family: got 'my_family:Late'.* has no 'Late'"):
        check(configured("--model.family", "my_family:Late"))


def test_the_guide_names_what_is_there() -> None:
    text = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for name in (OBJECTIVE, STRATEGY, FAMILY):
        assert f"examples.{name}" in text
