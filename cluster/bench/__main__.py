"""Measure a part of NoiseMargin.

Each benchmark prints medians with their spread as a table, and with --json writes every value, the command
and the machine.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cluster.config.command import Parser, Status, guarded, program
from cluster.config.errors import UserError
from cluster.process import leave

PROG: Final = "python -m cluster.bench"
"""The spelling of the command in reports."""

BENCHMARKS: Final = {
    "sampler": ("cluster.bench.sampler", "our sampler against the diffusers pipeline"),
    "learner": ("cluster.bench.learner", "updates: pairs per second, FLOPs, share of the peak, memory"),
    "step": ("cluster.bench.step", "a training step against a straightforward loop"),
    "weights": ("cluster.bench.weights", "full weights to two samplers (Ray)"),
    "rewards": ("cluster.bench.rewards", "OCR, in one process and over replicas (Ray)"),
    "scale": ("cluster.bench.scale", "one driver over 1 to 64 simulated samplers (Ray)"),
    "busy": ("cluster.bench.busy", "a run beside processes that keep cores busy (Ray)"),
    "overhead": (
        "cluster.bench.overhead",
        "a step of the service against the same loop in one process (Ray)",
    ),
}
"""A module per benchmark, loaded when asked for: those without Ray run on machines that lack it.

A module has ``options(parser)`` and ``measure(options, rest)``, which returns a `Report`.
"""

CONFIGURED: Final = frozenset({"busy", "overhead"})
"""Benchmarks in which every key of the configuration can be overridden."""


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    name, *rest = arguments or ["--help"]
    if name in BENCHMARKS:
        return _run(name, rest)
    listed = "\n".join(f"  {one:<10} {what}" for one, (_, what) in BENCHMARKS.items())
    if name not in ("-h", "--help"):
        raise UserError(f"no benchmark {name!r}; there is {', '.join(BENCHMARKS)}")
    print(
        f"usage: {program('bench NAME ...')}\n\n{__doc__}\n{listed}\n\n"
        f"{program('bench NAME --help')} says more of each."
    )
    return Status.DONE


def _run(name: str, arguments: Sequence[str]) -> int:
    module: Any = import_module(BENCHMARKS[name][0])
    parser = Parser(keys=name in CONFIGURED, prog=program(f"bench {name}"), description=module.__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    module.options(parser)
    options, rest = parser.parse_known_args(arguments)
    report = module.measure(options, rest)
    Console().print(report.table())
    if options.json:
        report.write(options.json, [*PROG.split(), name, *arguments])
    return Status.DONE


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
