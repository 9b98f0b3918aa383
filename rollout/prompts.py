"""Prompt files, and the order in which a run uses their prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from rollout.noise import derive_seed
from rollout.records import Prompt
from rollout.text_files import TextFileError, read_text, visible

SHOWN: Final = 10
"""Number of a file's faults that a message lists; the others are counted."""


class PromptFileError(ValueError):
    """A prompt file cannot be used; the message names the file, the lines and what was expected."""


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Read a ``.jsonl`` file (an object with "prompt" per line) or a ``.txt`` file (a prompt per line).

    Blank lines are skipped. A prompt keeps its invisible characters, which some scripts and emoji need, but
    is refused if it has no others.

    Raises:
        PromptFileError: if the file is missing, empty, not UTF-8 or has broken lines.
    """
    if path.suffix not in _PARSERS:
        raise PromptFileError(f"{path}: expected a .jsonl or .txt prompt file")
    try:
        lines = read_text(path).split("\n")  # splitlines() also cuts at U+2028
    except TextFileError as error:
        raise PromptFileError(str(error)) from None
    except OSError as error:
        raise PromptFileError(f"{path}: cannot read the prompt file: {error}") from error
    prompts: list[Prompt] = []
    faults: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            origin = f"{path}:{number}"
            try:
                text, metadata = _PARSERS[path.suffix](line)
            except ValueError as error:
                faults.append(f"{origin}: {error}")
            else:
                prompts.append(Prompt(index=len(prompts), text=text, metadata=metadata, origin=origin))
    if faults:
        raise PromptFileError(listed(faults))
    if not prompts:
        raise PromptFileError(f"{path}: holds no prompt")
    return tuple(prompts)


def listed(faults: Sequence[str]) -> str:
    """Join the first ten faults into one line that ends with the number of the rest."""
    others = len(faults) - SHOWN
    return "; ".join([*faults[:SHOWN], *([f"and {others} more"] if others > 0 else [])])


def _plain_line(line: str) -> tuple[str, dict[str, Any]]:
    if not visible(line):
        raise ValueError(f"only invisible characters: {line[:80]!a}")
    return line.strip(), {}


def _json_line(line: str) -> tuple[str, dict[str, Any]]:
    try:
        fields: Any = json.loads(line, object_pairs_hook=_object)
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!a} is half of a character: {line[:80]!r}") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ValueError(f"not JSON ({reason}): {line[:80]!r}") from None
    text = fields.pop("prompt", None) if isinstance(fields, dict) else None
    if not isinstance(text, str) or not visible(text):
        raise ValueError(f'expected an object with a non-empty string "prompt": {line[:80]!r}')
    return text, fields


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and refuse repeated keys, of which Python would silently drop the first."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} is repeated")
    return fields


_PARSERS: Final = {".txt": _plain_line, ".jsonl": _json_line}


def prompt_at(prompts: tuple[Prompt, ...], seed: int, position: int) -> Prompt:
    """Return the prompt at a position of the seeded order, in which every epoch is a new permutation.

    A pure function of its arguments, so that a resumed run needs no sampler state.
    """
    epoch, offset = divmod(position, len(prompts))
    order = np.random.default_rng(derive_seed("prompts", seed, epoch)).permutation(len(prompts))
    return prompts[int(order[offset])]
