"""The address of the Ray cluster that a run joins, and the port of its dashboard, found without Ray."""

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
"""The address that makes Ray start a node on this machine."""


def joined(settings: ClusterSettings) -> str | None:
    """Find the cluster to join: the configured one, or this job's own; None stands for a new local node."""
    surrounding = os.environ.get("RAY_ADDRESS") or ("auto" if JOB_VARIABLE in os.environ else None)
    address = settings.address or surrounding
    return None if address == LOCAL else address


def source_of_address(settings: ClusterSettings) -> str:
    """Name the key, variable or job that an address was read from."""
    if settings.address:
        return "cluster.address"
    return "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else "the job's cluster"


def check_port(port: int | None) -> None:
    """Check that the dashboard's port is free.

    Raises:
        UserError: if another process listens on it.
    """
    if port is None:
        return
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise UserError(f"cluster.dashboard_port: port {port} is not free: {error.strerror}") from None
