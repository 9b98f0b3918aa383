"""Files of version 0.1.0: they load without retired keys, unless these were in use."""

from __future__ import annotations

import asyncio
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import resolve, to_toml, today
from cluster.loop.resume import resumable
from cluster.record.checkpoints import Checkpoints
from cluster.record.marker import from_marker
from cluster.record.run_folder import RunFolder
from cluster.study.store import finished, write_rows
from tests.support.paths import ROOT
from tests.support.saving import SavingLearner

OLD = ROOT / "tests" / "support" / "version_0_1"
CONFIG = OLD / "config.toml"
USED = [
    (
        {"rollout": {"branches": 4}},
        "rollout: branches = 4 is not supported: branches was removed after version 0.1.0",
    ),
    ({"rollout": {"antithetic": True}}, "rollout: antithetic = True is not supported"),
    ({"rewards": [{"name": "shapes", "max_wait": 0.5}]}, "rewards.0: max_wait = 0.5 is not supported"),
    ({"eval_rewards": [{"name": "jpeg", "max_wait": 1}]}, "eval_rewards.0: max_wait = 1 is not supported"),
]


def old_settings() -> dict[str, Any]:
    """The configuration in the marker of an old checkpoint."""
    return from_marker((OLD / "COMMITTED").read_bytes()).settings


def resume(tmp_path: Path, before: dict[str, Any]) -> int:
    """Resume with the old config.toml from a checkpoint with other settings."""
    now, folder, learner = resolve(str(CONFIG), {}), RunFolder(tmp_path / "run"), SavingLearner()
    folder.create(now)
    saved = Checkpoints(str(folder.checkpoints), 2, before)

    async def commit() -> None:
        await saved.commit(2, learner)  # type: ignore[arg-type]
        await saved.settle(learner, wait=True)  # type: ignore[arg-type]

    asyncio.run(commit())
    return resumable(now, folder, saved).step


def contains(whole: Any, part: Any) -> bool:
    """Whether all of a part's values are in the whole, at any depth."""
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list) and len(part) == len(whole):
        return all(contains(a, b) for a, b in zip(whole, part, strict=True))
    return bool(part == whole)


def test_an_old_configuration_means_what_it_did() -> None:
    written = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
    settings = resolve(str(CONFIG), {})
    assert settings == RunSettings.model_validate(old_settings())
    assert (written["rollout"].pop("branches"), written["rollout"].pop("antithetic")) == (1, False)
    assert written["rewards"][0].pop("max_wait") == 0
    now = tomllib.loads(to_toml(settings))
    written = today(written)
    written["learner"]["objective"]["name"] = "flow_grpo"
    assert contains(now, written)  # besides keys that are newer


@pytest.mark.parametrize(("change", "said"), USED)
def test_a_retired_key_that_was_in_use_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(str(CONFIG), change)
    assert said in str(caught.value)
    assert "delete the key" in str(caught.value)


def test_a_retired_key_is_unknown_in_other_sections() -> None:
    with pytest.raises(UserError, match=r"unknown key selection\.branches"):
        resolve("shapes", {"selection": {"branches": 1}})


def test_an_old_checkpoint_continues(tmp_path: Path) -> None:
    assert resume(tmp_path, old_settings()) == 2


def test_a_checkpoint_of_what_is_gone_is_refused(tmp_path: Path) -> None:
    before = old_settings()
    before["rollout"]["branches"] = 2
    with pytest.raises(UserError, match=r"--resume: the checkpoint's configuration: rollout: branches = 2"):
        resume(tmp_path, before)


def test_a_checkpoint_continues_without_a_retired_key_that_was_free_to_change(tmp_path: Path) -> None:
    before = old_settings()
    before["rewards"][0]["max_wait"] = 0.5
    del before["learner"]["ema_every"]  # as if from a version that did not have this key yet
    assert resume(tmp_path, before) == 2


def test_old_results_of_the_study_are_of_the_same_settings(tmp_path: Path) -> None:
    old, now = CONFIG.read_text(encoding="utf-8"), to_toml(resolve(str(CONFIG), {}))
    write_rows(tmp_path / "rows.parquet", [{"step": 0}], {"config": f"{old}\n# design: 3"})
    assert finished(tmp_path / "rows.parquet", {"config": f"{now}\n# design: 3"})
    for other in (f"{now}\n# design: 4", now.replace("seed = 0", "seed = 1") + "\n# design: 3"):
        with pytest.raises(UserError, match="other settings"):
            finished(tmp_path / "rows.parquet", {"config": other})
