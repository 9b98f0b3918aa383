"""The front door: ``python -m cluster COMMAND ...``."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, Final

from cluster.config.command import guarded, program
from cluster.config.errors import UserError
from cluster.process import leave

COMMANDS: Final = {
    "train": ("cluster.train", "train a model, or continue a run"),
    "plan": ("cluster.plan.__main__", "say whether a run fits, how long a step takes and what it costs"),
    "submit": ("cluster.submit.__main__", "run on a Ray cluster elsewhere, and look after runs there"),
    "watch": ("cluster.watch.__main__", "show a run in a terminal while it goes on"),
    "report": ("cluster.report.__main__", "make the report of a run again"),
    "export": ("cluster.export.__main__", "make a LoRA or a pipeline for diffusers from a checkpoint"),
    "study": ("cluster.study.__main__", "study what drives learning, with one's own model and reward"),
    "bench": ("cluster.bench.__main__", "measure sampler, learner, service and rewards"),
}
"""A module per command, loaded when asked for, and its line in the list."""


@guarded
def main(arguments: list[str]) -> int:
    """Run a command; returns its exit status."""
    name, *rest = arguments or ["--help"]
    if name in COMMANDS:
        command: Any = import_module(COMMANDS[name][0])
        return int(command.main(rest))
    if name == "--version":
        print(_version())
    elif name in ("-h", "--help"):
        print(_listed())
    else:
        raise UserError(f"no command {name!r}; there is {', '.join(COMMANDS)}")
    return 0


def _version() -> str:
    from cluster.config.version import commit, version

    return f"NoiseMargin {version()}" + (f" ({commit()})" if commit() else "")


def _listed() -> str:
    lines = "\n".join(f"  {name:<8} {line}" for name, (_, line) in COMMANDS.items())
    return (
        f"usage: {program('COMMAND ...')}\n\n"
        f"Reinforcement learning for flow-based diffusion models.\n\n{lines}\n\n"
        f"{program('COMMAND --help')} says more of each; {program('--version')} prints version and commit."
    )


if __name__ == "__main__":
    status = main(sys.argv[1:])
    leave(status) if "ray" in sys.modules else sys.exit(status)
