"""Metrics scraped from a real Ray node, and the placement of actors by label."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.actors.actor_spec import NODE_LABEL, ActorSpec, spawn
from cluster.trackers.prometheus import Prometheus
from rollout.records import WeightsId

pytestmark = pytest.mark.ray

LINE = {
    "step": 4, "reward_mean": 0.5, "margin_mean": 0.25, "staleness": 1, "restarts": 2, "candidates": 16.0,
    "valid": 13.0, "seconds_sample": 1.5, "seconds_learn": 3.0, "eval_reward": 0.75, "kl": None,
    "grad_norm": float("nan"), "kl.t3": 0.125, "eval_my.tools:Reward": 0.375, "eval_style-2": 0.25,
    "alarms": {"image_dark": "rose"},
}  # fmt: skip


def stage(waiting: int, **more: Any) -> Any:
    return SimpleNamespace(pool=SimpleNamespace(waiting=waiting), **more)


HELD = {0: WeightsId(4), 1: WeightsId(3), 3: WeightsId(5, averaged=True)}
STAGES: Any = SimpleNamespace(
    samplers=stage(3, held=HELD),
    rewards=SimpleNamespace(replicas={"shapes": stage(3)}),
    selector=stage(0),
)
EXPECTED = {
    "step": 4, "reward_mean": 0.5, "margin_mean": 0.25, "staleness": 1, "restarts": 2, "candidates": 16,
    "valid": 13, "missing_rewards": 3, "eval_reward": 0.75, "eval_my_tools_reward": 0.375,
    "eval_style_2": 0.25,
    "seconds{sample}": 1.5, "seconds{learn}": 3,
    "step_kl{3}": 0.125, "queue{sample}": 3, "queue{shapes}": 3, "queue{select}": 0,
    "weights_version{0}": 4, "weights_version{1}": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def node() -> Iterator[str]:
    """A Ray node with a label; returns the address of its metrics."""
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, labels={NODE_LABEL: "sampler"},
        _system_config={"metrics_report_interval_ms": 500}, object_store_memory=10**8,
    )  # fmt: skip
    yield f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics"
    ray.shutdown()


def scraped(address: str) -> dict[str, float]:
    """Scrape NoiseMargin's gauges, by name and own tag."""
    with urllib.request.urlopen(address, timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if match := re.match(r"ray_noisemargin_(\w+)\{(.*)\} (\S+)$", line):
            name, tags, value = match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2])), float(match[3])
            assert tags["run"] == "shapes-1"
            own = tags.get("stage") or tags.get("sampler") or tags.get("denoising_step")
            found[f"{name}{{{own}}}" if own else name] = value
    return found


def test_every_number_of_a_line_can_be_scraped(node: str) -> None:
    tracker = Prometheus("shapes-1", STAGES)
    tracker.log({**LINE, "step": 3, "reward_mean": 0.1})
    tracker.log(LINE)
    deadline = time.monotonic() + 60
    while (found := scraped(node)) != EXPECTED and time.monotonic() < deadline:
        time.sleep(0.5)
    assert found == EXPECTED


def test_actors_wait_for_a_node_with_their_label(node: str) -> None:
    def role(label: str | None) -> ActorSpec:
        arguments = {"seconds": 0}
        return ActorSpec(name="timer", target="datetime:timedelta", arguments=arguments, node=label)

    fit = [spawn(role("sampler"), 0), spawn(role(None), 1)]
    absent = spawn(role("learner"), 2)
    refs = [actor.call.remote("total_seconds") for actor in (*fit, absent)]
    assert ray.get(refs[:2], timeout=60) == [0, 0]
    assert ray.wait(refs[2:], timeout=2) == ([], refs[2:])
    for actor in (*fit, absent):
        ray.kill(actor)
