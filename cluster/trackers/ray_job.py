"""A run as a Ray job: how far it is, kept in the job's own entry, where Ray's tools and ours show it.

``ray job status``, ``ray job list``, the dashboard and KubeRay's RayJob show the message or the metadata of
that entry, but Ray has no public call by which a driver may write to it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Final

import ray
from ray._private.ray_constants import KV_NAMESPACE_JOB
from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY, JobInfoStorageClient
from ray.exceptions import RpcError

from cluster.config.address import JOB_VARIABLE
from cluster.record.events import warn

SHOWN: Final = {"reward_mean": "reward", "eval_reward": "held-out"}
"""Which metrics the entry holds, and how they are called there."""
TOLD: Final = ("step", "reward", "held-out", "checkpoint", "folder")
"""What the entry may say of a run, in this order."""


def submission() -> str | None:
    """The submission's name if this process is the driver of a job."""
    described = json.loads(os.environ.get(JOB_VARIABLE, "{}"))
    name: str | None = described.get("metadata", {}).get(JOB_ID_METADATA_KEY)
    return name


class Job:
    """Tells Ray what the run has come to; a run that is no job tells nobody."""

    def __init__(self, folder: str, steps: int) -> None:
        """Say where the run is; Ray must have been started."""
        self.name, self.steps = submission(), steps
        self.tell(folder=folder)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Tell a line of metrics."""
        found = {
            SHOWN[key]: f"{value:.4g}" for key, value in metrics.items() if key in SHOWN and value is not None
        }
        self.tell(step=f"{metrics['step']}/{self.steps}", **found)

    def tell(self, **facts: str) -> None:
        """Add facts to the job's metadata, and say all of them in its message while it runs."""
        if self.name is None:
            return
        client: Any = ray._private.worker.global_worker
        client = client.gcs_client
        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=self.name).encode()
        try:
            found = client.internal_kv_get(key, namespace=KV_NAMESPACE_JOB)
            if found is None:  # the run is on another cluster than the job
                return
            entry = json.loads(found)
            entry["metadata"] = {**(entry["metadata"] or {}), **facts}
            entry["message"] = summary(entry["metadata"])
            client.internal_kv_put(key, json.dumps(entry).encode(), True, namespace=KV_NAMESPACE_JOB)
        except RpcError as error:  # the run matters more than what is told of it
            warn("job entry not written", reason=str(error))


def summary(metadata: Mapping[str, str]) -> str:
    """What the entry says of a run, in a line."""
    return ", ".join(f"{key} {metadata[key]}" for key in TOLD if key in metadata)
