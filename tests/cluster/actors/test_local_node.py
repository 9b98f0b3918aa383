"""Local nodes that fail to start."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from cluster.actors.connection import connect
from cluster.config.errors import UserError
from cluster.config.settings import ClusterSettings


@pytest.mark.parametrize("error", [Exception("the node timed out"), ConnectionError("no route")])
def test_a_ray_that_does_not_come_up_is_an_error_of_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr("cluster.actors.connection.check_answers", lambda address: None)
    with pytest.raises(UserError, match=f"^cluster.address: cannot reach Ray at there:1: {error}$"):
        connect(ClusterSettings(address="there:1"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=f"^cannot start a Ray node on this machine: {error}$"):
        connect(ClusterSettings(object_store_gb=0.08))
