"""Estimate the memory, time and cost of a run before resources are reserved.

For GPUs, operations and bytes are counted from the model's configuration, and the time follows from the peak
of a GPU and the expected share of it. For a run on CPUs a few steps are measured on this machine. Every key
of the configuration can be overridden. Exit status 1: the run does not fit.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from cluster.config.command import Parser, Status, guarded, program, read, required
from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import resolve
from cluster.plan.estimate import Estimate, Hardware, Need
from cluster.plan.placement import crowded
from cluster.plan.room import room
from cluster.plan.speed import PEAK, guessed, measured

UNITS: Final = {"GB": 1e9, "GIB": 2**30}


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    settings, hardware = _configure(arguments)
    console, estimate = Console(), _estimate(settings, hardware)
    problems = shortages(estimate, hardware)
    console.print(_memory_table(estimate.needs))
    console.print(_time_table(settings, estimate, hardware))
    console.print(f"from {estimate.basis}", markup=False, highlight=False)
    for line in () if problems else room(estimate.needs, estimate.batches, hardware.memory):
        console.print(f"leaves room for: {line}", markup=False, highlight=False, soft_wrap=True)
    for problem in problems:
        console.print(f"does not fit: {problem}", markup=False, highlight=False, soft_wrap=True)
    return Status.FAILED if problems else Status.DONE


def _parser() -> Parser:
    parser = Parser(
        keys=True,
        prog=program("plan"),
        usage="%(prog)s PRESET_OR_TOML [--gpus N] [--gpu-memory SIZE] [--section.key VALUE ...]",
        description=__doc__,
    )
    add = parser.add_argument
    add("--gpus", type=_number("--gpus"), metavar="N", help="available GPUs; default: those the run needs")
    add("--gpu-memory", type=_bytes, default=80e9, metavar="SIZE", help="memory of each; default: 80GB")
    add(
        "--measured", type=Path, metavar="FILE",
        help="speed of the GPU, as 'python -m cluster bench gpu --json FILE' wrote it",
    )  # fmt: skip
    add(
        "--gpu-tflops", type=_number("--gpu-tflops"), default=PEAK, metavar="N",
        help="without --measured, peak of each in bfloat16; default: 989, an H100",
    )  # fmt: skip
    add(
        "--share", type=_number("--share", 1), metavar="N",
        help="without --measured, expected share of the peak; default: 0.4, not compiled 0.2",
    )  # fmt: skip
    add("--price", type=_number("--price"), metavar="N", help="price of a GPU-hour, for the cost of the run")
    return parser


def _configure(arguments: Sequence[str]) -> tuple[RunSettings, Hardware]:
    options, source, overrides = read(_parser(), arguments)
    settings = resolve(required(source), overrides)
    needed = -(-sum(count * gpus for count, gpus in _holders(settings)) // 1)
    hardware = Hardware(
        gpus=int(options.gpus or needed),
        memory=options.gpu_memory,
        speed=measured(options.measured, compiled=settings.model.compile)
        if options.measured
        else guessed(options.gpu_tflops, options.share, compiled=settings.model.compile),
        price=options.price,
    )
    return settings, hardware


def _holders(settings: RunSettings) -> list[tuple[int, float]]:
    rewards = [(reward.workers, reward.gpus) for reward in settings.distinct_rewards.values()]
    return [
        (settings.rollout.workers, settings.rollout.gpus),
        (settings.learner.ranks, settings.learner.gpus),
        *rewards,
    ]


def _estimate(settings: RunSettings, hardware: Hardware) -> Estimate:
    if settings.rollout.gpus == 0 and settings.learner.gpus == 0:
        from cluster.plan import cpu

        return cpu.estimate(settings)
    from cluster.plan import gpu

    return gpu.estimate(settings, hardware)


def shortages(estimate: Estimate, hardware: Hardware) -> list[str]:
    """Describe everything that does not fit; empty if the run fits."""
    problems = [
        f"{need.role} needs {need.total / 1e9:.1f} GB and has {need.available / 1e9:.1f} GB"
        for need in estimate.needs
        if not need.fits
    ]
    problems = problems or crowded(estimate.needs, hardware.memory)
    wanted = sum(need.count * need.gpus for need in estimate.needs)
    if wanted > hardware.gpus:
        arithmetic = " + ".join(f"{n.count} x {n.gpus:g} {n.role}" for n in estimate.needs if n.gpus)
        problems.append(f"{arithmetic} = {wanted:g} GPUs, but {hardware.gpus} are available")
    return problems


def _memory_table(needs: Sequence[Need]) -> Table:
    table = Table("", "processes", "GPUs each", "GB each", "of", "", title="memory", title_justify="left")
    for need in needs:
        parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in need.parts.items() if size >= 5e7)
        total = f"{need.total / 1e9:.1f}" if need.parts else "?"
        table.add_row(
            need.role, str(need.count), f"{need.gpus:g}", total, f"{need.available / 1e9:.1f}", parts
        )
    return table


def _time_table(settings: RunSettings, estimate: Estimate, hardware: Hardware) -> Table:
    table = Table("", "", title="time", title_justify="left")
    for name, seconds in estimate.parts.items():
        table.add_row(f"  {name}", f"{seconds:.2f} s")
    for name, seconds in estimate.stages.items():
        table.add_row(f"{name}, per step", f"{seconds:.2f} s")
    table.add_row("a step" + (" (stages overlap)" if estimate.overlaps else ""), f"{estimate.step:.2f} s")
    hours = estimate.step * settings.steps / 3600
    table.add_row(f"{settings.steps} steps", f"{hours:.2f} hours")
    if hardware.gpus:
        table.add_row("GPU-hours", f"{hours * hardware.gpus:.0f}")
        if hardware.price is not None:
            table.add_row("cost", f"{hours * hardware.gpus * hardware.price:.0f}")
    return table


def _bytes(text: str) -> float:
    match = re.fullmatch(r"([0-9.]+) ?(GB|GiB)", text, re.IGNORECASE)
    if not match:
        raise UserError(f"--gpu-memory: got {text!r}, expected a size such as 80GB")
    return float(match[1]) * UNITS[match[2].upper()]


def _number(flag: str, high: float = float("inf")) -> Callable[[str], float]:
    """Make a parser of numbers above 0 and at most ``high``; argparse's own errors omit the value."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= high:
            expected = (
                "a number above 0" if high == float("inf") else f"a number above 0 and at most {high:g}"
            )
            raise UserError(f"{flag}: got {text!r}, expected {expected}")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
