"""The rules of the house, held by reading the source rather than by running it."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LAYERS = ("rollout", "rewards", "selection", "learner", "cluster")
SOURCES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PLAIN = ("rollout", "rewards", "selection")
"""Packages whose docstrings are held to the rule; the others follow."""
NOT_YET_PLAIN = {"rollout/settings.py", "selection/settings.py"}
QUESTION = re.compile(r"(What|How|Whether|Which|Why)\b")
RIDDLE = re.compile(r"\bis\s+(none|no)\b")
HOME_PATH = re.compile(rb"/(?:home/(?!ray\b)|Users/|root/)[A-Za-z0-9._-]+")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, at any depth of nesting; relative imports stay inside."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


def importers(library: str) -> set[str]:
    return {name(path) for path in SOURCES if library in imports(path)}


def functions(path: Path) -> Iterator[FunctionNode]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, FunctionNode):
            yield node


def lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def code_lines(function: FunctionNode) -> int:
    """Lines from ``def`` to the end, without the docstring: documenting well must not cost anything."""
    documented = ast.get_docstring(function) is not None
    return lines(function) - (lines(function.body[0]) if documented else 0)


def undocumented(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    """Public classes and functions without a docstring, down through classes but not into functions."""
    for child in node.body:
        if isinstance(child, FunctionNode | ast.ClassDef) and not child.name.startswith("_"):
            if ast.get_docstring(child) is None:
                yield f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from undocumented(child, f"{prefix}.{child.name}")


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Every string that stands as a statement: of modules, classes, functions and attributes, by line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.lineno, value.value.strip()


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / entry for entry in listed.stdout.decode().split("\0") if entry]
    return [path for path in paths if path.is_file()]


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


def at_import(path: Path) -> set[str]:
    """The modules that a file imports when it is imported: not in functions, and not for type checkers."""
    found: set[str] = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, FunctionNode) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        pending += ast.iter_child_nodes(node)
    return found


def file_of(module: str) -> Path | None:
    """The file of one of our modules; a package counts as its ``__init__``."""
    plain = ROOT / module.replace(".", "/")
    return next((path for path in (plain.with_suffix(".py"), plain / "__init__.py") if path.is_file()), None)


def way_to(library: str, start: Path) -> list[str]:
    """The files by which importing one of ours imports a library; empty if it does not."""
    ways = {start: [name(start)]}
    pending = [start]
    while pending:
        path = pending.pop()
        modules = at_import(path)
        if library in {module.split(".")[0] for module in modules}:
            return ways[path]
        for inner in filter(None, map(file_of, sorted(modules))):
            if inner not in ways:
                ways[inner] = [*ways[path], name(inner)]
                pending.append(inner)
    return []


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


def test_the_configuration_needs_no_other_room() -> None:
    found = {}
    for path in sorted((ROOT / "cluster" / "config").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        rooms = {module for module in modules if module.startswith("cluster")}
        found[name(path)] = {module for module in rooms if not module.startswith("cluster.config.")}
        assert not {"ray", "torch", "diffusers"} & imports(path)
    assert not {file: rooms for file, rooms in found.items() if rooms}


@pytest.mark.parametrize("driver", ["cluster.train", "cluster.service", "cluster.bench.scale"])
def test_the_driver_stays_light(driver: str) -> None:
    probe = f"import sys, {driver}; sys.exit(', '.join({{'torch', 'diffusers'}} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_functions_are_short() -> None:
    found = {f"{name(path)}:{node.lineno} {node.name}": node for path in SOURCES for node in functions(path)}
    assert not {where: lines(node) for where, node in found.items() if lines(node) > 50}
    assert statistics.median(map(code_lines, found.values())) <= 10


def test_files_are_short() -> None:
    counts = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES + TESTS}
    assert not {file: count for file, count in counts.items() if count > 350}


def test_every_public_name_has_a_docstring() -> None:
    missing = []
    for path in SOURCES:
        module = ast.parse(path.read_text(encoding="utf-8"))
        if ast.get_docstring(module) is None:
            missing.append(name(path))
        missing += undocumented(module, name(path))
    assert not missing


def unplain(docstring: str) -> bool:
    """A docstring that begins as a question would, or that denies with "is no" where "is not a" is plain."""
    return bool(QUESTION.match(docstring) or RIDDLE.search(docstring))


@pytest.mark.parametrize(
    "text", ["What it does.", "Which of them to keep", "True if it is\nno image.", "It is none."]
)
def test_the_rule_for_docstrings_finds_riddles(text: str) -> None:
    assert unplain(text)


@pytest.mark.parametrize(
    "text", ["Return whether it fits.", "Whatever JSON holds.", "An image that is not finite."]
)
def test_the_rule_for_docstrings_passes_plain_ones(text: str) -> None:
    assert not unplain(text)


@pytest.mark.parametrize("package", PLAIN)
def test_docstrings_are_plain(package: str) -> None:
    found = {
        f"{name(path)}:{line}": text.splitlines()[0]
        for path in sorted((ROOT / package).rglob("*.py"))
        if name(path) not in NOT_YET_PLAIN
        for line, text in docstrings(path)
        if unplain(text)
    }
    assert not found


def test_no_file_shadows_the_standard_library() -> None:
    shadows = {"select.py", "profile.py", "statistics.py"}
    assert not [name(path) for path in SOURCES if path.name in shadows]


def test_docker_is_no_package() -> None:
    assert not (ROOT / "docker" / "__init__.py").exists()


def test_tracked_files_name_no_home() -> None:
    found = {name(path): HOME_PATH.findall(path.read_bytes()) for path in tracked()}
    assert not {file: hits for file, hits in found.items() if hits}


def test_tracked_files_are_small() -> None:
    assert not {name(path): size for path in tracked() if (size := path.stat().st_size) > 10 * 2**20}
