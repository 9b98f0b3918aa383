"""Prompt files and the order in which a run walks through them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rollout.noise import derive_seed
from rollout.records import Prompt
from rollout.text_files import TextFileError, read_text, visible


class PromptFileError(ValueError):
    """A prompt file cannot be used; the message names the file, the line and what was expected."""


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a ``.jsonl`` file (an object with "prompt" per line) or a ``.txt`` file (a prompt per line).

    Blank lines are skipped. A prompt keeps its invisible characters, which some scripts and emoji need, but
    is refused if it has no others.

    Raises:
        PromptFileError: if the file is missing, no UTF-8, empty or has a broken line.
    """
    if path.suffix not in {".jsonl", ".txt"}:
        raise PromptFileError(f"{path}: expected a .jsonl or .txt prompt file")
    try:
        lines = read_text(path).split("\n")  # splitlines() also cuts at U+2028
    except TextFileError as error:
        raise PromptFileError(str(error)) from None
    except OSError as error:
        raise PromptFileError(f"{path}: cannot read the prompt file: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise PromptFileError(f"{path}: holds no prompt")
    return tuple(_parse(path, number, line, index) for index, (number, line) in enumerate(numbered))


def _parse(path: Path, number: int, line: str, index: int) -> Prompt:
    if path.suffix == ".txt":
        if not visible(line):
            raise PromptFileError(f"{path}:{number}: only invisible characters: {line[:80]!a}")
        return Prompt(index=index, text=line.strip())
    try:
        fields: Any = json.loads(line)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise PromptFileError(f"{path}:{number}: {half!a} is half of a character: {line[:80]!r}") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise PromptFileError(f"{path}:{number}: not JSON ({reason}): {line[:80]!r}") from error
    text = fields.get("prompt") if isinstance(fields, dict) else None
    if not isinstance(text, str) or not visible(text):
        raise PromptFileError(
            f'{path}:{number}: expected an object with a non-empty string "prompt": {line[:80]!r}'
        )
    return Prompt(index=index, text=text, metadata={k: v for k, v in fields.items() if k != "prompt"})


def prompt_at(prompts: tuple[Prompt, ...], seed: int, position: int) -> Prompt:
    """The prompt at a position of the endless, seeded walk: every epoch is a fresh permutation.

    A pure function of its arguments, so that a resumed run needs no sampler state.
    """
    epoch, offset = divmod(position, len(prompts))
    order = np.random.default_rng(derive_seed("prompts", seed, epoch)).permutation(len(prompts))
    return prompts[int(order[offset])]
