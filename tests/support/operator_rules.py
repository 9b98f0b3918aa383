"""What KubeRay's operator and Kubernetes refuse or get wrong beyond the schema of the manifests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

Resource = dict[str, Any]
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "": 1}


def violations(resource: Resource) -> list[str]:
    """Every rule that a RayJob or RayCluster breaks; the rules are those of KubeRay's validation of specs."""
    name, spec = resource["metadata"]["name"], resource["spec"]
    found = [] if NAME.fullmatch(name) and len(name) <= 47 else [f"{name!r} is no name"]
    if resource["kind"] == "RayJob":
        found += _job(resource)
        spec = spec["rayClusterSpec"]
    return [*found, *_cluster(spec)]


def _job(resource: Resource) -> Iterator[str]:
    spec = resource["spec"]
    mode, suspended = spec.get("submissionMode", "K8sJobMode"), spec.get("suspend", False)
    autoscaled = spec["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    if mode not in MODES:
        yield f"submissionMode {mode!r} is none of {MODES}"
    if "clusterSelector" in spec:
        yield "a cluster of its own and one that is selected exclude each other"
    if suspended and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend needs shutdownAfterJobFinishes"
    if ttl and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
    if ttl < 0 or spec.get("backoffLimit", 0) < 0:
        yield "ttlSecondsAfterFinished and backoffLimit are not negative"
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        yield "activeDeadlineSeconds is positive"
    if mode == "InteractiveMode" and spec.get("backoffLimit", 0):
        yield "InteractiveMode has no backoffLimit"
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & spec.keys():
        yield "SidecarMode has no submitter"
    if "kueue.x-k8s.io/queue-name" in resource["metadata"].get("labels", {}) and autoscaled:
        yield "Kueue does not accept autoscaling"
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is a mapping, written as a string"
    if spec["rayClusterSpec"].get("authOptions", {}).get("enableK8sTokenAuth"):
        yield "a RayJob has no enableK8sTokenAuth"


def _cluster(spec: dict[str, Any]) -> Iterator[str]:
    autoscaled = spec.get("enableInTreeAutoscaling", False)
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is token in every recipe"
    elif _version(spec.get("rayVersion", "0")) < (2, 52):
        yield "token mode needs rayVersion 2.52 or newer"
    if {"networkPolicy", "tlsOptions", "gcsFaultToleranceOptions"} & spec.keys():
        yield "alpha, or not recommended for training"
    names = [group["groupName"] for group in spec["workerGroupSpecs"]]
    if len(set(names)) < len(names):
        yield f"groups share a name: {names}"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield from _group(group, autoscaled)
    for group in spec["workerGroupSpecs"]:
        low, count, high = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        if None in (low, count, high) or not 0 <= low <= count <= high:
            yield f"{group['groupName']}: not minReplicas {low} <= replicas {count} <= maxReplicas {high}"
        elif not autoscaled and not low == count == high:
            yield f"{group['groupName']}: without an autoscaler the number of replicas is fixed"


def _group(group: dict[str, Any], autoscaled: bool) -> Iterator[str]:
    name, params, pod = group.get("groupName", "head"), group["rayStartParams"], group["template"]["spec"]
    if not all(isinstance(value, str) for value in params.values()):
        yield f"{name}: values of rayStartParams are strings"
    if "labels" in params:
        yield f"{name}: labels stand beside rayStartParams"
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & params.keys():
        yield f"{name}: resources stand in one place"
    if autoscaled and pod.get("restartPolicy", "Never") != "Never":
        yield f"{name}: autoscaler v2 replaces pods instead of restarting them"
    names = {variable["name"] for variable in pod["containers"][0]["env"]}
    if names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME", "RAY_enable_autoscaler_v2"}:
        yield f"{name}: has a field of its own"
    shared = next((v["emptyDir"] for v in pod["volumes"] if v["name"] == "shared-memory"), {})
    store, memory = int(params["object-store-memory"]), pod["containers"][0]["resources"]["limits"]["memory"]
    if shared.get("medium") != "Memory" or not store <= size(shared["sizeLimit"]) <= size(memory):
        yield f"{name}: object store, /dev/shm in memory and memory limit do not fit into each other"


def size(quantity: str) -> int:
    """Bytes of a quantity such as 16Gi."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * UNITS[unit]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
