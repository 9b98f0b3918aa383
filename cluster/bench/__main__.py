"""Benchmark a part of NoiseMargin.

Each benchmark prints medians with their spread as a table and, with --json, writes every value, the command
and a description of the machine.
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
"""The command in reports."""

BENCHMARKS: Final = {
    "gpu": ("cluster.bench.gpu.suite", "what works on a GPU, how fast, and what limits it, in minutes"),
    "sampler": ("cluster.bench.sampler", "the sampler against the diffusers pipeline"),
    "learner": ("cluster.bench.learner", "updates: pairs per second, FLOPs, share of the peak, memory"),
    "step": ("cluster.bench.step", "a training step against a straightforward loop"),
    "weights": ("cluster.bench.weights", "full weights to two samplers (Ray)"),
    "rewards": ("cluster.bench.rewards", "OCR, in one process and over replicas (Ray)"),
    "scale": ("cluster.bench.scale", "one driver with 1 to 64 simulated samplers (Ray)"),
    "busy": ("cluster.bench.busy", "a run beside processes that keep cores busy (Ray)"),
    "overhead": (
        "cluster.bench.overhead",
        "a step of the service against the same loop in one process (Ray)",
    ),
}
"""The module of each benchmark, imported when it is used, so that those without Ray run where it is missing.

A module has ``options(parser)`` and ``measure(options, rest)``, which returns a report with a table, a
``write(path, command)`` and whether it ``failed``.
"""

CONFIGURED: Final = frozenset({"busy", "overhead"})
"""Benchmarks in which every key of the configuration can be overridden."""


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    name, *rest = arguments or ["--help"]
    if name in BENCHMARKS:
        return _run(name, rest)
    lines = "\n".join(f"  {benchmark:<10} {line}" for benchmark, (_, line) in BENCHMARKS.items())
    if name not in ("-h", "--help"):
        raise UserError(f"no benchmark {name!r}; benchmarks are {', '.join(BENCHMARKS)}")
    print(
        f"usage: {program('bench NAME ...')}\n\n{__doc__}\n{lines}\n\n"
        f"{program('bench NAME --help')} describes a benchmark."
    )
    return Status.DONE


def _run(name: str, arguments: Sequence[str]) -> int:
    module: Any = import_module(BENCHMARKS[name][0])
    parser = Parser(keys=name in CONFIGURED, prog=program(f"bench {name}"), description=module.__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values to this file")
    parser.set_defaults(command=[*PROG.split(), name, *arguments])
    module.options(parser)
    options, rest = parser.parse_known_args(arguments)
    report = module.measure(options, rest)
    Console().print(report.table())
    if options.json:
        report.write(options.json, options.command)
    return Status.FAILED if report.failed else Status.DONE


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
