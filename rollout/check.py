"""Check of a model and its prompts before any sampler or learner starts: ``python -m rollout.check``.

Reads a `Question` as JSON from standard input and writes a JSON object to standard output: either "refused",
the reason, or "remarks", a list for the user. The model's family is created on torch's meta device by the
samplers' own code: no weights are read, and the messages are those of a run. It is a separate process,
because the driver of a run does not load torch.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from rollout.families.pipeline_parts import read_tokenizers
from rollout.families.prompt_lengths import cut_prompts
from rollout.families.registry import load_policy
from rollout.families.sequence_parallel import check_division
from rollout.settings import ModelSettings, RolloutSettings, Settings

if TYPE_CHECKING:
    from rollout.families.diffusers_policy import DiffusersPolicy


class Question(Settings):
    """A model, its rollout settings, and prompts by the name of their file.

    ``elsewhere`` means that the samplers run on other machines, whose packages are unknown here;
    ``sequence_parallel`` ranks of the learner divide the tokens of a candidate.
    """

    model: ModelSettings
    rollout: RolloutSettings
    prompts: dict[str, tuple[str, ...]]
    elsewhere: bool
    sequence_parallel: int = 1


def remarks_on(question: Question) -> list[str]:
    """Check a configuration and return remarks for the user.

    Raises:
        ValueError: naming the key, the value and what was expected.
        OSError: if a file of the model cannot be read, or is on a hub that cannot be reached.
    """
    model, remarks = question.model, []
    if model.attention is not None and question.elsewhere:
        model, remark = _attention_elsewhere(model)
        remarks.append(remark)
    policy: Any = load_policy(model, question.rollout, device="meta", seed=0, whole=False)
    for key in ("steps", "eval_steps"):
        _check_schedule(policy, key, getattr(question.rollout, key))
    policy.check_text_tokens()
    if question.sequence_parallel > 1:
        check_division(policy, model.attention, question.sequence_parallel)
    readers = policy.text_readers(read_tokenizers(model.path, policy.index))
    return [*remarks, *filter(None, [policy.adapter]), *cut_prompts(readers, question.prompts)]


def _check_schedule(policy: DiffusersPolicy, key: str, steps: int) -> None:
    try:
        policy.schedule(steps)
    except (ValueError, AssertionError, IndexError) as error:
        raise ValueError(f"rollout.{key}: got {steps}, but the model's schedule cannot: {error}") from error


def _attention_elsewhere(model: ModelSettings) -> tuple[ModelSettings, str]:
    """Replace the attention backend by one that works anywhere; return the model and a remark.

    Raises:
        ValueError: if diffusers has no backend of that name.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName

    known = [backend.value for backend in AttentionBackendName]
    if model.attention not in known:
        raise ValueError(f"model.attention: got {model.attention!r}, expected one of {', '.join(known)}")
    remark = f"model.attention: not checked here is whether the nodes have what {model.attention} needs"
    return model.model_copy(update={"attention": "native"}), remark


def answer(question: Question) -> dict[str, str | list[str]]:
    """Check a configuration; return "remarks", or the reason why it is "refused".

    A model on a hub that cannot be reached is not checked, which is then a remark.
    """
    try:
        return {"remarks": remarks_on(question)}
    except OSError as error:
        if Path(question.model.path).is_dir():
            return {"refused": f"model.path: {question.model.path}: {_line(error)}"}
        return {"remarks": [f"model.path: {question.model.path} could not be checked: {_line(error)}"]}
    except ValueError as error:
        return {"refused": _line(error)}
    except Exception as error:
        return {"refused": f"model.path: {question.model.path}: {type(error).__name__}: {_line(error)}"}


def _line(error: Exception) -> str:
    return shorten(str(error), width=1000)


def main() -> None:
    """Answer the question on standard input; output of libraries goes to standard error."""
    gc.disable()  # objects made by imports stay alive: collecting among them takes 1 s
    with redirect_stdout(sys.stderr):
        found = answer(Question.model_validate_json(sys.stdin.read()))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # an orderly shutdown of the libraries takes 1 s as well
