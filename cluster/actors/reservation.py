"""Reserve the resources of a run before any actor starts, the learner's ranks on one node if possible.

The GPU counts and labels of the configuration determine the topology: shares below 1 put samplers, rewards
and learner on one GPU, whole numbers give each its own, and ``cluster.nodes`` names the nodes of a role.
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
"""Seconds to wait for a local node, whose resources do not grow."""
QUIET: Final = 3.0
"""Seconds of waiting before a message is printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The demand of equal actors: their number, the resources of each, and the label of their nodes."""

    role: str
    count: int
    gpus: float
    node: str | None

    @property
    def bundle(self) -> dict[str, float]:
        """The resources of one actor, in Ray's units."""
        return {"GPU": self.gpus} if self.gpus else {"CPU": CPU_SHARE}

    @property
    def selector(self) -> dict[str, str]:
        """The labels of the nodes on which it may be placed."""
        return {NODE_LABEL: self.node} if self.node else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A Ray node: its label and all its resources."""

    role: str | None
    resources: dict[str, float]


def demands(settings: RunSettings) -> list[Demand]:
    """List the actors that a run needs to start, the learner's first; more samplers may join later."""
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


def reserve(settings: RunSettings, print_line: Callable[[str], None]) -> PlacementGroup:
    """Wait until the cluster has resources for the whole run; returns the learner's placement group.

    The check is a placement by Ray itself, so that an autoscaling cluster sees the demand and grows.

    Raises:
        UserError: with the needed and available resources, if they do not suffice within ``cluster.wait``.
    """
    learner, *others = demands(settings)
    together = "STRICT_PACK" if _fits_one_node(learner, _nodes()) else "PACK"
    ranks = _Reservation([learner], together)
    # Small shares fill GPU after GPU, and may leave no GPU with room for a rank: its place is taken first.
    # Whole GPUs are asked for at once, so that a cluster that grows does so once.
    shared = not float(learner.gpus).is_integer()
    rest = _Reservation(others, "PACK", after=ranks if shared else None)
    try:
        _wait(settings, [ranks, rest], print_line)
    except BaseException:
        for each in (rest, ranks):  # the ranks' last, else the other group would take their resources
            each.remove()
        raise
    rest.remove()  # so that a lost sampler may be replaced on another node
    return ranks.ask()


class _Reservation:
    """A placement group and its actors, asked for at once or once another one is placed."""

    def __init__(self, wanted: Sequence[Demand], strategy: str, after: _Reservation | None = None) -> None:
        self.wanted, self.strategy, self.after = wanted, strategy, after
        self.placed = False
        self._group: PlacementGroup | None = None
        if not after:
            self.ask()

    def ask(self) -> PlacementGroup:
        """Ask for the resources, once; return their placement group."""
        if not self._group:
            every = [demand for demand in self.wanted for _ in range(demand.count)]
            self._group = placement_group(
                [demand.bundle for demand in every],
                strategy=self.strategy,
                bundle_label_selector=[demand.selector for demand in every],
            )
        return self._group

    def ready(self, seconds: float) -> bool:
        """Wait for the resources, at least Ray's minimum of a second; return whether they are reserved."""
        if self.after and not self.after.ready(seconds):
            return False
        self.placed = self.placed or bool(self.ask().wait(max(1, ceil(seconds))))
        return self.placed

    def remove(self) -> None:
        """Give the resources back, if they were asked for."""
        if self._group:
            remove_placement_group(self._group)


def _wait(settings: RunSettings, places: Sequence[_Reservation], print_line: Callable[[str], None]) -> None:
    shared = joined(settings.cluster)
    patience = settings.cluster.wait if shared else LOCAL_WAIT
    deadline = time.monotonic() + patience
    if all(each.ready(min(QUIET, patience)) for each in places):
        return
    if patience > QUIET:
        message = f"waiting up to {patience:g} s for resources: {_arithmetic(places)}"
        warn(message)
        print_line(message)
    if all(each.ready(deadline - time.monotonic()) for each in places):
        return
    longer = "; where nodes are added on demand, wait longer with --cluster.wait SECONDS" if shared else ""
    raise UserError(
        f"the cluster lacks resources for the run after {patience:g} s: {_arithmetic(places)}{longer}"
    )


def _arithmetic(places: Sequence[_Reservation]) -> str:
    """Compare needed and available resources; those that this run has reserved count as free."""
    reserved = [demand for each in places if each.ready(0) for demand in each.wanted]
    free = Counter(_free())
    for demand in reserved:
        free.update({kind: demand.count * share for kind, share in demand.bundle.items()})
    return arithmetic([demand for each in places for demand in each.wanted], _nodes(), free)


def arithmetic(wanted: Sequence[Demand], nodes: Sequence[Node], free: Mapping[str, float]) -> str:
    """Compare the resources that a run needs with those of the cluster, by the label of the nodes."""
    roles = sorted({demand.node or "" for demand in wanted})
    lines = [line for role in roles for kind in ("GPU", "CPU") if (line := _line(wanted, nodes, role, kind))]
    taken = {kind: _total(nodes, kind) - free.get(kind, 0.0) for kind in ("GPU", "CPU")}
    busy = [f"{taken[kind]:g} {kind}s are taken" for kind in ("GPU", "CPU") if taken[kind] > 1e-6]
    return "; ".join([*lines, *busy])


def _line(wanted: Sequence[Demand], nodes: Sequence[Node], role: str, kind: str) -> str:
    """Describe the resources of a kind needed and available, on nodes with this label (or on all nodes)."""
    asked = [d for d in wanted if kind in d.bundle and (not role or d.node == role)]
    if not any((d.node or "") == role for d in asked):
        return ""
    needed = sum(d.count * d.bundle[kind] for d in asked)
    parts = ", ".join(f"{d.role} {d.count} x {d.bundle[kind]:g}" for d in asked)
    among = [node for node in nodes if not role or node.role == role]
    which = f"nodes with {NODE_LABEL}={role}" if role else "nodes"
    largest = max((node.resources.get(kind, 0.0) for node in among), default=0.0)
    spread = f", at most {largest:g} on one" if len(among) > 1 else ""
    has = f"{_total(among, kind):g} available ({which}: {len(among)}{spread})"
    return f"{kind}s: {needed:g} needed ({parts}), {has}"


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
