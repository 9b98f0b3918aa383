"""The progress of a run in its Ray job entry, where Ray's tools and ``submit`` show it.

``ray job status``, ``ray job list``, the dashboard and KubeRay's RayJob show the message or the metadata of
that entry, but Ray has no public function by which a driver can write it.
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
"""The metrics in the entry, and their names there."""
FACTS: Final = ("step", "reward", "held-out", "checkpoint", "folder")
"""The facts about a run in the entry, in order."""


def submission() -> str | None:
    """Return the submission's name if this process is the driver of a job."""
    described = json.loads(os.environ.get(JOB_VARIABLE, "{}"))
    name: str | None = described.get("metadata", {}).get(JOB_ID_METADATA_KEY)
    return name


class Job:
    """The entry of a run's Ray job, where its progress is published; outside a Ray job nothing is done."""

    def __init__(self, folder: str, steps: int) -> None:
        """Publish the run folder; Ray must have been started."""
        self.name, self.steps = submission(), steps
        self.publish(folder=folder)

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Publish a line of metrics."""
        shown = {
            SHOWN[key]: f"{value:.4g}" for key, value in metrics.items() if key in SHOWN and value is not None
        }
        self.publish(step=f"{metrics['step']}/{self.steps}", **shown)

    def publish(self, **facts: str) -> None:
        """Add facts to the job's metadata, and show all of them in its message while it runs."""
        if self.name is None:
            return
        client: Any = ray._private.worker.global_worker
        client = client.gcs_client
        key = JobInfoStorageClient.JOB_DATA_KEY.format(job_id=self.name).encode()
        try:
            found = client.internal_kv_get(key, namespace=KV_NAMESPACE_JOB)
            if found is None:  # the run has joined another cluster than the job's
                return
            entry = json.loads(found)
            entry["metadata"] = {**(entry["metadata"] or {}), **facts}
            entry["message"] = summary(entry["metadata"])
            client.internal_kv_put(key, json.dumps(entry).encode(), True, namespace=KV_NAMESPACE_JOB)
        except RpcError as error:  # not worth ending the run
            warn("job entry not written", reason=str(error))


def summary(metadata: Mapping[str, str]) -> str:
    """Describe a run in one line, from its entry's metadata."""
    return ", ".join(f"{key} {metadata[key]}" for key in FACTS if key in metadata)
