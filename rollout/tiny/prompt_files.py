"""The prompts of the bundled tasks, split into train and held-out files that share no prompt.

Run as ``python -m rollout.tiny.prompt_files`` to write ``{shapes,words}-{train,eval}.jsonl`` to
``rollout/tiny/prompts``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from rollout.tiny.world import scene_prompts

FOLDER: Final = Path(__file__).parent / "prompts"
SPLIT_SEED: Final = 7
HELD_OUT: Final = {
    "single_object": 1,
    "two_object": 3,
    "counting": 3,
    "colors": 5,
    "position": 10,
    "color_attr": 10,
}
TRAINED: Final = {"color_attr": 48}
"""Number of colour pairs in the training file; in all, they outnumber every other category fivefold."""

WORD_LIST: Final = (
    "ace act add age ago aid aim air all and ant any ape arc are ark arm art ash ask axe bad bag ban bar "
    "bat bay bed bee beg bet bid big bin bit bow box boy bud bug bun bus but buy cab can cap car cat cow "
    "cry cub cup cut dad day den dew did dig dim dip dog dot dry due ear eat egg ego elf elk elm end era "
    "eve eye fan far fat fee few fig fin fit fix fly fog for fox fun fur gap gas gem get gum gun gut guy "
    "gym had ham hat hay hen her hid him hip hit hop hot how hub hug hut ice ill ink inn ion its ivy jam "
    "jar jaw jet job joy jug key kid kit lab lap law lay leg let lid lie lip log lot low mad man map mat "
    "men met mix mob mud mug net new nod nor not now nut oak oar odd off oil old one orb our out owl own "
    "pad pan paw pay pea pen pet pie pig pin pit pod pot pub put rag ram ran rat raw red rib rid rim rip "
    "rob rod rot row rub rug run rye sad saw say sea see set shy sin sip sit six ski sky son sun tab "
).split()
HELD_OUT_WORDS: Final = 32


def word_line(word: str) -> dict[str, Any]:
    """Make a prompt line of the words task, with the target in the caption's quotes and in ``text``."""
    return {"tag": "word", "text": word, "prompt": f'a sign that says "{word}"'}


def split_scenes() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split the scene prompts into train and held-out ones, with every category in both."""
    rng = np.random.default_rng(SPLIT_SEED)
    lines = list(scene_prompts())
    train: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    for tag, count in HELD_OUT.items():
        members = [line for line in lines if line["tag"] == tag]
        order = [members[i] for i in rng.permutation(len(members))]
        held += order[:count]
        train += order[count : count + TRAINED.get(tag, len(members))]
    return train, held


def split_words() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split the word prompts into train and held-out ones."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(WORD_LIST))
    lines = [word_line(WORD_LIST[i]) for i in order]
    return lines[HELD_OUT_WORDS:], lines[:HELD_OUT_WORDS]


def _write(name: str, lines: Iterable[dict[str, Any]]) -> None:
    FOLDER.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (FOLDER / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main() -> None:
    """Write the four prompt files."""
    for task, (train, held) in {"shapes": split_scenes(), "words": split_words()}.items():
        _write(f"{task}-train", train)
        _write(f"{task}-eval", held)


if __name__ == "__main__":
    main()
