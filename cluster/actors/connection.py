"""Whether a Ray cluster answers at an address: asked first, since Ray's own client tries for minutes."""

from __future__ import annotations

from typing import Any, Final

import grpc
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import gcs_service_pb2, ray_client_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub

PATIENCE: Final = 4.0
"""Seconds that a cluster has to answer."""
CLIENT: Final = "ray://"
"""What the address of a Ray client server starts with."""


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
