"""Encode all prompts of a run beforehand, after which its samplers load no text encoders.

The embeddings go to ``rollout.embeddings``; those that are there already are left. For SD3.5 this frees 11
of a sampler's GB. The text encoders need their memory once, on a GPU if there is one.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.progress import track

from cluster.config.command import Parser, Status, guarded, program, read, required
from cluster.config.errors import UserError
from cluster.config.sources import resolve
from rollout.prompts import PromptFileError, load_prompts


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    parser = Parser(
        keys=True,
        prog=program("embed"),
        usage="%(prog)s PRESET_OR_TOML --rollout.embeddings FOLDER [--section.key VALUE ...]",
        description=__doc__,
    )
    _, source, overrides = read(parser, arguments)
    settings = resolve(required(source), overrides)
    if settings.rollout.embeddings is None:
        raise UserError("rollout.embeddings: expected the folder for the embeddings, got none")
    try:
        prompts = [load_prompts(path) for path in (settings.prompts.train, settings.prompts.eval)]
    except PromptFileError as error:
        raise UserError(str(error)) from None
    texts = list(dict.fromkeys(prompt.text for listed in prompts for prompt in listed))

    import torch

    from rollout.tools.embed import fill

    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoded = fill(settings.model, settings.rollout, texts, device)
    for _ in track(encoded, description=f"encoding on {device}", total=len(texts)):
        pass
    print(f"{len(texts)} prompts are in {settings.rollout.embeddings}")
    return Status.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
