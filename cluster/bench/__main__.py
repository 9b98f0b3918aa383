"""Benchmarks: ``python -m cluster.bench NAME [--json FILE] ...``; ``NAME --help`` says what can be set.

Each prints medians with their spread as a table, and writes every value, the command and the machine as JSON.
"""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from cluster.config.errors import UserError
from cluster.process import leave

PROG: Final = "python -m cluster.bench"

BENCHMARKS: Final = {
    "sampler": ("cluster.bench.sampler", "our sampler against the diffusers pipeline"),
    "learner": ("cluster.bench.learner", "updates: pairs per second, FLOPs, share of the peak, memory"),
    "step": ("cluster.bench.step", "a training step against a straightforward loop"),
    "weights": ("cluster.bench.weights", "full weights to two samplers (Ray)"),
    "rewards": ("cluster.bench.rewards", "OCR, in one process and over shards (Ray)"),
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


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    name, *rest = arguments or ["--help"]
    if name not in BENCHMARKS:
        listed = "\n".join(f"  {one:<10} {what}" for one, (_, what) in BENCHMARKS.items())
        Console().print(f"{__doc__}\n{listed}", markup=False, highlight=False)
        return 0 if name in {"-h", "--help"} else 2
    try:
        _run(name, rest)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _run(name: str, arguments: list[str]) -> None:
    module: Any = import_module(BENCHMARKS[name][0])
    parser = argparse.ArgumentParser(
        prog=f"{PROG} {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    module.options(parser)
    options, rest = parser.parse_known_args(arguments)
    report = module.measure(options, rest)
    Console().print(report.table())
    if options.json:
        report.write(options.json, [*PROG.split(), name, *arguments])


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
