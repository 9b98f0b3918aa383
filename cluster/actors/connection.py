"""Join a Ray cluster or start a node, once it is known to answer: Ray's own client would try for minutes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, Final

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import gcs_service_pb2, ray_client_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub

from cluster.config.address import LOCAL, joined, source_of_address
from cluster.config.errors import UserError
from cluster.config.object_store import check_object_store
from cluster.config.settings import ClusterSettings
from cluster.record.events import warn

PATIENCE: Final = 4.0
"""Seconds that a cluster has to answer."""
CLIENT: Final = "ray://"
"""What the address of a Ray client server starts with."""
SHARING: Final = {"RAY_worker_niceness": "0", "GOMP_SPINCOUNT": "1000"}
"""How the workers of a node of our own share its cores, unless the environment says otherwise.

Ray's niceness of 15 lets any busy neighbour starve them, and OpenMP's threads wait for each other by spinning
for so long that they use up the turns in which the others could catch up (``python -m cluster.bench busy``).
"""


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
        _reach(
            address, source_of_address(settings), lambda there: ray.init(address=there, log_to_driver=False)
        )
    else:
        _start_local(settings)


def check_address(settings: ClusterSettings) -> None:
    """Refuse an address at which no cluster answers.

    Raises:
        UserError: naming where the address is from, and what there is instead.
    """
    if address := joined(settings):
        _reach(address, source_of_address(settings), check_answers)


def _reach(address: str, source: str, way: Callable[[str], Any]) -> None:
    try:
        way(address)
    except Exception as error:  # Ray raises many kinds
        raise UserError(f"{source}: cannot reach Ray at {address}: {_line(error)}") from None


def _start_local(settings: ClusterSettings) -> None:
    for name, value in SHARING.items():
        os.environ.setdefault(name, value)
    if remark := check_object_store(settings.object_store_gb):
        warn("object store on disk", reason=remark)
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


def check_answers(address: str) -> None:
    """Ask who is at an address: a head at HOST:PORT or "auto", a Ray client server at ray://HOST:PORT.

    Raises:
        ConnectionError: if nobody answers in time, or somebody else.
        ValueError: if it is no address.
    """
    head: Any = gcs_service_pb2  # their classes are made when they are imported
    client: Any = ray_client_pb2
    if address.startswith(CLIENT):
        target = address.removeprefix(CLIENT)
        if ":" not in target:
            raise ValueError(f"expected {CLIENT}HOST:PORT")
        ping = client.ClusterInfoRequest(type=client.ClusterInfoType.PING)
        _ask(target, RayletDriverStub, "ClusterInfo", ping)
    elif "://" not in address:  # Ray knows whether it has another protocol
        target = canonicalize_bootstrap_address(address) or address
        _ask(target, NodeInfoGcsServiceStub, "GetClusterId", head.GetClusterIdRequest())


def _ask(target: str, service: Any, method: str, request: Any) -> None:
    channel = init_grpc_channel(target, options=[("grpc.enable_http_proxy", 0)])  # as Ray's own connections
    try:
        getattr(service(channel), method)(request, timeout=PATIENCE)
    except grpc.RpcError as error:
        raise ConnectionError(_meaning(error)) from None
    finally:
        channel.close()


def _meaning(error: Any) -> str:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer in {PATIENCE:g} s"
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return (
            "another service answers there; a head is at HOST:6379, for nodes of its cluster, "
            f"and a Ray client server at {CLIENT}HOST:10001"
        )
    return str(error.details()).rpartition("last error: ")[2]
