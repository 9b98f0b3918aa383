"""Describe and start Ray actors around plain worker classes."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import psutil
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors.library_warnings import forward

ROLE_VARIABLE: Final = "NOISEMARGIN_ROLE"
"""The environment variable that identifies the processes of the actors."""
NODE_LABEL: Final = "noisemargin.io/role"
"""The label of Ray nodes by which `cluster.nodes` places actors."""
DIED: Final = (ActorDiedError, ActorUnavailableError)
LOST: Final = (*DIED, TimeoutError)
"""The ways to lose an actor: it died, is unavailable, or missed the deadline of a call."""
CPU_SHARE: Final = 0.01
"""CPUs of an actor without a GPU, so that none is placed on a node without CPUs, such as a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorSpec:
    """The description of an actor: its worker class as "module:Class", arguments, resources and node label.

    With a ``group``, each actor has the bundle of its number, and the group determines the nodes.
    """

    name: str
    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    gpus: float = 0
    threads: int = 1
    runtime_env: dict[str, Any] = field(default_factory=dict)
    node: str | None = None
    group: PlacementGroup | None = None


class WorkerActor:
    """The actor around a worker, whose class it imports itself, so that the driver need not."""

    def __init__(self, name: str, target: str, arguments: dict[str, Any]) -> None:
        """Import and build the worker."""
        self.name = name
        forward(name)  # first, for the warnings of libraries at import
        module, _, attribute = target.partition(":")
        self.worker = getattr(importlib.import_module(module), attribute)(**arguments)

    def call(
        self,
        method: str,
        *arguments: Any,
        gather: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
        spread: Callable[[Any], Sequence[Any]] | None = None,
    ) -> Any:
        """Call a method of the worker; object references among the arguments arrive as their values.

        Ray resolves and frees only references that are themselves an argument or a return value, so
        ``gather`` builds the method's arguments from flat ones, and ``spread`` flattens its result.
        """
        result = getattr(self.worker, method)(*(gather(arguments) if gather else arguments))
        return tuple(spread(result)) if spread else result

    def pid(self) -> int:
        """Return the id of this process."""
        return os.getpid()

    def address(self) -> tuple[str, int]:
        """Return this node's address for its peers, and a free port on it."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as probe:
            probe.bind(("", 0))
            return host, int(probe.getsockname()[1])

    def __repr__(self) -> str:
        """Return the name, for Ray's log lines."""
        return self.name


def role_of(process: psutil.Process) -> str:
    """Return the name of the spec of an actor's process; empty for any other process, or if it has ended."""
    try:
        actor = process.name().startswith(f"ray::{WorkerActor.__name__}")
        return process.environ().get(ROLE_VARIABLE, "") if actor else ""
    except psutil.Error:
        return ""


def spawn(spec: ActorSpec, number: int) -> ActorHandle[Any]:
    """Start one actor of a spec; it ends with the driver."""
    environment = {
        ROLE_VARIABLE: spec.name,
        "OMP_NUM_THREADS": str(spec.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # else an actor without a GPU would see all of them
    actor: Any = ray.remote(WorkerActor).options(
        num_cpus=0 if spec.gpus else CPU_SHARE,
        num_gpus=spec.gpus,
        max_restarts=0,
        runtime_env={**spec.runtime_env, "env_vars": environment | spec.runtime_env.get("env_vars", {})},
        label_selector={NODE_LABEL: spec.node} if spec.node and not spec.group else None,
        scheduling_strategy=_strategy(spec, number),
    )
    handle: ActorHandle[Any] = actor.remote(f"{spec.name}-{number}", spec.target, spec.arguments)
    return handle


def _strategy(spec: ActorSpec, number: int) -> PlacementGroupSchedulingStrategy | str:
    """Spread equal actors over nodes; shares of a GPU are left to Ray, which fills GPU after GPU."""
    if spec.group:
        return PlacementGroupSchedulingStrategy(spec.group, placement_group_bundle_index=number)
    return "SPREAD" if float(spec.gpus).is_integer() else "DEFAULT"


def unbuildable(error: Exception | None) -> bool:
    """Return whether an actor died of an exception in its worker's constructor, which would recur."""
    return isinstance(error, ActorDiedError) and "creation task" in str(error)


def reason(error: Exception | None) -> str:
    """Describe the cause of a failed call in one line, without Ray's tracebacks."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if unbuildable(error):
        return lines[-1]  # the worker's own exception, at the end of its traceback
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
