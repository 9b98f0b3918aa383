"""The recipes for KubeRay: they build, the operator accepts them, and every pod is locked down."""

from __future__ import annotations

import math
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import yaml

from cluster.actors.actor_spec import NODE_LABEL
from cluster.config.settings import RunSettings
from cluster.train import configure
from tests.support.kustomize import apply, build
from tests.support.operator_rules import violations
from tests.support.paths import ROOT

RECIPES = ROOT / "cluster" / "kuberay"
OVERLAYS = sorted(path.name for path in (RECIPES / "overlays").iterdir())
JOBS = [name for name in OVERLAYS if name != "sd35-cluster"]
HEALTH = {"initial_delay_ms", "period_ms", "timeout_ms", "failure_threshold"}
OWN = {"app.kubernetes.io/part-of": "noisemargin"}


def built(overlay: str) -> list[dict[str, Any]]:
    return build(RECIPES / "overlays" / overlay)


def ray(overlay: str) -> dict[str, Any]:
    (found,) = [resource for resource in built(overlay) if resource["kind"] in {"RayJob", "RayCluster"}]
    return found


def groups(resource: dict[str, Any]) -> list[dict[str, Any]]:
    """Head first, then the groups of workers."""
    spec = resource["spec"].get("rayClusterSpec", resource["spec"])
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def templates(resource: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """List every pod template: those of the nodes, and that of the submitter if it exists."""
    yield from (group["template"] for group in groups(resource))
    if "submitterPodTemplate" in resource["spec"]:
        yield resource["spec"]["submitterPodTemplate"]


def environment(container: dict[str, Any]) -> dict[str, Any]:
    names = [variable["name"] for variable in container["env"]]
    assert len(set(names)) == len(names)
    return {variable["name"]: variable.get("value", variable) for variable in container["env"]}


def configured(overlay: str) -> tuple[Any, RunSettings]:
    """Parse the options and settings of the overlay's entrypoint."""
    words = shlex.split(ray(overlay)["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "cluster.train"]
    return configure(words[3:])


def test_there_are_the_recipes_that_the_guide_names() -> None:
    guide = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"overlays/([\w-]+)", guide)) == set(OVERLAYS)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_builds_the_same(overlay: str) -> None:
    if not (kubectl := shutil.which("kubectl")):
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(RECIPES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    def ordered(resources: Any) -> list[dict[str, Any]]:
        return sorted(resources, key=lambda r: (r["kind"], r["metadata"]["name"]))

    assert ordered(yaml.safe_load_all(done.stdout)) == ordered(built(overlay))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_accepts_it(overlay: str) -> None:
    assert violations(ray(overlay)) == []


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("/spec/submissionMode", "K8sMode", "submissionMode"),
        ("/spec/shutdownAfterJobFinishes", False, "ttlSecondsAfterFinished needs"),
        ("/spec/backoffLimit", -1, "not negative"),
        ("/spec/submissionMode", "SidecarMode", "no submitter"),
        ("/spec/rayClusterSpec/authOptions/mode", "disabled", "token in every recipe"),
        ("/spec/rayClusterSpec/rayVersion", "2.51.0", "2.52"),
        ("/spec/rayClusterSpec/workerGroupSpecs/0/maxReplicas", 3, "fixed"),
        ("/spec/rayClusterSpec/workerGroupSpecs/0/minReplicas", 3, "minReplicas"),
        ("/spec/rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0, "strings"),
        ("/spec/rayClusterSpec/headGroupSpec/rayStartParams/object-store-memory", str(10**10), "do not fit"),
        ("/spec/rayClusterSpec/headGroupSpec/template/spec/volumes/0/emptyDir/medium", "", "do not fit"),
        ("/metadata/name", "Smoke", "no name"),
    ],
)
def test_a_mistake_is_found(path: str, value: Any, complaint: str) -> None:
    broken = deepcopy(ray("cpu-smoke"))
    apply(broken, {"op": "replace", "path": path, "value": value})
    assert [found for found in violations(broken) if complaint in found]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_is_locked_down(overlay: str) -> None:
    for template in templates(ray(overlay)):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
            assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert environment(container)["HOME"] in mounted  # where a read-only root can be written


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_autoscalers_head_may_ask_the_api_server(overlay: str) -> None:
    autoscaled = ray(overlay)["spec"].get("rayClusterSpec", {}).get("enableInTreeAutoscaling", False)
    asking = [
        template["spec"]["containers"][0]["name"]
        for template in templates(ray(overlay))
        if template["spec"].get("automountServiceAccountToken") is not False
    ]
    assert asking == (["ray-head"] if autoscaled else [])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_process_of_ray_fails_closed_and_notices_death_early(overlay: str) -> None:
    nodes = [environment(group["template"]["spec"]["containers"][0]) for group in groups(ray(overlay))]
    for template in templates(ray(overlay)):
        found = environment(template["spec"]["containers"][0])
        assert (found["RAY_AUTH_MODE"], found["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")
        assert "RAY_AUTH_TOKEN" not in found  # the operator's, from its Secret
    assert all(node == nodes[0] for node in nodes)
    health = {key: int(value) for key, value in nodes[0].items() if key.startswith("RAY_health_check_")}
    assert health.keys() == {f"RAY_health_check_{name}" for name in HEALTH}
    assert health["RAY_health_check_failure_threshold"] * health["RAY_health_check_period_ms"] <= 10_000
    assert int(nodes[0]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_come_from_secrets(overlay: str) -> None:
    for resource in built(overlay):
        assert resource["kind"] != "Secret"
    for group in groups(ray(overlay)):
        token = environment(group["template"]["spec"]["containers"][0])["HF_TOKEN"]
        assert token["valueFrom"]["secretKeyRef"]["name"] == "noisemargin-tokens"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_node_is_probed(overlay: str) -> None:
    for group in groups(ray(overlay)):
        container = group["template"]["spec"]["containers"][0]
        head = "groupName" not in group
        expected = ("/api/gcs_healthz", 8265) if head else ("/api/local_raylet_healthz", 52365)
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            asked = container[kind]["httpGet"]
            assert (asked["path"], asked["port"]) == expected


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_versions_agree(overlay: str) -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    spec = ray(overlay)["spec"].get("rayClusterSpec", ray(overlay)["spec"])
    assert spec["rayVersion"] == pinned[1]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {template["spec"]["containers"][0]["image"] for template in templates(ray(overlay))}
    assert len(images) == 1
    assert images <= {f"noisemargin:{version}", f"noisemargin:{version}-cpu"}


@pytest.mark.parametrize("overlay", JOBS)
def test_the_entrypoint_is_one_that_every_attempt_can_run(overlay: str) -> None:
    options, settings = configured(overlay)
    assert options.auto_resume
    assert settings.folder is not None
    volumes = groups(ray(overlay))[0]["template"]["spec"]["containers"][0]["volumeMounts"]
    assert str(settings.folder.parent) in {mount["mountPath"] for mount in volumes}
    assert settings.checkpoint_every <= 10
    assert ray(overlay)["spec"]["backoffLimit"] > 0


@pytest.mark.parametrize("overlay", JOBS)
def test_the_gpus_are_those_that_the_run_needs(overlay: str) -> None:
    _, settings = configured(overlay)
    offered: dict[str, float] = {}
    for group in groups(ray(overlay))[1:]:
        gpus = group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0)
        role = group["labels"][NODE_LABEL]
        offered[role] = offered.get(role, 0) + group["maxReplicas"] * gpus
        tolerated = {toleration["key"] for toleration in group["template"]["spec"].get("tolerations", ())}
        assert not gpus or "nvidia.com/gpu" in tolerated
    needed = dict.fromkeys(offered, 0.0)
    wanted = [("rollout", settings.rollout.workers * settings.rollout.gpus)]
    wanted += [("learner", settings.learner.ranks * settings.learner.gpus)]
    wanted += [(reward.name, reward.workers * reward.gpus) for reward in settings.rewards]
    for actor, gpus in wanted:
        needed[settings.cluster.nodes.get(actor, next(iter(offered)))] += gpus
    assert {role: math.ceil(gpus - 1e-6) for role, gpus in needed.items()} == offered


def test_samplers_go_to_spot_nodes_and_the_learner_does_not() -> None:
    _, settings = configured("sd35-autoscale")
    pools = {
        group["labels"][NODE_LABEL]: group["template"]["spec"]["nodeSelector"]["noisemargin.io/pool"]
        for group in groups(ray("sd35-autoscale"))[1:]
    }
    placed = {actor: pools[role] for actor, role in settings.cluster.nodes.items()}
    assert placed == {"rollout": "spot", "learner": "reserved", "geneval": "reserved", "selector": "reserved"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_claims_labels_and_selectors_meet(overlay: str) -> None:
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for resource in built(overlay):
        by_kind.setdefault(resource["kind"], []).append(resource)
    claims = {claim["metadata"]["name"] for claim in by_kind["PersistentVolumeClaim"]}
    for template in templates(ray(overlay)):
        assert OWN.items() <= template["metadata"]["labels"].items()
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        persistent = [v["persistentVolumeClaim"] for v in volumes.values() if "emptyDir" not in v]
        assert {claim["claimName"] for claim in persistent} <= claims
        mounts = template["spec"]["containers"][0]["volumeMounts"]
        assert {mount["name"] for mount in mounts} == volumes.keys()
    labels = [group["template"]["metadata"]["labels"] for group in groups(ray(overlay))]
    labels[0]["ray.io/node-type"] = "head"  # the operator's
    for budget in by_kind["PodDisruptionBudget"]:
        assert budget["spec"].keys() == {"minAvailable", "selector"}  # all that pods of a custom owner allow
        wanted = budget["spec"]["selector"]["matchLabels"].items()
        chosen = [found for found in labels if wanted <= found.items()]
        assert len(chosen) == (1 if overlay != "cpu-smoke" or "head" in budget["metadata"]["name"] else 0)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nobody_else_reaches_the_pods(overlay: str) -> None:
    (policy,) = [resource for resource in built(overlay) if resource["kind"] == "NetworkPolicy"]
    assert policy["spec"]["podSelector"] == {"matchLabels": OWN}
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    for rule in policy["spec"]["ingress"]:
        for peer in rule["from"]:
            labels = peer["podSelector"]["matchLabels"]
            assert labels == OWN or (labels and {port["port"] for port in rule["ports"]} <= {8265, 8080})
    peers = [peer for rule in policy["spec"]["egress"] for peer in rule.get("to", ())]
    for block in [peer["ipBlock"] for peer in peers if "ipBlock" in peer]:
        assert block["cidr"] != "0.0.0.0/0" or "169.254.0.0/16" in block["except"]
    services = [group.get("serviceType", "ClusterIP") for group in groups(ray(overlay))]
    assert set(services) == {"ClusterIP"}
    assert not {"Ingress", "Service"} & {resource["kind"] for resource in built(overlay)}


def test_the_queued_run_waits_for_kueue() -> None:
    queued = ray("sd35-8gpu-queued")
    assert queued["spec"]["suspend"] is True
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "noisemargin"
