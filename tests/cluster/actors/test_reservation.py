"""Reservations: the message about missing resources, and placement by Ray itself."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from cluster.actors.actor_spec import NODE_LABEL, ActorSpec, spawn
from cluster.actors.reservation import Demand, Node, arithmetic, demands, reserve
from cluster.config.errors import UserError
from cluster.config.settings import RunSettings

EIGHT = Node(role=None, resources={"GPU": 8, "CPU": 16})


def demand(role: str, count: int, gpus: float = 0, node: str | None = None) -> Demand:
    return Demand(role=role, count=count, gpus=gpus, node=node)


def test_the_demands_of_a_run(configure: Any) -> None:
    settings = configure(
        rollout={"workers": 3, "gpus": 0.5},
        learner={"ranks": 2, "gpus": 1},
        rewards=[{"name": "shapes", "workers": 2}],
        cluster={"nodes": {"shapes": "judge"}},
        guard={"action": "off"},
    )
    assert demands(settings) == [
        demand("learner", 2, 1), demand("rollout", 3, 0.5), demand("shapes", 2, node="judge"),
        demand("selector", 1),
    ]  # fmt: skip
    assert "observer" in {found.role for found in demands(configure())}
    few = demands(configure(rollout={"workers": 3, "min_workers": 1, "gpus": 0.5}))
    assert demand("rollout", 1, 0.5) in few  # the others may come later


def test_the_arithmetic_of_too_few_gpus() -> None:
    wanted = [demand("learner", 2, 1), demand("rollout", 8, 1), demand("selector", 1)]
    assert arithmetic(wanted, [EIGHT], {"GPU": 8, "CPU": 16}) == (
        "GPUs: 10 needed (learner 2 x 1, rollout 8 x 1), 8 available (nodes: 1); "
        "CPUs: 0.01 needed (selector 1 x 0.01), 16 available (nodes: 1)"
    )


def test_the_arithmetic_of_what_others_hold() -> None:
    said = arithmetic([demand("rollout", 4, 1)], [EIGHT, EIGHT], {"GPU": 3, "CPU": 32})
    assert said == (
        "GPUs: 4 needed (rollout 4 x 1), 16 available (nodes: 2, at most 8 on one); 13 GPUs are taken"
    )


def test_the_arithmetic_of_nodes_with_a_label() -> None:
    sampler = Node(role="sampler", resources={"GPU": 1, "CPU": 8})
    wanted = [demand("learner", 1, 4, node="learner"), demand("rollout", 2, 1, node="sampler")]
    assert arithmetic(wanted, [EIGHT, sampler], {"GPU": 9, "CPU": 24}) == (
        f"GPUs: 4 needed (learner 1 x 4), 0 available (nodes with {NODE_LABEL}=learner: 0); "
        f"GPUs: 2 needed (rollout 2 x 1), 1 available (nodes with {NODE_LABEL}=sampler: 1)"
    )


@pytest.fixture(scope="module")
def nodes() -> Iterator[str]:
    """A head without CPUs, and two nodes with two fake GPUs each, one of them labelled for learners."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 10**8},
        shutdown_at_exit=False,
    )
    for role in ("sampler", "learner"):
        cluster.add_node(num_cpus=1, num_gpus=2, labels={NODE_LABEL: role}, object_store_memory=10**8)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def joining(configure: Any, nodes: str) -> Any:
    """Configure a run on that cluster."""

    def make(gpus: float, ranks: int, samplers: float, workers: int, **more: Any) -> RunSettings:
        found: RunSettings = configure(
            learner={"gpus": gpus, "ranks": ranks},
            rollout={"gpus": samplers, "workers": workers},
            # The actors of the test before may still be leaving, and Ray asks less often as it waits.
            cluster={"address": nodes, "wait": 60, **more},
        )
        return found

    return make


def placed(group: PlacementGroup) -> list[str]:
    return list(placement_group_table(group)["bundles_to_node_id"].values())


def label(node: str) -> str:
    (found,) = [entry for entry in ray.nodes() if entry["NodeID"] == node]
    return str(found["Labels"].get(NODE_LABEL))


