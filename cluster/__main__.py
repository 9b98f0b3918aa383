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
    "plan": ("cluster.plan.__main__", "estimate the memory, time and cost of a run"),
    "embed": ("cluster.embed", "encode prompts beforehand, so that samplers load no text encoders"),
    "submit": ("cluster.submit.__main__", "run as a job of a remote Ray cluster, and manage runs there"),
    "watch": ("cluster.watch.__main__", "show a run's progress in a terminal"),
    "report": ("cluster.report.__main__", "write the report of a run again"),
    "export": ("cluster.export.__main__", "export a LoRA or a pipeline for diffusers from a checkpoint"),
    "study": ("cluster.study.__main__", "compare selection rules on your own model and reward"),
    "bench": ("cluster.bench.__main__", "benchmark sampler, learner, service and rewards"),
}
"""The module of each command, imported when the command is used, and its line in the list."""


@guarded
def main(arguments: list[str]) -> int:
    """Run a command and return its exit status."""
    name, *rest = arguments or ["--help"]
    if name in COMMANDS:
        command: Any = import_module(COMMANDS[name][0])
        return int(command.main(rest))
    if name == "--version":
        print(_version())
    elif name in ("-h", "--help"):
        print(_listed())
    else:
        raise UserError(f"no command {name!r}; commands are {', '.join(COMMANDS)}")
    return 0


def _version() -> str:
    from cluster.config.version import commit, version

    return f"NoiseMargin {version()}" + (f" ({commit()})" if commit() else "")


def _listed() -> str:
    lines = "\n".join(f"  {name:<8} {line}" for name, (_, line) in COMMANDS.items())
    return (
        f"usage: {program('COMMAND ...')}\n\n"
        f"Reinforcement learning for flow-based diffusion models.\n\n{lines}\n\n"
        f"{program('COMMAND --help')} describes a command; {program('--version')} prints version and commit."
    )


if __name__ == "__main__":
    status = main(sys.argv[1:])
    leave(status) if "ray" in sys.modules else sys.exit(status)
