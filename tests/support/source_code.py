"""Read the source: which file imports what."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.support.paths import ROOT

LAYERS = ("rollout", "rewards", "selection", "learner", "cluster")
SOURCES = sorted(path for folder in (*LAYERS, "examples") for path in (ROOT / folder).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))

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
