"""The order of the rooms: what may import what, and what a command loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.source_code import LAYERS, importers, imports, name, way_to

CLUSTER = sorted((ROOT / "cluster").rglob("*.py"))
ORDER = (
    "config process",
    "record",
    "actors local report export interrupts",
    "loop",
    "trackers study plan",
    "watch service embed",
    "train",
    "submit bench __main__",
)
"""The rooms of cluster/ from the ground up; rooms of one floor do not know each other."""
FLOORS = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms.split()}


def rooms_of(path: Path) -> set[str]:
    """The rooms of cluster/ that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {module.split(".")[1] for module in modules if module.startswith("cluster.")}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_stage_imports_only_stages_upstream(layer: str) -> None:
    downstream = set(LAYERS[LAYERS.index(layer) + 1 :])
    found = {name(path): imports(path) & downstream for path in (ROOT / layer).rglob("*.py")}
    assert not {file: used for file, used in found.items() if used}


def test_only_the_cluster_knows_ray() -> None:
    assert not {file for file in importers("ray") if not file.startswith("cluster/")}


@pytest.mark.parametrize("library", ["deepspeed", "paddleocr", "open_clip"])
def test_one_file_imports_a_heavy_library(library: str) -> None:
    assert len(importers(library)) <= 1


def test_only_the_rollout_knows_diffusers() -> None:
    assert not {file for file in importers("diffusers") if not file.startswith("rollout/")}


def test_selection_is_pure() -> None:
    heavy = {"torch", "ray", "diffusers", "transformers"}
    assert not {name(path) for path in (ROOT / "selection").rglob("*.py") if imports(path) & heavy}


WITHOUT_RAY = """
    cluster/config cluster/record cluster/local cluster/study cluster/plan cluster/report cluster/watch
    cluster/export rewards cluster/train.py cluster/__main__.py
"""


def test_the_way_to_a_library_is_found() -> None:
    assert way_to("ray", ROOT / "cluster/service.py")[0] == "cluster/service.py"
    assert way_to("plotly", ROOT / "cluster/service.py")


@pytest.mark.parametrize("room", WITHOUT_RAY.split())
def test_what_needs_no_ray_imports_without_it(room: str) -> None:
    place = ROOT / room
    ways = [way_to("ray", path) for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    assert ways
    assert not [" > ".join(way) for way in ways if way]


@pytest.mark.parametrize("library", ["plotly", "jinja2", "tensorboard"])
def test_submitting_loads_nothing_that_draws(library: str) -> None:
    files = [*sorted((ROOT / "cluster/submit").glob("*.py")), ROOT / "cluster/config/preflight.py"]
    assert not [" > ".join(way) for way in (way_to(library, file) for file in files) if way]


@pytest.mark.parametrize("room", sorted(FLOORS))
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    place = ROOT / "cluster" / room
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    used = {name(path): rooms_of(path) - {room} for path in files}
    assert not {
        file: above
        for file, rooms in used.items()
        if (above := {other for other in rooms if FLOORS[other] >= FLOORS[room]})
    }


def test_every_room_has_its_floor() -> None:
    rooms = {path.relative_to(ROOT / "cluster").parts[0].removesuffix(".py") for path in CLUSTER}
    assert rooms - {"__init__"} == FLOORS.keys()


def test_rooms_are_small() -> None:
    """At most 14 files beside its ``__init__``, and none of more than 250 lines."""
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in CLUSTER if path.stem != "__init__")
    assert not {room: count for room, count in counts.items() if count > 14}
    sizes = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in CLUSTER}
    assert not {file: count for file, count in sizes.items() if count > 250}


def test_the_step_exists_once() -> None:
    calls = [name(path) for path in CLUSTER if re.search(r"\bcandidate_noises\(", path.read_text())]
    assert calls == ["cluster/loop/drawing.py"]


def test_the_loop_is_short() -> None:
    assert len((ROOT / "cluster/loop/loop.py").read_text().splitlines()) <= 120


@pytest.mark.parametrize("driver", ["cluster.train", "cluster.service", "cluster.bench.scale"])
def test_the_driver_stays_light(driver: str) -> None:
    probe = f"import sys, {driver}; sys.exit(', '.join({{'torch', 'diffusers'}} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
