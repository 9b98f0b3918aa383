"""Show what works on this machine's GPU, how fast it is, and what limits it.

Three parts, in order of worth. right: tiny checkpoints of all families give the CPU's results, every
objective learns, exports load again. fast: sampler, learner and whole step at a model's real sizes, with
random weights, against the measured peak of the chip. whole: the service, with shares of the GPU. Nothing is
downloaded, and what is not installed is skipped by name. With --device cpu --random tiny everything runs in
two minutes on two cores, to try the suite itself.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.bench.gpu.check import SHOWN, Check, Outcome, Setup
from cluster.bench.gpu.isolated import run_check
from cluster.bench.table import machine, refuse_arguments
from cluster.config.errors import UserError
from cluster.record.files import to_json

MINUTES: Final = 8.0
"""The length for which the checks' own deadlines are given."""
MODELS: Final = {"cuda": "sd35-medium", "cpu": "tiny"}
"""The random models that are measured unless others are named."""
RIGHT: Final = (
    Check("right", "families", "right:families", 60),
    Check("right", "half precision", "right:half_precision", 40),
    Check("right", "objectives", "right:objectives", 40),
    Check("right", "export", "right:export", 30),
    Check("right", "waits", "waits:waits", 30),
)
FAST: Final = (
    Check("fast", "model and peak", "fast:built", 40),
    Check("fast", "step", "fast:step", 280),
)
WHOLE: Final = (
    Check("whole", "engines", "whole:engines", 60, ("deepspeed",)),
    Check("whole", "service", "whole:service", 120, ("ray", "deepspeed")),
    Check("whole", "preference", "whole:preference", 60, ("ray", "deepspeed", "open_clip")),
    Check("whole", "words", "whole:words", 60, ("ray", "deepspeed", "rapidocr")),
)


def options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the suite."""
    from rollout.tools.random_models import NAMES

    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", help="measure this pipeline, a folder, instead of a random one")
    what.add_argument("--random", metavar="NAMES", help=f"random models of real sizes, of {', '.join(NAMES)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="deadline of the suite")
    parser.add_argument(
        "--only",
        metavar="NAMES",
        help="run only these parts (right, fast, whole) or checks",
    )


@dataclass(slots=True)
class SuiteReport:
    """The outcomes of a suite so far."""

    device: str
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
                table.add_row(one.check.part, _name(one.check), one.status, escape(_last_line(one)))
        return table

    def write(self, path: Path, command: Sequence[str]) -> None:
        """Write every value as JSON, with the command and the machine."""
        fields = {
            "title": f"one {self.device}: right, fast, whole",
            "command": list(command),
            "machine": machine(),
            "checks": [one.record() for one in self.outcomes],
        }
        path.write_text(to_json(fields, indent=2) + "\n", encoding="utf-8")


def measure(options: argparse.Namespace, rest: Sequence[str]) -> SuiteReport:
    """Run the checks one after another; each outcome is shown, and written, as soon as it is there.

    Raises:
        UserError: if there is no GPU, or no such part or model.
    """
    refuse_arguments(rest)
    chosen, console, report = _chosen(options), Console(), SuiteReport(options.device)
    ends = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(options.device, Path(folder))
        for check in chosen:
            seconds = min(check.seconds * options.minutes / MINUTES, ends - time.monotonic())
            report.outcomes.append(_run(check, setup, seconds))
            for line in _lines(report.outcomes[-1]):
                console.print(line, highlight=False, soft_wrap=True)
            if options.json:
                report.write(options.json, options.command)
    return report


def _run(check: Check, setup: Setup, seconds: float) -> Outcome:
    if seconds <= 0:
        return Outcome(check, "skipped", 0.0, [], "the suite's time is over")
    return run_check(check, replace(setup, model=check.model), seconds)


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
        return [options.model]
    names: list[str] = (options.random or MODELS[options.device]).split(",")
    if wrong := [name for name in names if name not in NAMES]:
        raise UserError(f"--random: got {wrong[0]!r}, expected some of {', '.join(NAMES)}")
    return names


def _lines(one: Outcome) -> Iterator[str]:
    """Describe an outcome, with the measurements of which a reader has to know."""
    color = SHOWN[one.status]
    yield f"[{color}]{one.status:<8}[/]{one.check.part:<6} {_name(one.check)}  {one.seconds:.1f} s"
    for row in one.rows:
        if one.check.part != "right" or not row.good:
            yield escape(f"          {row.shown()}")
    if one.reason:
        yield escape("          " + one.reason.strip().replace("\n", "\n          "))


def _last_line(one: Outcome) -> str:
    """Return the end of a reason: of a traceback, the error."""
    return (one.reason.strip().splitlines() or [""])[-1]


def _name(check: Check) -> str:
    return f"{check.name} ({check.model})" if check.model else check.name
