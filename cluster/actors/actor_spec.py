"""Wrap plain workers as Ray actors, from outside, and start or join the Ray cluster."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.actors.connection import check_answers
from cluster.actors.library_warnings import forward
from cluster.config.errors import UserError
from cluster.config.object_store import check_object_store
from cluster.config.settings import ClusterSettings

JOB_VARIABLE: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job."""
LOCAL: Final = "local"
"""The address by which Ray starts a node of its own."""
ROLE_VARIABLE: Final = "NOISEMARGIN_ROLE"
"""Tells the processes of the actors apart."""
NODE_LABEL: Final = "noisemargin.io/role"
"""The label of Ray nodes by which `cluster.nodes` places actors."""
SHARING: Final = {"RAY_worker_niceness": "0", "GOMP_SPINCOUNT": "1000"}
"""How the workers of a node of our own share its cores, unless the environment says otherwise.

Ray's niceness of 15 lets any busy neighbour starve them, and OpenMP's threads wait for each other by spinning
for so long that they use up the turns in which the others could catch up (``python -m cluster.bench busy``).
"""
CPU_SHARE: Final = 0.01
"""What an actor without a GPU takes, so that none goes to a node without CPUs, such as a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What an actor is: the worker class as "module:Class", its arguments, its resources and its nodes.

    With a ``group``, every actor has the bundle of its number, and the group says which nodes these are on.
    """

    name: str
    target: str
    arguments: dict[str, Any] = field(default_factory=dict)
    gpus: float = 0
    threads: int = 1
    runtime_env: dict[str, Any] = field(default_factory=dict)
    node: str | None = None
    group: PlacementGroup | None = None


class Host:
    """The actor around a worker. It imports the worker's class itself, so the driver need not."""

    def __init__(self, name: str, target: str, arguments: dict[str, Any]) -> None:
        """Import and build the worker."""
        self.name = name
        forward(name)  # first, for what its libraries say when they are imported
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

        Ray resolves and frees only what is an argument or a return value by itself: ``gather`` makes the
        method's arguments of flat ones, ``spread`` makes flat return values of its result.
        """
        found = getattr(self.worker, method)(*(gather(arguments) if gather else arguments))
        return tuple(spread(found)) if spread else found

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def address(self) -> tuple[str, int]:
        """This node's address as its peers see it, and a free port on it."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        with socket.socket() as probe:
            probe.bind(("", 0))
            return host, int(probe.getsockname()[1])

    def __repr__(self) -> str:
        """The name in Ray's log lines."""
        return self.name


def spawn(role: Role, number: int) -> ActorHandle[Any]:
    """Start one actor of a role; it is gone when the driver is."""
    environment = {
        ROLE_VARIABLE: role.name,
        "OMP_NUM_THREADS": str(role.threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if role.gpus == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # without a GPU of its own, an actor would see all of them
    actor: Any = ray.remote(Host).options(
        num_cpus=0 if role.gpus else CPU_SHARE,
        num_gpus=role.gpus,
        max_restarts=0,
        runtime_env={**role.runtime_env, "env_vars": environment | role.runtime_env.get("env_vars", {})},
        label_selector={NODE_LABEL: role.node} if role.node and not role.group else None,
        scheduling_strategy=_strategy(role, number),
    )
    handle: ActorHandle[Any] = actor.remote(f"{role.name}-{number}", role.target, role.arguments)
    return handle


def _strategy(role: Role, number: int) -> PlacementGroupSchedulingStrategy | str:
    """Equal actors go to different nodes; shares of a GPU as Ray likes, which fills one before the next."""
    if role.group:
        return PlacementGroupSchedulingStrategy(role.group, placement_group_bundle_index=number)
    return "SPREAD" if float(role.gpus).is_integer() else "DEFAULT"


def connect(settings: ClusterSettings) -> None:
    """Join the cluster that was named or that this job runs on; else start a node on this machine.

    Raises:
        UserError: if the cluster cannot be reached, or the local node cannot be started as configured.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A failed call fails all of its results; the pool looks at the first and that is enough.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    check_address(settings)
    if address := joined(settings):
        _reach(address, _named_by(settings), lambda there: ray.init(address=there, log_to_driver=False))
    else:
        _start_local(settings)


def joined(settings: ClusterSettings) -> str | None:
    """The cluster that a run joins: the one that was named, or that this job runs on; none: its own node."""
    surrounding = os.environ.get("RAY_ADDRESS") or ("auto" if JOB_VARIABLE in os.environ else None)
    address = settings.address or surrounding
    return None if address == LOCAL else address


def check_address(settings: ClusterSettings) -> None:
    """Refuse an address at which no cluster answers.

    Raises:
        UserError: naming where the address is from, and what there is instead.
    """
    if address := joined(settings):
        _reach(address, _named_by(settings), check_answers)


def _named_by(settings: ClusterSettings) -> str:
    """Where the address of the cluster comes from."""
    if settings.address:
        return "cluster.address"
    return "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "the job's cluster"


def _reach(address: str, source: str, way: Callable[[str], Any]) -> None:
    try:
        way(address)
    except Exception as error:  # Ray raises many kinds
        raise UserError(f"{source}: cannot reach Ray at {address}: {_line(error)}") from None


def _start_local(settings: ClusterSettings) -> None:
    for name, value in SHARING.items():
        os.environ.setdefault(name, value)
    check_object_store(settings.object_store_gb)
    try:
        ray.init(
            address=LOCAL,
            include_dashboard=settings.dashboard_port is not None,
            dashboard_host="127.0.0.1",
            dashboard_port=settings.dashboard_port,
            object_store_memory=int(settings.object_store_gb * 1e9),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises a bare one when its node does not come up in time
        story = _line(error)
        about = "cluster.object_store_gb: " if "object store" in story.lower() else ""
        raise UserError(f"{about}cannot start a Ray node on this machine: {story}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_port(port: int | None) -> None:
    """Refuse a dashboard port that something else listens on.

    Raises:
        UserError: if it is taken.
    """
    if port is None:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"cluster.dashboard_port: port {port} is not free: {error.strerror}") from None
