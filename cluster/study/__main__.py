"""Compare selection rules on your own model and reward, in one process and without Ray.

- ``variance PRESET`` samples a crossed design (the same initial noises under every prompt, several SDE paths
  each) and decomposes the variance of rewards and of policy gradients.
- ``compare PRESET --arms a,b --seeds 5`` trains arms under the same seeds, prompts and evaluation noise;
  finished runs are skipped.
- ``preview PRESET`` measures how well drafts predict a candidate's final reward: the clean image predicted at
  each step, and short ODEs of the same noise.
- ``report`` writes the tables and the page again from the Parquet files.

Every key of the configuration can be overridden, for instance ``--steps 40 --learner.threads 1``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from cluster.config.command import Parser, Status, guarded, program
from cluster.config.errors import UserError
from cluster.config.settings import RunSettings
from cluster.config.sources import parse_overrides, resolve
from cluster.process import quieten
from cluster.study.arms import ARMS

PROG: Final = "python -m cluster.study"
FOLDER: Final = Path("runs") / "study"
EVALUATIONS: Final = 20
"""Evaluations of a compared run, unless ``eval_every`` is given: curves need more of them than training."""


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    options, rest = _parser().parse_known_args(arguments)
    if options.command == "report":
        _report(options, rest)
    else:
        _run(options, rest, f"{PROG} {' '.join(arguments)}")
    return Status.DONE


def _parser() -> Parser:
    parser = Parser(prog=program("study"), description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    variance = commands.add_parser("variance", keys=True, help="decompose variance of reward and gradient")
    variance.add_argument("--prompts", type=_two, default=64, help="prompts of the design; default: 64")
    variance.add_argument(
        "--initial", type=_two, default=8, help="initial noises, shared by all prompts; default: 8"
    )
    variance.add_argument(
        "--paths", type=_two, default=8, help="SDE paths per prompt and initial noise; default: 8"
    )
    variance.add_argument(
        "--gradients", type=int, default=64, help="prompts with policy gradients; default: 64"
    )
    compare = commands.add_parser("compare", keys=True, help="compare the learning speed and cost of arms")
    compare.add_argument(
        "--arms",
        default=",".join(ARMS),
        help="names, separated by commas, of which an unknown one lists all; default: all",
    )
    compare.add_argument("--seeds", type=int, default=5, help="seeds of every arm; default: 5")
    compare.add_argument(
        "--rates", type=_rates, help="learning rates to try on the first seed, separated by commas; each "
        "arm keeps the one with the highest final score"
    )  # fmt: skip
    preview = commands.add_parser("preview", keys=True, help="measure how well drafts predict final ranks")
    preview.add_argument("--prompts", type=_two, default=64, help="prompts to draft; default: 64")
    for command in (variance, compare, preview):
        command.add_argument("preset", metavar="PRESET_OR_TOML", help="a preset or a TOML file")
        command.add_argument("--folder", type=Path, help=f"folder of the results; default: {FOLDER}/PRESET")
    report = commands.add_parser("report", help="write RESULTS.md and the page again")
    report.add_argument(
        "folder", nargs="?", type=Path, default=FOLDER, help="has one folder per task; default: runs/study"
    )
    report.add_argument(
        "--results", type=Path, default=Path("RESULTS.md"), help="page to write; default: RESULTS.md"
    )
    return parser


def _run(options: argparse.Namespace, rest: list[str], command: str) -> None:
    overrides = parse_overrides(rest, program(f"study {options.command}"))
    settings = resolve(options.preset, overrides)
    folder = options.folder or FOLDER / settings.preset
    console = Console(highlight=False, soft_wrap=True)
    quieten()
    if options.command != "compare":
        measure = _variance if options.command == "variance" else _preview
        measure(options, settings, folder, command, console)
        return
    from cluster.study.compare import compare, tune

    if "eval_every" not in overrides:
        settings = settings.model_copy(update={"eval_every": max(1, settings.steps // EVALUATIONS)})
    arms = options.arms.split(",")
    rates = None
    if options.rates:
        rates = tune(settings, arms, options.rates, folder, command, console.print)
        console.print("learning rates: " + ", ".join(f"{arm} {rate:g}" for arm, rate in rates.items()))
    compare(settings, arms, options.seeds, folder, command, console.print, rates)


def _variance(
    options: argparse.Namespace, settings: RunSettings, folder: Path, command: str, console: Console
) -> None:
    from cluster.study.designs import load_variance
    from cluster.study.tables import gradient_sheet, rank_sheet, variance_sheet
    from cluster.study.variance import variance

    names = ("prompts", "initial", "paths", "gradients")
    variance(settings, {name: getattr(options, name) for name in names}, folder, command, console.print)
    result = load_variance(folder, settings.rollout.dynamics)
    if result is not None:
        console.print(variance_sheet(result).table())
    if result is not None and result.gradients is not None:
        console.print(gradient_sheet(result.gradients).table())
        console.print(rank_sheet(result.gradients).table())


def _preview(
    options: argparse.Namespace, settings: RunSettings, folder: Path, command: str, console: Console
) -> None:
    from cluster.study.designs import load_drafts
    from cluster.study.previews import preview
    from cluster.study.tables import draft_sheet

    preview(settings, options.prompts, folder, command, console.print)
    dynamics = settings.rollout.dynamics
    console.print(draft_sheet(load_drafts(folder, dynamics), dynamics).table())


def _report(options: argparse.Namespace, rest: list[str]) -> None:
    from cluster.study.report import write_study

    if rest:
        raise UserError(f"report takes a folder and --results, not {' '.join(rest)}")
    for path in write_study(options.folder, options.results):
        print(path)


def _rates(text: str) -> list[float]:
    rates = [float(part) for part in text.split(",")]
    if min(rates) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return rates


def _two(text: str) -> int:
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2 for a variance, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
