"""Which prompts a reward refuses, by file and line; needs no weights."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rollout.prompts import listed
from rollout.records import Prompt


def objection(scorer: type[Any], prompt: Prompt) -> str:
    """Say where a prompt stands and what a scorer's class has against it; empty if it suits."""
    where = prompt.origin or f"prompt {prompt.index}"
    try:
        scorer.check(prompt)
    except ValueError as error:
        return f"{where}: {error}"
    except Exception as error:  # a check of the user's own, which may stumble over what it did not expect
        return f"{where}: {type(error).__name__}: {error}"
    return ""


def refusal(name: str, scorer: type[Any], prompts: Collection[Prompt]) -> str:
    """Say in one line how many prompts do not suit a reward and where the first stand; empty if all suit."""
    faults = [fault for prompt in prompts if (fault := objection(scorer, prompt))]
    counted = f"{len(faults)} of {len(prompts)} prompts do not suit reward {name}"
    return f"{counted}: {listed(faults)}" if faults else ""
