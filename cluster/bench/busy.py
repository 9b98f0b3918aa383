"""Time the steps of a run on the bundled model beside processes that keep cores busy, in some environments.

Every run is the service as started by ``python -m cluster.train``, on a local node. A variant is a list of
environment variables: ``--variant RAY_worker_niceness=15`` is Ray's own priority for its workers. Runs of the
plain service and of all variants, with all numbers of neighbours, are interleaved.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from cluster.bench.table import BenchmarkReport, Measurement
from cluster.config.errors import UserError
from cluster.config.sources import parse_overrides
from cluster.record.run_folder import RunFolder

PROG: Final = "python -m cluster.bench busy"
WARMUP: Final = 2
"""Steps at the start of a run that are not measured."""


def options(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options."""
    parser.add_argument("--preset", default="shapes")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[0, 1, 2], help="busy processes")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=VALUE[,...]")


def measure(options: argparse.Namespace, rest: Sequence[str]) -> BenchmarkReport:
    """Train in turns, and measure the median step of every run.

    Raises:
        UserError: if a run fails, an override is unknown or a variant is not a list of variables.
    """
    parse_overrides(list(rest), PROG)
    variants = [("plain", {}), *((variant, _variables(variant)) for variant in options.variant)]
    medians: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        for count in options.neighbours:
            for name, variables in variants:
                with busy(count):
                    steps = _train(options, rest, variables)
                for stage in ("step", "sample", "learn"):
                    seconds = statistics.median(step[f"seconds_{stage}"] for step in steps[WARMUP:])
                    medians.setdefault(f"{name}, {count} beside: {stage} (s)", []).append(seconds)
                    print(f"{name}, {count} beside: {stage} {seconds:.2f} s", file=sys.stderr)
    title = f"{options.preset}, {options.steps} steps, median of a run"
    return BenchmarkReport(title, [Measurement(name, values) for name, values in medians.items()])


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run processes that each keep a core busy, during the block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _variables(variant: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in variant.split(",")]
    if not all(name and equals for name, equals, _ in pairs):
        raise UserError(f"--variant: got {variant!r}, expected NAME=VALUE pairs separated by commas")
    return {name: value for name, _, value in pairs}


def _train(
    options: argparse.Namespace, rest: Sequence[str], variables: dict[str, str]
) -> list[dict[str, float]]:
    """Train, and return the metrics of the run's steps."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        command = [sys.executable, "-m", "cluster.train", options.preset, "--folder", str(folder)]
        command += ["--steps", str(options.steps), "--eval_every", str(options.steps), *rest]
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise UserError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-500:]}")
        return [step for step in RunFolder(folder).history() if step["step"]]
