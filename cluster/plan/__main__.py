"""Plan: ``python -m cluster.plan PRESET_OR_TOML [--gpus 8] [--gpu-memory 80GB] [--key value ...]``.

Says before anything is held whether a run fits, how long a step takes and what it costs. For GPUs,
operations and bytes are counted on the model's configuration, and time follows from ``--gpu-tflops``, the
peak of a GPU in bfloat16 (default 989, an H100), and ``--share``, how much of it one expects (default 0.4).
For a run on CPUs a few steps are measured on this machine. Every key of the configuration can be
overridden. Exit status 1: it does not fit.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table

from cluster.config.errors import UserError
from cluster.config.settings import RunSettings, parse_overrides, preset_names, resolve
from cluster.plan.estimate import Estimate, Hardware, Need

PROG: Final = "python -m cluster.plan"
UNITS: Final = {"GB": 1e9, "GIB": 2**30}


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    console = Console()
    try:
        settings, hardware = _configure(list(arguments), console)
        estimate = _estimate(settings, hardware)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    problems = shortages(estimate, hardware)
    console.print(_memory_table(estimate.needs))
    console.print(_time_table(settings, estimate, hardware))
    console.print(f"from {estimate.basis}", markup=False, highlight=False)
    for problem in problems:
        console.print(f"does not fit: {problem}", markup=False, highlight=False, soft_wrap=True)
    return 1 if problems else 0


def _configure(arguments: list[str], console: Console) -> tuple[RunSettings, Hardware]:
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=_number("--gpus"))
    parser.add_argument("--gpu-memory", type=_bytes, default=80e9)
    parser.add_argument("--gpu-tflops", type=_number("--gpu-tflops"), default=989.0)
    parser.add_argument("--share", type=_number("--share", 1), default=0.4)
    parser.add_argument("--price", type=_number("--price"))
    options, rest = parser.parse_known_args(arguments)
    source = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if source is None and {"-h", "--help"} & set(rest):
        console.print(__doc__, markup=False)
    overrides = parse_overrides(rest, PROG)
    if source is None:
        raise UserError(f"which preset or TOML file? Presets are {', '.join(preset_names())}")
    settings = resolve(source, overrides)
    needed = -(-sum(count * gpus for count, gpus in _holders(settings)) // 1)
    hardware = Hardware(
        gpus=int(options.gpus or needed),
        memory=options.gpu_memory,
        flops=options.gpu_tflops * 1e12,
        share=options.share,
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
    """What does not fit, in words; empty if all does."""
    found = [
        f"{need.role} needs {need.total / 1e9:.1f} GB and has {need.available / 1e9:.1f} GB"
        for need in estimate.needs
        if not need.fits
    ]
    wanted = sum(need.count * need.gpus for need in estimate.needs)
    if wanted > hardware.gpus:
        arithmetic = " + ".join(f"{n.count} x {n.gpus:g} {n.role}" for n in estimate.needs if n.gpus)
        found.append(f"{arithmetic} = {wanted:g} GPUs, there are {hardware.gpus}")
    return found


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
    """Above 0 and at most ``high``; argparse itself would not say what it got."""

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
