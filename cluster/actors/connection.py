"""Join a Ray cluster that is known to answer, or start a local node; Ray's own client retries for minutes."""

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

TIMEOUT: Final = 4.0
"""Seconds within which a cluster must answer."""
CLIENT: Final = "ray://"
"""The prefix of a Ray client server's address."""
SHARING: Final = {"RAY_worker_niceness": "0", "GOMP_SPINCOUNT": "1000"}
"""Scheduling of a local node's workers, unless the environment has other values.

With Ray's niceness of 15 any other busy process starves them, and OpenMP's threads spin so long while waiting
that they use up the time slices of the threads they wait for (``python -m cluster.bench busy``).
"""


def connect(settings: ClusterSettings) -> None:
    """Join the configured cluster or that of this job; else start a node on this machine.

    Raises:
        UserError: if the cluster cannot be reached, or the local node cannot be started as configured.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # A failed call fails all of its results, and the pool handles the first one.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    check_address(settings)
    if address := joined(settings):
        _reach(address, source_of_address(settings), lambda url: ray.init(address=url, log_to_driver=False))
    else:
        _start_local(settings)


def check_address(settings: ClusterSettings) -> None:
    """Check that a cluster answers at the address, if there is one.

    Raises:
        UserError: naming the source of the address and the failure.
    """
    if address := joined(settings):
        _reach(address, source_of_address(settings), check_answers)


def _reach(address: str, source: str, connect_to: Callable[[str], Any]) -> None:
    try:
        connect_to(address)
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
    except Exception as error:  # Ray raises a bare one when its node does not start in time
        reason = _line(error)
        key = "cluster.object_store_gb: " if "object store" in reason.lower() else ""
        raise UserError(f"{key}cannot start a Ray node on this machine: {reason}") from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_answers(address: str) -> None:
    """Check what answers at an address: a head at HOST:PORT or "auto", a Ray client server at ray://HOST:PORT.

    Raises:
        ConnectionError: if nothing answers in time, or another service does.
        ValueError: if it is not an address.
    """
    head: Any = gcs_service_pb2  # their classes are created at import, unknown to mypy
    client: Any = ray_client_pb2
    if address.startswith(CLIENT):
        target = address.removeprefix(CLIENT)
        if ":" not in target:
            raise ValueError(f"expected {CLIENT}HOST:PORT")
        ping = client.ClusterInfoRequest(type=client.ClusterInfoType.PING)
        _ask(target, RayletDriverStub, "ClusterInfo", ping)
    elif "://" not in address:  # other protocols are left to Ray
        target = canonicalize_bootstrap_address(address) or address
        _ask(target, NodeInfoGcsServiceStub, "GetClusterId", head.GetClusterIdRequest())


def _ask(target: str, service: Any, method: str, request: Any) -> None:
    channel = init_grpc_channel(target, options=[("grpc.enable_http_proxy", 0)])  # as Ray's own connections
    try:
        getattr(service(channel), method)(request, timeout=TIMEOUT)
    except grpc.RpcError as error:
        raise ConnectionError(_explain(error)) from None
    finally:
        channel.close()


def _explain(error: Any) -> str:
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer in {TIMEOUT:g} s"
    if error.code() == grpc.StatusCode.UNIMPLEMENTED:
        return (
            "another service answers there; a head is at HOST:6379, for nodes of its cluster, "
            f"and a Ray client server at {CLIENT}HOST:10001"
        )
    return str(error.details()).rpartition("last error: ")[2]
