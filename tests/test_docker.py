"""The images and the compose file, as far as they can be judged without building them."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from learner.objectives.flow_grpo import FlowGRPOSettings
from learner.objectives.registry import load_objective, metric_names
from tests.support.paths import ROOT

DOCKER = ROOT / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
TARGETS = ("cpu", "rewards", "gpu")
CODE = {"rollout", "rewards", "selection", "learner", "cluster"}
SECRET = re.compile(r"TOKEN|PASSWORD|SECRET|API_?KEY", re.IGNORECASE)
INDEX = re.compile(r"(--(extra-)?index-url|--find-links|PIP_INDEX|UV_INDEX|UV_DEFAULT_INDEX|trusted-host)")


@dataclass
class Stage:
    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        return [arguments for name, arguments in self.steps if name == instruction]


def stages() -> dict[str, Stage]:
    """The stages of the Dockerfile, by name and in order; comments and line continuations are gone."""
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: dict[str, Stage] = {}
    for line in re.sub(r"\s*\\\n\s*", " ", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        instruction, _, arguments = line.partition(" ")
        if instruction == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", arguments).groups()  # type: ignore[union-attr]
            found[name] = current = Stage(name, base)
        else:
            current.steps.append((instruction, arguments.strip()))
    return found


STAGES = stages()


def test_the_default_target_is_the_gpu_image() -> None:
    assert list(STAGES)[-1] == "gpu"
    assert set(TARGETS) <= STAGES.keys()


def test_bases_are_pinned_to_a_version() -> None:
    outside = [
        stage.base for stage in STAGES.values() if stage.base not in STAGES and stage.base != "scratch"
    ]
    images = [*outside, *(s["image"] for s in COMPOSE["services"].values())]
    assert not [image for image in images if not re.fullmatch(r"[\w./-]+:v?\d+(\.\d+)+[\w.-]*", image)]


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_does_not_run_as_root(target: str) -> None:
    users = STAGES[target].all("USER")
    assert users == ["1000:1000"]
    after = [name for name, _ in STAGES[target].steps[[n for n, _ in STAGES[target].steps].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)


@pytest.mark.parametrize("target", TARGETS)
def test_the_code_comes_after_the_packages_and_nothing_after_it_is_built(target: str) -> None:
    steps = STAGES[target].steps
    copies = [number for number, (name, _) in enumerate(steps) if name == "COPY"]
    assert [steps[number][1] for number in copies] == [
        "--from=packages /opt/venv /opt/venv",
        "--from=code /app /app",
    ]
    assert not [name for name, _ in steps[copies[0] :] if name == "RUN"]


def test_only_the_pins_decide_about_the_packages() -> None:
    packages = STAGES["packages"]
    assert packages.all("COPY") == ["constraints.txt pyproject.toml ./"]
    installs = [part for run in packages.all("RUN") for part in run.split("&&") if "pip install" in part]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in install for install in installs)


def test_the_code_is_all_of_it_and_is_not_left_out_of_the_context() -> None:
    sources = {source for copy in STAGES["code"].all("COPY") for source in copy.split()[:-1]}
    assert sources >= CODE
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == sources | {"constraints.txt"}
    assert all((ROOT / path).exists() for path in kept)


def test_no_secret_and_no_index_stands_in_an_image() -> None:
    for stage in STAGES.values():
        assert not stage.all("ARG") + stage.all("ADD")
        for line in stage.all("ENV"):
            names = [word.partition("=")[0] for word in line.split()]
            assert not [name for name in names if SECRET.search(name)]
        assert not [line for _, line in stage.steps if INDEX.search(line)]


def test_lists_of_packages_do_not_stay_in_a_layer() -> None:
    for run in [run for stage in STAGES.values() for run in stage.all("RUN") if "apt-get install" in run]:
        assert "--no-install-recommends" in run
        assert run.startswith("apt-get update &&")
        assert run.endswith("rm -rf /var/lib/apt/lists/*")


def test_a_cluster_of_the_image_fails_closed() -> None:
    for target in ("cpu", "gpu"):
        assert "RAY_AUTH_MODE=token" in " ".join(STAGES[target].all("ENV"))
    assert "--token-file" in json.loads(STAGES["rewards"].all("CMD")[0])


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_is_locked_down(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "network_mode", "pid"} & service.keys()
    assert service.get("user", "1000:1000").partition(":")[0] != "0"
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:")
    for variable, value in service.get("environment", {}).items():
        assert not SECRET.search(variable) or value.startswith("/run/secrets/")


@pytest.mark.parametrize("name", ["head", "worker"])
def test_every_node_of_ray_wants_the_token(name: str) -> None:
    service = COMPOSE["services"][name]
    environment = service["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/ray_token"
    assert service["secrets"] == ["ray_token"]
    assert len([key for key in environment if key.startswith("RAY_health_check_")]) == 4
    store = next(word for word in service["command"] if word.startswith("--object-store-memory="))
    assert int(store.partition("=")[2]) <= 2 * 2**30
    assert service["shm_size"] == "2gb"


def test_secrets_are_files_that_git_ignores() -> None:
    for secret in COMPOSE["secrets"].values():
        path = (DOCKER / secret["file"]).relative_to(ROOT)
        assert subprocess.run(["git", "check-ignore", "-q", str(path)], cwd=ROOT, check=False).returncode == 0


def test_mounted_files_exist() -> None:
    binds = [
        volume for s in COMPOSE["services"].values() for volume in s.get("volumes", ()) if volume[0] == "."
    ]
    assert binds
    assert all((DOCKER / volume.partition(":")[0]).exists() for volume in binds)
    assert all(volume.endswith(":ro") for volume in binds)


def test_prometheus_scrapes_every_node() -> None:
    scrape = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    (discovery,) = job["dns_sd_configs"]
    assert set(discovery["names"]) == {"head", "worker"}
    for name in discovery["names"]:
        assert f"--metrics-export-port={discovery['port']}" in COMPOSE["services"][name]["command"]


def panels() -> list[dict[str, Any]]:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "noisemargin.json").read_text())
    found: list[dict[str, Any]] = dashboard["panels"]
    return found


def test_the_dashboard_asks_for_metrics_that_a_run_has() -> None:
    asked = {
        name
        for panel in panels()
        for target in panel.get("targets", ())
        for name in re.findall(r"ray_noisemargin_(\w+)", target["expr"])
    }
    names = (
        "actors/stages.py", "loop/observers.py", "loop/run.py", "loop/evaluation.py",
        "record/held_out.py", "trackers/prometheus.py",
    )  # fmt: skip
    sources = [ROOT / "cluster" / name for name in names]
    sources += [ROOT / "selection" / "selector.py"]
    known = {name for path in sources for name in re.findall(r'"(\w+)"', path.read_text())}
    known |= set(metric_names(load_objective(FlowGRPOSettings())))
    assert {"reward_mean", "queue", "weights_version", "missing_rewards", "seconds"} <= asked
    assert asked <= known | {"seconds"}


def test_the_dashboard_fits_its_data_source_and_has_no_overlap() -> None:
    source = yaml.safe_load((DOCKER / "grafana/provisioning/datasources/prometheus.yaml").read_text())
    (uid,) = {one["uid"] for one in source["datasources"]}
    assert {panel["datasource"]["uid"] for panel in panels() if "datasource" in panel} == {uid}
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels())
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_a_job_does_not_upload_what_it_does_not_need() -> None:
    left_out = (ROOT / ".rayignore").read_text().splitlines()
    assert {"runs/", ".venv/", ".git/", "tests/", "data/"} <= set(left_out)
    assert not {f"{package}/" for package in CODE} & set(left_out)
