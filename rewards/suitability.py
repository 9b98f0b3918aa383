"""Checks of prompts against a reward, reported by file and line; no weights are needed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rollout.prompts import listed
from rollout.records import Prompt


def objection(scorer: type[Any], prompt: Prompt) -> str:
    """Describe why a scorer's class refuses a prompt, with its file and line; empty if it accepts it."""
    where = prompt.origin or f"prompt {prompt.index}"
    try:
        scorer.check(prompt)
    except ValueError as error:
        return f"{where}: {error}"
    except Exception as error:  # a check of the user's own, which may stumble over what it did not expect
        return f"{where}: {type(error).__name__}: {error}"
    return ""


def refusal(name: str, scorer: type[Any], prompts: Collection[Prompt]) -> str:
    """Count the prompts that do not suit a reward and list the first, in one line; empty if all suit."""
    faults = [fault for prompt in prompts if (fault := objection(scorer, prompt))]
    counted = f"{len(faults)} of {len(prompts)} prompts do not suit reward {name}"
    return f"{counted}: {listed(faults)}" if faults else ""
