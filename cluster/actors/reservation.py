"""Where a run's actors go: the learner's ranks together, and room for everyone before anything starts.

Which topology a run has is said by the GPU counts and labels of its configuration: shares below 1 put
samplers, rewards and learner on one GPU, whole ones give each its own, and ``cluster.nodes`` names the nodes
of a role.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from cluster.actors.actor_spec import CPU_SHARE, NODE_LABEL
from cluster.config.address import joined
from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.record.events import warn

LOCAL_WAIT: Final = 5.0
"""Seconds for a node of our own, which gets no more than it has."""
QUIET: Final = 3.0
"""Seconds after which a wait is worth a word."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Equal actors, what each takes, and the role of the nodes that they have to be on."""

    role: str
    count: int
    gpus: float
    node: str | None

    @property
    def bundle(self) -> dict[str, float]:
        """What one of them takes, as Ray counts it."""
        return {"GPU": self.gpus} if self.gpus else {"CPU": CPU_SHARE}

    @property
    def selector(self) -> dict[str, str]:
        """The labels of the nodes that it may be on."""
        return {NODE_LABEL: self.node} if self.node else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What a Ray node has, in all."""

    role: str | None
    resources: dict[str, float]


def demands(settings: RunSettings) -> list[Demand]:
    """The actors that a run needs to begin, the learner's first; more samplers may come later."""
    nodes, rollout = settings.cluster.nodes, settings.rollout
    counted = [
        ("learner", settings.learner.ranks, settings.learner.gpus),
        ("rollout", rollout.min_workers or rollout.workers, rollout.gpus),
        *((name, reward.workers, reward.gpus) for name, reward in settings.distinct_rewards.items()),
        ("selector", 1, 0.0),
        ("observer", int(settings.guard.action != "off"), 0.0),
    ]
    return [
        Demand(role=role, count=count, gpus=gpus, node=nodes.get(role))
        for role, count, gpus in counted
        if count
    ]


def reserve(settings: RunSettings, tell: Callable[[str], None]) -> PlacementGroup:
    """Wait until the cluster has room for the whole run; returns the group that holds the learner's places.

    What Ray itself can place is the check, so a cluster that grows on demand sees the demand and grows.

    Raises:
        UserError: with the arithmetic, if there is no room within ``cluster.wait``.
    """
    learner, *others = demands(settings)
    together = "STRICT_PACK" if _fits_one_node(learner, _nodes()) else "PACK"
    places = [_Reservation([learner], together), _Reservation(others, "PACK")]
    try:
        _wait(settings, places, tell)
    except BaseException:
        for each in reversed(places):  # the learner's last, whose places others would take up at once
            remove_placement_group(each.group)
        raise
    remove_placement_group(places[1].group)  # a sampler may come back on another node than it was lost with
    return places[0].group


class _Reservation:
    """A placement group, and the actors that it is for."""

    def __init__(self, wanted: Sequence[Demand], strategy: str) -> None:
        self.wanted = wanted
        self.there = False
        every = [demand for demand in wanted for _ in range(demand.count)]
        self.group: PlacementGroup = placement_group(
            [demand.bundle for demand in every],
            strategy=strategy,
            bundle_label_selector=[demand.selector for demand in every],
        )

    def ready(self, seconds: float) -> bool:
        """Wait for the places, at least a second as Ray does; return whether they are there."""
        self.there = self.there or bool(self.group.wait(max(1, ceil(seconds))))
        return self.there


def _wait(settings: RunSettings, places: Sequence[_Reservation], tell: Callable[[str], None]) -> None:
    shared = joined(settings.cluster)
    patience = settings.cluster.wait if shared else LOCAL_WAIT
    deadline = time.monotonic() + patience
    if all(each.ready(min(QUIET, patience)) for each in places):
        return
    if patience > QUIET:
        story = f"waiting up to {patience:g} s for room: {_arithmetic(places)}"
        warn(story)
        tell(story)
    if all(each.ready(deadline - time.monotonic()) for each in places):
        return
    longer = "; where nodes are added on demand, wait longer with --cluster.wait SECONDS" if shared else ""
    raise UserError(
        f"the cluster has no room for the run after {patience:g} s: {_arithmetic(places)}{longer}"
    )


def _arithmetic(places: Sequence[_Reservation]) -> str:
    """What is needed and there now, where what we have got ourselves counts as free."""
    ours = [demand for each in places if each.ready(0) for demand in each.wanted]
    free = Counter(_free())
    for demand in ours:
        free.update({kind: demand.count * share for kind, share in demand.bundle.items()})
    return arithmetic([demand for each in places for demand in each.wanted], _nodes(), free)


def arithmetic(wanted: Sequence[Demand], nodes: Sequence[Node], free: Mapping[str, float]) -> str:
    """What a run needs against what the cluster has, by the nodes that have to give it."""
    roles = sorted({demand.node or "" for demand in wanted})
    said = [line for role in roles for kind in ("GPU", "CPU") if (line := _line(wanted, nodes, role, kind))]
    taken = {kind: _total(nodes, kind) - free.get(kind, 0.0) for kind in ("GPU", "CPU")}
    busy = [f"{taken[kind]:g} {kind}s are taken" for kind in ("GPU", "CPU") if taken[kind] > 1e-6]
    return "; ".join([*said, *busy])


def _line(wanted: Sequence[Demand], nodes: Sequence[Node], role: str, kind: str) -> str:
    """Word the resources of a kind needed and available, on nodes with this label (or on all nodes)."""
    asked = [d for d in wanted if kind in d.bundle and (not role or d.node == role)]
    if not any((d.node or "") == role for d in asked):
        return ""
    needed = sum(d.count * d.bundle[kind] for d in asked)
    parts = ", ".join(f"{d.role} {d.count} x {d.bundle[kind]:g}" for d in asked)
    among = [node for node in nodes if not role or node.role == role]
    which = f"nodes with {NODE_LABEL}={role}" if role else "nodes"
    largest = max((node.resources.get(kind, 0.0) for node in among), default=0.0)
    spread = f", at most {largest:g} on one" if len(among) > 1 else ""
    return (
        f"{kind}s: {needed:g} needed ({parts}), {_total(among, kind):g} there ({which}: {len(among)}{spread})"
    )


def _total(nodes: Iterable[Node], kind: str) -> float:
    return sum(node.resources.get(kind, 0.0) for node in nodes)


def _fits_one_node(demand: Demand, nodes: Sequence[Node]) -> bool:
    (kind, share), = demand.bundle.items()  # fmt: skip
    among = [node for node in nodes if demand.node in (None, node.role)]
    return any(node.resources.get(kind, 0.0) >= demand.count * share for node in among)


def _nodes() -> list[Node]:
    found: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return [
        Node(role=node["Labels"].get(NODE_LABEL), resources=node["Resources"])
        for node in found
        if node["Alive"]
    ]


def _free() -> dict[str, float]:
    free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    return free
