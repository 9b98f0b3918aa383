"""The rules of the house, held by reading the source rather than by running it."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.source_code import SOURCES, TESTS, FunctionNode, name

PLAIN = ("rollout", "rewards", "selection", "learner", "cluster", "examples")
"""Packages whose docstrings are held to the rule."""
QUESTION = re.compile(r"(What|How|Whether|Which|Why)\b")
RIDDLE = re.compile(r"\bis\s+(none|no)\b")
HOME_PATH = re.compile(rb"/(?:home/(?!ray\b)|Users/|root/)[A-Za-z0-9._-]+")


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
