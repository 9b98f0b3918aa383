"""Several Ray nodes on this machine, each with its own raylet, that come and are killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import psutil
import ray
from ray.cluster_utils import Cluster

from cluster.actors.actor_spec import NODE_LABEL

NOTICE: Final = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 3,
}
"""A dead node is noticed in seconds, as in the recipes."""


class Nodes:
    """A head, to which nodes are added; ``address`` is where a run joins them."""

    def __init__(self, **head: Any) -> None:
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 4,
                "object_store_memory": 3 * 10**8,
                "_system_config": NOTICE,
                **head,
            },
        )
        self.address: str = self.cluster.address

    def add(self, label: str = "", **resources: float) -> Any:
        """One more node, with fake GPUs or a label of `cluster.nodes`."""
        labels = {NODE_LABEL: label} if label else {}
        return self.cluster.add_node(num_cpus=1, labels=labels, **resources)

    def kill(self, node: Any) -> None:
        """SIGKILL to a node's raylet, with which its actors die."""
        psutil.Process(
            node.all_processes[ray._private.ray_constants.PROCESS_TYPE_RAYLET][0].process.pid
        ).kill()

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on the nodes."""
        return [
            process
            for node in self.cluster.list_all_nodes()
            for listed in node.all_processes.values()
            for one in listed
            for process in _family(one.process.pid)
        ]

    def wait(self, happened: Callable[[], bool], seconds: float = 120) -> None:
        until = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < until
            time.sleep(0.1)


@contextmanager
def nodes(**head: Any) -> Iterator[Nodes]:
    """A cluster that is gone afterwards."""
    made = Nodes(**head)
    yield made
    made.cluster.shutdown()


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
