"""The README against the code and the records: its numbers, commands, names and links."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import pytest

from cluster.config.sources import parse_overrides, preset_names, resolve
from tests.support.paths import ROOT

README: Final = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS: Final = (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
RESULTS: Final = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
TASKS: Final = ("shapes", "words", "preference")
MOST_WORDS: Final = 1600
SCREEN: Final = 45
"""Lines, on which there is one table at most."""
CLAIM: Final = re.compile(r"\| [^|]*`(?P<arm>\w+)` \| (?P<counted>steps|compute) \| (?P<cells>.*) \|")
FENCED: Final = re.compile(r"^```(?P<language>\w*)\n(?P<lines>.*?)^```$", re.MULTILINE | re.DOTALL)

NEEDS_A_GPU: Final = {
    "python -m cluster plan sd35-geneval --gpus 8",  # and the model's configuration, from a hub
    "python -m cluster train sd35-geneval --dry-run",  # and the prompts, which are not shipped
}
NEEDS_A_CLUSTER: Final = {
    "python -m cluster submit sd35-geneval --name pick-1",
    "python -m cluster submit status pick-1",
    "kubectl apply -k cluster/kuberay/overlays/cpu-smoke",
}
NEEDS_A_RUN: Final = {
    "python -m cluster train --resume runs/RUN",
    "python -m cluster export runs/RUN --what pipeline --ema",
}
DRY: Final = {"python -m cluster train shapes --selection.candidates 32 --selection.keep 8 --steps 40"}
ELSEWHERE: Final = {
    "python -m cluster",  # the front door's own tests
    "python -m rewards.check shapes",  # tests/rewards/test_guide.py
}


@dataclass(frozen=True)
class Ratio:
    """A ratio with its interval; ``bounded`` marks one that is at most that."""

    value: float
    low: float
    high: float
    bounded: bool

    def __str__(self) -> str:
        return f"{'≤ ' * self.bounded}{self.value} ({self.low} to {self.high})"


def ratio(cell: str) -> Ratio:
    value, low, high = map(float, re.findall(r"\d+\.\d+", cell))
    return Ratio(value, low, high, "≤" in cell)


def prose() -> str:
    """The README without blocks of code, code in the text, and targets of links."""
    return re.sub(r"`[^`]*`|\]\([^)]*\)|\[\d{4}\.\d{5}", "", FENCED.sub("", README))


def recorded(task: str) -> dict[tuple[str, str], Ratio]:
    """What RESULTS.md says of a task's arms, by arm and what is counted."""
    section = RESULTS.partition(f"\n## {task}\n")[2].partition("\n## ")[0]
    table = section.partition("**To the baseline's final held-out score.**")[2].partition("\n\n**")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {
        (row[0], counted): ratio(cell)
        for row in rows
        for counted, cell in zip(head[2:], row[2:], strict=True)
    }


def claims() -> Iterator[tuple[str, str, str, Ratio]]:
    """Arm, what is counted, task and ratio of every cell in the README's table of results."""
    for line in README.splitlines():
        if found := re.match(
            r"\| [^|]*`(?P<arm>\w+)` \| (?P<counted>steps|compute) \| (?P<cells>.*) \|", line
        ):
            for task, cell in zip(TASKS, found["cells"].split(" | "), strict=True):
                yield found["arm"], found["counted"], task, ratio(cell)


def test_it_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS
    tables = [n for n, line in enumerate(README.splitlines()) if line.startswith("|---")]
    assert all(later - earlier >= SCREEN for earlier, later in pairwise(tables))


def test_the_results_are_those_of_the_study() -> None:
    told = list(claims())
    assert len(told) == 7 * len(TASKS)
    for arm, counted, task, said in told:
        found = recorded(task)[arm, counted]
        assert said.bounded == found.bounded, (arm, task)
        for ours, theirs in zip(
            (said.value, said.low, said.high), (found.value, found.low, found.high), strict=True
        ):
            assert abs(ours - theirs) <= 0.0055, f"{arm} on {task}: README {said}, RESULTS.md {found}"


@pytest.mark.parametrize("arm", ["noise_margin_2x", "screened_4x_margin_2x_early"])
def test_the_first_numbers_are_the_range_over_the_tasks(arm: str) -> None:
    values = [recorded(task)[arm, "steps"].value for task in TASKS]
    assert f"**{min(values):.1f} to {max(values):.1f} times fewer" in README.replace("\n", " ")


def test_every_other_number_is_measured() -> None:
    """But for the table and its range, which have tests of their own, and for versions."""
    lines = [line for line in prose().splitlines() if not re.search(r"^\|.*\d \(", line)]
    rest = re.sub(r"\d+\.\d+ to \d+\.\d+ times fewer", "", "\n".join(lines).replace("\n", " "))
    numbers = set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.]*\d)", rest)) - {"2.2", "3.11", "2.0"}
    assert {"0.255", "0.947", "9.7"} <= numbers
    assert {n for n in numbers if not re.search(rf"(?<![\d.]){re.escape(n)}(?!\d)", BENCHMARKS)} == set()


def commands() -> set[str]:
    blocks = [found["lines"] for found in FENCED.finditer(README) if not found["language"]]
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:python -m|make|kubectl) [^`\n]+)`", FENCED.sub("", README))
    return {line for line in [*lines, *inline] if line}


def test_every_command_is_accounted_for() -> None:
    known = NEEDS_A_GPU | NEEDS_A_CLUSTER | NEEDS_A_RUN | DRY | ELSEWHERE
    others = commands() - known
    assert known <= commands()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert {line for line in others if line.removeprefix("make ") not in targets} == set()


@pytest.mark.parametrize("command", sorted(NEEDS_A_GPU | NEEDS_A_CLUSTER))
def test_what_cannot_be_run_here_is_spelled_right(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "kubectl":
        assert (ROOT / words[-1] / "kustomization.yaml").is_file()
        return
    tool, *rest = words[3:]
    assert (ROOT / "cluster" / f"{tool}.py").exists() or (ROOT / "cluster" / tool / "__main__.py").exists()
    source = (ROOT / "cluster" / tool / "__main__.py", ROOT / "cluster" / "train.py")
    text = next(path for path in source if path.exists()).read_text(encoding="utf-8")
    assert rest[0] in preset_names() or f'"{rest[0]}"' in text
    assert all(f'"{flag}"' in text for flag in rest if flag.startswith("--"))


def run(command: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a command by its older spelling, which works with and without the front door."""
    words = [sys.executable, *shlex.split(command.replace("-m cluster ", "-m cluster."))[1:], *more]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("command", sorted(DRY))
def test_what_trains_resolves_and_plans(command: str) -> None:
    done = run(command, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "candidates = 32" in done.stdout


@pytest.mark.parametrize("command", sorted(NEEDS_A_RUN))
def test_what_needs_a_run_asks_for_that_run(command: str) -> None:
    done = run(command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "runs/RUN" in done.stderr


def test_the_overrides_are_keys() -> None:
    flags = re.findall(r"`((?:--[a-z]+\.[a-z_]+ [0-9.]+ ?)+)`", README)
    assert flags
    for line in flags:
        resolve("shapes", parse_overrides(shlex.split(line), "README"))


def test_the_presets_are_those_that_ship() -> None:
    listed = README.partition("These presets ship:\n\n")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([\w-]+)`", listed)) == set(preset_names())
