"""Show what works on this machine's GPU, how fast it is, and what limits it.

Three parts, in order of worth. right: tiny checkpoints of all families give the CPU's results, every
objective learns, exports load again. fast: sampler, learner and whole step at a model's real sizes, with
random weights, against the measured peak of the chip. whole: the service, with shares of the GPU. Nothing is
downloaded, and what is not installed is skipped by name. With --device cpu --random tiny everything runs in
three minutes on two cores, to try the suite itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.bench.gpu.check import SHOWN, Check, Outcome, Setup
from cluster.bench.gpu.isolated import Isolation
from cluster.bench.table import Measurement, machine, refuse_arguments
from cluster.config.errors import UserError
from cluster.record.files import to_json

MINUTES: Final = 8.0
"""The length for which the checks' own deadlines are given."""
MODELS: Final = {"cuda": "sd35-medium", "cpu": "tiny"}
"""The random models that are measured unless others are named."""
RIGHT: Final = (
    Check("right", "families", "cluster.bench.gpu.right:families", 60),
    Check("right", "half precision", "cluster.bench.gpu.right:half_precision", 60),
    Check("right", "objectives", "cluster.bench.gpu.right:objectives", 40),
    Check("right", "export", "cluster.bench.gpu.right:export", 30),
    Check("right", "waits", "cluster.bench.gpu.waits:waits", 30),
    Check("right", "8-bit optimizer", "cluster.bench.gpu.right:eight_bits", 20, ("bitsandbytes",)),
    Check("right", "flash attention", "cluster.bench.gpu.right:flash_attention", 20, ("flash_attn",)),
)
FAST: Final = (
    Check("fast", "model and peak", "cluster.bench.gpu.fast:built", 40),
    Check("fast", "step", "cluster.bench.gpu.fast:step", 330),
    Check("fast", "attention", "cluster.bench.gpu.attention:attention", 30),
)
WHOLE: Final = (
    Check("whole", "engines", "cluster.bench.gpu.whole:engines", 60, ("deepspeed",)),
    Check("whole", "service", "cluster.bench.gpu.whole:service", 90, ("ray", "deepspeed")),
    Check("whole", "preference", "cluster.bench.gpu.whole:preference", 60, ("ray", "deepspeed", "open_clip")),
    Check("whole", "words", "cluster.bench.gpu.whole:words", 60, ("ray", "deepspeed", "rapidocr")),
)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the suite."""
    from rollout.tools.random_models import NAMES

    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="measure this pipeline, a folder, instead of a random one")
    what.add_argument("--random", metavar="NAMES", help=f"random models of real sizes, of {', '.join(NAMES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="deadline of the suite; default: 8")
    parser.add_argument(
        "--only",
        metavar="NAMES",
        help="run only these: right, fast, whole, or the names of checks",
    )


@dataclass(slots=True)
class SuiteReport:
    """The outcomes of a suite so far."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """True if a check has failed."""
        return any(one.status == "failed" for one in self.outcomes)

    def table(self) -> Table:
        """Tabulate the checks that did not pass, under a line that counts all."""
        counts = Counter(one.status for one in self.outcomes)
        title = ", ".join(f"{number} {status}" for status, number in counts.items())
        table = Table("part", "check", "outcome", "reason", title=title)
        for one in self.outcomes:
            if one.status != "passed":
                table.add_row(one.check.part, one.check.title, one.status, escape(_last_line(one)))
        return table

    def write(self, path: Path, command: Sequence[str]) -> None:
        """Write every value as JSON, with the command and the machine."""
        fields = {
            "title": "what works on one GPU, how fast, and what limits it",
            "command": list(command),
            "machine": machine(),
            "checks": [one.record() for one in self.outcomes],
        }
        path.write_text(to_json(fields, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, rest: Sequence[str]) -> SuiteReport:
    """Run the checks one after another; every measurement is shown, and written, as soon as it is made.

    Raises:
        UserError: if a GPU is missing, or a check or a model is unknown.
    """
    refuse_arguments(rest)
    run = _Run(options, _chosen(options))
    with tempfile.TemporaryDirectory() as folder:
        run.all(Setup(options.device, Path(folder)))
    return run.report


class _Run:
    """A run of chosen checks."""

    def __init__(self, options: argparse.Namespace, chosen: Sequence[Check]) -> None:
        self.options, self.chosen = options, chosen
        self.report, self.console = SuiteReport(), Console()

    def all(self, setup: Setup) -> None:
        """Run every check that begins within the time of the suite."""
        isolation, minutes = Isolation(), self.options.minutes
        ends = time.monotonic() + 60 * minutes
        for check in self.chosen:
            self._print(f"[bold]{check.part}: {check.title}[/]")
            self.report.outcomes.append(Outcome(check, "running", 0.0, []))
            seconds = min(check.seconds * minutes / MINUTES, ends - time.monotonic())
            ended = Outcome(check, "skipped", 0.0, [], "the suite's time is over")
            if seconds > 0:
                ended = isolation.run(check, replace(setup, model=check.model), seconds, self._seen)
            self._replace(ended)
            self._print(f"  [{SHOWN[ended.status]}]{ended.status}[/], {ended.seconds:.1f} s")
            if ended.reason:
                self._print(escape("  " + ended.reason.strip().replace("\n", "\n  ")))

    def _seen(self, row: Measurement) -> None:
        """Show a measurement, of correct results only those that are not, and keep it."""
        running = self.report.outcomes[-1]
        if running.check.part != "right" or not row.good:
            self._print(escape(f"  {row.shown()}"))
        self._replace(replace(running, rows=[*running.rows, row]))

    def _replace(self, last: Outcome) -> None:
        self.report.outcomes[-1] = last
        if self.options.json:
            self.report.write(self.options.json, self.options.command)

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _chosen(options: argparse.Namespace) -> list[Check]:
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible; --device cpu --random tiny tries the suite without one")
    fast = [replace(check, model=model) for model in _models(options) for check in FAST]
    every = (*RIGHT, *fast, *WHOLE)
    if options.only is None:
        return [*every]
    wanted, known = options.only.split(","), {name for check in every for name in (check.part, check.name)}
    if wrong := [name for name in wanted if name not in known]:
        raise UserError(f"--only: got {wrong[0]!r}, expected some of {', '.join(sorted(known))}")
    return [check for check in every if {check.part, check.name} & {*wanted}]


def _models(options: argparse.Namespace) -> list[str]:
    from rollout.tools.random_models import NAMES

    if options.model:
        if not Path(options.model).is_dir():
            raise UserError(f"--model: {options.model} is no folder with a pipeline")
        return [options.model]
    names: list[str] = (options.random or MODELS[options.device]).split(",")
    if wrong := [name for name in names if name not in NAMES]:
        raise UserError(f"--random: got {wrong[0]!r}, expected some of {', '.join(NAMES)}")
    return names


def _last_line(one: Outcome) -> str:
    """Return the end of a reason: of a traceback, the error."""
    return (one.reason.strip().splitlines() or [""])[-1]