@pytest.mark.ray
def test_ranks_are_kept_together_and_their_places_are_theirs(joining: Any) -> None:
    group = reserve(joining(1, 2, 1, 2), print)
    assert len(set(placed(group))) == 1
    role = ActorSpec(name="learner", target="datetime:timedelta", gpus=1, group=group)
    ranks = [spawn(role, rank) for rank in range(2)]
    others = [spawn(ActorSpec(name="rollout", target="datetime:timedelta", gpus=1), n) for n in range(2)]
    every = [actor.call.remote("total_seconds") for actor in (*ranks, *others)]
    assert ray.get(every, timeout=60) == [0] * 4
    for actor in (*ranks, *others):
        ray.kill(actor)
    remove_placement_group(group)


@pytest.mark.ray
def test_ranks_that_fit_no_node_are_spread_over_several(joining: Any) -> None:
    group = reserve(joining(1, 3, 0, 1), print)
    assert len(set(placed(group))) == 2
    remove_placement_group(group)


@pytest.mark.ray
def test_shares_of_a_gpu_and_labels(joining: Any) -> None:
    group = reserve(joining(0.6, 2, 0.3, 2, nodes={"learner": "learner", "rollout": "learner"}), print)
    assert {label(node) for node in placed(group)} == {"learner"}
    # As in the presets: no two ranks share a GPU, and each has a sampler beside it.
    role = ActorSpec(name="learner", target="datetime:timedelta", gpus=0.6, group=group)
    beside = ActorSpec(name="rollout", target="datetime:timedelta", gpus=0.3, node="learner")
    ranks, samplers = ([spawn(spec, number) for number in range(2)] for spec in (role, beside))
    found = [
        sorted(ray.get([actor.__ray_call__.remote(_gpu) for actor in actors], timeout=60))
        for actors in (ranks, samplers)
    ]
    assert found == [[0, 1], [0, 1]]
    for actor in (*ranks, *samplers):
        ray.kill(actor)
    remove_placement_group(group)


@pytest.mark.ray
def test_small_shares_wait_until_the_ranks_have_their_places(joining: Any) -> None:
    taken = placement_group([{"GPU": 1}], bundle_label_selector=[{NODE_LABEL: "learner"}])
    ray.get(taken.ready())
    free = threading.Timer(2, remove_placement_group, [taken])
    free.start()
    # Asked for at once, both samplers would take the other GPU and leave no room for the second rank.
    group = reserve(joining(0.6, 2, 0.3, 2, nodes={"learner": "learner", "rollout": "learner"}), print)
    free.join()
    assert len(placed(group)) == 2
    remove_placement_group(group)


def _gpu(_: object) -> int:
    (gpu,) = ray.get_gpu_ids()
    return int(gpu)


def _node(_: object) -> str:
    return str(ray.get_runtime_context().get_node_id())


@pytest.mark.ray
def test_equal_actors_go_to_different_nodes(nodes: str) -> None:
    actors = [spawn(ActorSpec(name="rollout", target="datetime:timedelta"), number) for number in range(2)]
    where = [actor.__ray_call__.remote(_node) for actor in actors]
    assert len(set(ray.get(where, timeout=60))) == 2
    for actor in actors:
        ray.kill(actor)


@pytest.mark.ray
def test_a_run_without_room_is_refused_with_the_arithmetic(joining: Any) -> None:
    with pytest.raises(UserError) as caught:
        reserve(joining(1, 1, 1, 4, wait=1), print)
    assert re.fullmatch(
        r"the cluster lacks resources for the run after 1 s: "
        r"GPUs: 5 needed \(learner 1 x 1, rollout 4 x 1\), 4 available \(nodes: 3, at most 2 on one\); "
        r"CPUs: .*\(shapes 1 x 0\.01, .*\), 2 available .*; "
        r"where nodes are added on demand, wait longer with --cluster\.wait SECONDS",
        str(caught.value),
    )


@pytest.mark.ray
def test_a_run_waits_for_room_and_says_so(joining: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.actors.reservation.QUIET", 1)
    holder = spawn(ActorSpec(name="other", target="datetime:timedelta", gpus=2), 0)
    ray.get(holder.call.remote("total_seconds"))
    told: list[str] = []

    def leave(story: str) -> None:
        told.append(story)
        ray.kill(holder)

    group = reserve(joining(1, 1, 1, 3, wait=30), leave)
    assert placed(group)
    assert len(told) == 1
    assert told[0].startswith(
        "waiting up to 30 s for resources: GPUs: 4 needed (learner 1 x 1, rollout 3 x 1)"
    )
    assert told[0].endswith("; 2 GPUs are taken")
    remove_placement_group(group)
