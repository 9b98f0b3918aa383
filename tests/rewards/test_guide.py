"""The guide is run as written: its files are saved, its commands started, its messages parsed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from cluster.config.sources import resolve as resolve_run
from rewards.registry import REWARDS, resolve
from rewards.scorers.geneval_rules import TAGS
from rewards.scorers.ocr import target_text
from rewards.settings import RewardSettings
from rewards.suitability import refusal
from rewards.wire_format import Health, ScoreResponse, parse
from rewards.worker import RewardWorker
from rollout.prompts import load_prompts
from rollout.records import Prompt
from tests.support.reward_servers import ROOT, environment, served

GUIDE = (ROOT / "rewards" / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def commands(start: str) -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith(start)]
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example's two files where a user saves them: the folder that the commands start from."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "warmth.py").write_text(blocks("python")[0])
    (folder / "warmth.toml").write_text(next(block for block in blocks("toml") if "warmth" in block))
    for part in ("rewards", "rollout", "cluster"):
        (folder / part).symlink_to(ROOT / part)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("command", commands("python -m rewards.check"), ids=" ".join)
def test_the_checks_run(saved: Path, command: list[str]) -> None:
    done = run(command, saved)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "range" in done.stdout


def test_the_example_scores_as_it_says(saved: Path) -> None:
    configured = resolve_run(str(saved / "warmth.toml"), {})
    reward = configured.rewards[0]
    scorer = resolve(reward.name)
    for prompt in load_prompts(ROOT / configured.prompts.train):
        scorer.check(prompt)
    with pytest.raises(ValueError, match=r"^a night is not warm"):
        scorer.check(Prompt(index=4, text="a starry night"))
    images = np.zeros((3, 4, 4, 3), dtype=np.uint8)
    images[0, ..., 0], images[1, ..., 2] = 255, 255
    judgement = RewardWorker(reward.name, reward.options).score(images, [Prompt(index=0, text="a")] * 3)
    assert judgement.values[:2].tolist() == [1.0, -1.0]
    assert judgement.valid.tolist() == [True, True, False]


def test_the_example_is_served_and_scored_from_afar(saved: Path) -> None:
    (command,) = commands("python -m rewards.serve")
    port = command.index("--port")
    with served(*command[2:port], own=saved) as server:
        listed = next(t for t in map(tomllib.loads, blocks("toml")) if t["rewards"][0]["name"] == "remote")
        remote = RewardSettings.model_validate(listed["rewards"][0])
        assert remote.options["url"].endswith(f":{command[port + 1]}")
        images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
        asked = [Prompt(index=i, text="a") for i in range(5)]
        far = RewardWorker("remote", {**remote.options, "url": server.url}).score(images, asked)
    near = RewardWorker("warmth:WarmthScorer", {"darkest": 8}).score(images, asked)
    assert far.values.tobytes() == near.values.tobytes()
    assert far.details["red"].tobytes() == near.details["red"].tobytes()


def test_the_messages_follow_the_protocol() -> None:
    request, response, health = (block.encode() for block in blocks("json"))
    parse(ScoreResponse, response)
    parse(Health, health)
    with served("shapes") as server:
        assert httpx.get(f"{server.url}/health").json() == json.loads(health)
        answer = httpx.post(f"{server.url}/score", content=request)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("images[0]: expected image/png")  # all else was as it should be


def test_the_lines_of_prompts_suit_their_rewards(tmp_path: Path) -> None:
    for reward, block in zip(("geneval", "ocr"), blocks("jsonl"), strict=True):
        path = tmp_path / f"{reward}.jsonl"
        path.write_text(block, encoding="utf-8")
        assert refusal(reward, resolve(reward), load_prompts(path)) == ""
    asked = [prompt.metadata["tag"] for prompt in load_prompts(tmp_path / "geneval.jsonl")]
    assert sorted(asked) == sorted(TAGS)
    named = {target_text(prompt) for prompt in load_prompts(tmp_path / "ocr.jsonl")}
    assert named == {"openallday"}


def test_every_built_in_reward_is_listed() -> None:
    assert {f"| `{name}` |" for name in REWARDS} <= set(re.findall(r"^\| `\w+` \|", GUIDE, re.MULTILINE))
    for block in blocks("toml"):
        for reward in tomllib.loads(block)["rewards"]:
            RewardSettings.model_validate(reward)
