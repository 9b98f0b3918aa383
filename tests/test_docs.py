"""The documentation against the code: names that it lists, files that it includes, links that it follows."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest
import yaml

from cluster.config.settings import RunSettings
from cluster.config.sources import resolve
from cluster.loop.course import course_of
from cluster.record.checkpoints import checkpoints_of
from cluster.record.run_folder import RunFolder
from docs.hooks import expand, foreign, homes, includes
from docs.settings_reference import keys, sections, settings_reference
from rewards.combine import combine
from rewards.image_statistics import group_statistics
from rewards.scorer import Judgement
from selection.ledger import ledger_schema
from selection.selector import Selector
from selection.settings import SelectionSettings
from selection.strategies import STRATEGIES
from tests.support.paths import ROOT

DOCS: Final = ROOT / "docs"
PAGES: Final = sorted(DOCS.rglob("*.md"))
GUIDES: Final = [
    ROOT / name
    for name in (
        "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "BENCHMARKS.md", "CODE_OF_CONDUCT.md",
        "rewards/README.md", "rollout/README.md", "examples/README.md", "docker/README.md",
        "cluster/kuberay/README.md",
    )
]  # fmt: skip
LINK: Final = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
RUN_FOLDER: Final = (DOCS / "run-folder.md").read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The anchors of a page's titles, as Markdown readers make them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles
    }


def whole(page: Path) -> str:
    """The text of a page, with what it includes."""
    text = page.read_text(encoding="utf-8")
    return expand(text, page.relative_to(DOCS).as_posix()) if DOCS in page.parents else text


@pytest.mark.parametrize("page", [*GUIDES, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and path.suffix == ".md" and anchor not in anchors(whole(path))):
            broken.append(f"{target}#{anchor}")
    assert broken == []


def test_every_page_is_in_the_navigation() -> None:
    def leaves(node: Any) -> set[str]:
        inner = node if isinstance(node, list) else node.values() if isinstance(node, dict) else None
        return {node} if inner is None else {leaf for one in inner for leaf in leaves(one)}

    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert leaves(yaml.safe_load(text)["nav"]) == {page.relative_to(DOCS).as_posix() for page in PAGES}


def test_what_is_included_exists() -> None:
    found = [(path, needed) for page in PAGES for path, needed in includes(page)]
    assert {path for path, needed in found if needed and not (ROOT / path).is_file()} == set()
    assert {"rewards/README.md", "rollout/README.md", "RESULTS.md", "SECURITY.md"} <= {
        path for path, _ in found
    }


def test_an_included_file_loses_its_title_and_links_to_pages() -> None:
    text = expand((DOCS / "rollout.md").read_text(encoding="utf-8"), "rollout.md")
    assert re.findall("^# .*", text, re.MULTILINE) == ["# Rollout"]
    assert "[rewards/README.md](rewards.md)" in text
    assert "](../" not in text


def test_a_link_to_what_has_no_page_becomes_text() -> None:
    assert expand(
        "[the licence](../LICENSE) and [the guide](../rewards/README.md#your-own)", "learner.md"
    ) == ("the licence and [the guide](rewards.md#your-own)")
    assert expand("[it](../learner.md)", "guides/family.md") == "[it](../learner.md)"
    assert homes()["rewards/README.md"] == "rewards.md"


def test_an_optional_file_may_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("docs.hooks.ROOT", tmp_path)
    assert "not part of this checkout" in expand("<!-- include: examples/none.py optional -->", "index.md")
    with pytest.raises(FileNotFoundError):
        expand("<!-- include: examples/none.py -->", "index.md")


def test_what_a_page_loads_from_elsewhere_is_found() -> None:
    loaded = '<script src="https://a.example/x.js"></script><link rel="stylesheet" href=//b.example/y.css>'
    style = "@font-face { src: url('https://c.example/z.woff2') }"
    linked = '<a href="https://d.example">d</a><script src="assets/own.js"></script>'
    assert foreign(loaded) == ["https://a.example/x.js", "//b.example/y.css"]
    assert foreign(style) == ["https://c.example/z.woff2"]
    assert foreign(linked) == []


def test_the_settings_reference_has_every_key() -> None:
    def dumped(values: Any, prefix: str = "") -> set[str]:
        if isinstance(values, dict) and values:
            return {key for name, one in values.items() for key in dumped(one, f"{prefix}{name}.")}
        if isinstance(values, tuple) and values and isinstance(values[0], dict):
            return dumped(values[0], prefix)
        return {prefix.removesuffix(".")}

    settings = RunSettings.model_validate(
        {
            "prompts": {"train": "a.txt", "eval": "b.txt"},
            "model": {"path": "m"},
            "rewards": [{"name": "jpeg"}],
            "eval_rewards": [{"name": "jpeg"}],
        }
    )
    wanted = dumped(settings.model_dump())
    assert wanted <= set(keys())
    assert settings_reference().count('<span id="') >= len(wanted) - len(_of("[[eval_rewards]]"))


def _of(heading: str) -> set[str]:
    return {key for name, model in sections() if name == heading for key in model.model_fields}


def test_the_settings_reference_says_range_choices_and_default() -> None:
    rows = {row.split('"')[1]: row for row in settings_reference().splitlines() if row.startswith("| <span")}
    assert rows["selection.candidates"].split(" | ")[1:3] == ["integer ≥ 2", "`16`"]
    assert "one of `sde`, `cps`" in rows["rollout.dynamics"]
    assert rows["model.path"].split(" | ")[1:3] == ["text", "required"]
    assert "number > 0, ≤ 1.5" in rows["rollout.noise_level"]
    assert "integer ≥ 1 or none" in rows["rollout.window_size"]


def test_every_strategy_is_described() -> None:
    table = (
        (DOCS / "selection.md").read_text(encoding="utf-8").partition("| `selection.strategy` | keeps |")[2]
    )
    assert set(re.findall(r"^\| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE)) == set(STRATEGIES)


def test_every_column_of_the_ledger_is_described() -> None:
    table = RUN_FOLDER.partition("## The ledger")[2].partition("##")[0]
    described = set(re.findall(r"`(\w+)`", table))
    assert set(ledger_schema([]).names) | {"reward_NAME"} <= described


def test_the_observers_are_listed_in_their_order(tmp_path: Path) -> None:
    inputs: Any = SimpleNamespace(train=(), held_out=())
    stages: Any = SimpleNamespace(saver=None)
    settings, folder = resolve("shapes", {}), RunFolder(tmp_path)
    course = course_of(settings, inputs, folder, checkpoints_of(settings, folder), stages, ())
    listed = re.findall(r"^\| `(\w+)` \|", (DOCS / "loop.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [type(observer).__name__ for observer in course.run.observers]


def test_the_metrics_of_selection_and_of_images_are_described() -> None:
    described = set(re.findall(r"`(\w+)`", RUN_FOLDER.partition("## Metrics")[2].partition("\n## ")[0]))
    scores = combine({"r": Judgement(values=np.ones(4), valid=np.ones(4, dtype=np.bool_))}, {"r": 1.0})
    selected = Selector(SelectionSettings(candidates=4, keep=2), seed=0).select(1, [0], [scores])
    images = group_statistics(np.zeros((2, 8, 8, 3), dtype=np.uint8))
    assert set(selected.metrics) | {f"image_{name}" for name in images} <= described


def test_the_workflow_has_few_rights_and_pinned_actions() -> None:
    text = (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", used) for used in re.findall(r"uses: (\S+)", text))
    commands = {step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {"make test", "make docs"} <= commands
    assert {c.removeprefix("make ") for c in commands if c.startswith("make ")} <= targets | {".venv/.ready"}


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem
)
def test_the_forms_are_yaml(form: Path) -> None:
    values = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.stem != "config":
        named = [part["id"] for part in values["body"] if part["type"] != "markdown"]
        assert len(named) == len(set(named)) >= 3
