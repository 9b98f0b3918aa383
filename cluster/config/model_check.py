"""Check a run's model and prompts in a process that loads torch, so that the driver does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from cluster.config.address import joined
from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from rollout.records import Prompt

ROOT = Path(__file__).resolve().parents[2]


def check_model(settings: RunSettings, train: tuple[Prompt, ...], held_out: tuple[Prompt, ...]) -> list[str]:
    """Check the model, the sampler and the lengths of prompts, and return remarks for the user.

    Raises:
        UserError: naming the key, the value and what was expected.
    """
    prompts = settings.prompts
    files = ((prompts.train, train), (prompts.eval, held_out))
    question = {
        "model": settings.model.model_dump(mode="json"),
        "rollout": settings.rollout.model_dump(mode="json"),
        "prompts": {str(path): [prompt.text for prompt in read] for path, read in files},
        "elsewhere": bool(joined(settings.cluster)),
        "sequence_parallel": settings.learner.sequence_parallel,
    }
    answer = json.loads(_ask(json.dumps(question)))
    if reason := answer.get("refused"):
        raise UserError(reason)
    remarks: list[str] = answer["remarks"]
    return remarks


@lru_cache(maxsize=1)
def _ask(question: str) -> str:
    """Run `rollout.check`, whose libraries take a GB, in a process of its own, once per question."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "rollout.check"],
        input=question, capture_output=True, text=True, encoding="utf-8", check=False,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"model: its check ended with status {done.returncode} and without a result: {last}")
    return done.stdout


def check_embeddings(settings: RunSettings) -> None:
    """Check that the folder of embeddings can be written, where the samplers run on this machine.

    Raises:
        UserError: naming the folder and the obstacle.
    """
    folder = settings.rollout.embeddings
    if folder is None or joined(settings.cluster):
        return
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"rollout.embeddings: got {folder}, expected a folder, but {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"rollout.embeddings: got {folder}, but {existing} cannot be written to")
