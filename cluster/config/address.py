"""The address of the Ray cluster that a run joins, and the port of its dashboard; without Ray."""

from __future__ import annotations

import os
import socket
from typing import Final

from cluster.config.errors import UserError
from cluster.config.settings import ClusterSettings

JOB_VARIABLE: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job."""
ADDRESS_VARIABLE: Final = "RAY_API_SERVER_ADDRESS"
"""Ray's own variable for the address of a dashboard, to which jobs are submitted."""
LOCAL: Final = "local"
"""The address by which Ray starts a node of its own."""


def joined(settings: ClusterSettings) -> str | None:
    """Find the cluster to join: the one that was named, or that this job runs on; None starts a node."""
    surrounding = os.environ.get("RAY_ADDRESS") or ("auto" if JOB_VARIABLE in os.environ else None)
    address = settings.address or surrounding
    return None if address == LOCAL else address


def source_of_address(settings: ClusterSettings) -> str:
    """Name the key, the variable or the job that an address comes from."""
    if settings.address:
        return "cluster.address"
    return "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "the job's cluster"


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
