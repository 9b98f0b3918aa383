"""Try the rewards before a run: ``python -m rewards.check PRESET_OR_TOML [--image PATH]``.

Loads each reward of the configuration in a separate process and lets it score a blank, a noise and a real
image of the run's size, and drawn images with known answers. The exit status is 1, with advice, if a reward
fails, leaves its range or refuses a prompt, and 3, with a warning, if nothing shows that one works. Needs no
model.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table

from rewards.check.trial import IMAGES, Failure, Trial, try_out
from rewards.settings import RewardSettings
from rollout.prompts import PromptFileError, load_prompts
from rollout.settings import RolloutSettings, Settings, explain
from rollout.text_files import read_text

PROG: Final = "python -m rewards.check"
FAILED: Final = 1
DOUBTED: Final = 3
"""Exit statuses: a reward failed; no reward failed, but nothing shows that one of them works."""
PRESETS: Final = Path(__file__).parents[2] / "cluster" / "presets"


class _Prompts(Settings):
    model_config = ConfigDict(extra="ignore")

    train: Path


class _Configuration(Settings):
    """The part of a run's configuration that its rewards depend on."""

    model_config = ConfigDict(extra="ignore")

    prompts: _Prompts
    rollout: RolloutSettings = Field(default_factory=RolloutSettings)
    rewards: tuple[RewardSettings, ...] = Field(min_length=1)
    eval_rewards: tuple[RewardSettings, ...] = ()

    @property
    def distinct(self) -> list[RewardSettings]:
        """The rewards of training and evaluation, each once."""
        found: list[RewardSettings] = []
        for reward in (*self.rewards, *self.eval_rewards):
            if all((reward.name, reward.options) != (other.name, other.options) for other in found):
                found.append(reward)
        return found


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    given = _parser().parse_args(arguments)
    try:
        configuration = _read(given.configuration)
        prompts = load_prompts(configuration.prompts.train)
        size = (configuration.rollout.width, configuration.rollout.height)
        real = _load(given.image, size) if given.image else None
    except (OSError, ValueError, PromptFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console()
    results: dict[str, Trial | Failure] = {}
    for reward in configuration.distinct:
        with console.status(f"{reward.name}: loading and scoring"):
            results[_label(reward, results)] = try_out(reward.target, reward.options, prompts, size, real)
    console.print(_table(results, size))
    return _complain(console, results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROG, description="Try the rewards of a configuration.")
    parser.add_argument("configuration", metavar="PRESET_OR_TOML")
    parser.add_argument(
        "--image",
        type=Path,
        help="the real image (transparent parts on white, rotated by its EXIF data); "
        "default: one drawn for the first prompt",
    )
    return parser


def _read(source: str) -> _Configuration:
    """Read the configuration of a preset or a TOML file.

    Raises:
        ValueError: naming the file or the key that is wrong.
        OSError: if the file cannot be read.
    """
    path = Path(source) if source.endswith(".toml") else PRESETS / f"{source}.toml"
    if not path.is_file():
        known = ", ".join(sorted(preset.stem for preset in PRESETS.glob("*.toml")))
        raise ValueError(f"no preset or TOML file {source!r}; presets are {known}")
    try:
        return _Configuration.model_validate(tomllib.loads(read_text(path)))
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from None


def _load(path: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Load an image as viewers show it, as (height, width, 3), cropped to the shape from its middle.

    It is rotated by its EXIF data, and transparent parts become white.

    Raises:
        ValueError: if its values have no known range.
    """
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode in ("I", "F"):
            raise ValueError(f"{path}: expected 8 or 16 bits per channel, got {image.mode}, 32 bits")
        if image.mode.startswith("I;16"):  # Pillow would turn all but the darkest pixels white
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        return np.asarray(ImageOps.fit(image.convert("RGB"), size))


def _label(reward: RewardSettings, known: Collection[str]) -> str:
    """Return the reward's name, marked if evaluation has the same reward with other options."""
    return f"{reward.name} (eval)" if reward.name in known else reward.name


def _table(results: dict[str, Trial | Failure], size: tuple[int, int]) -> Table:
    table = Table("reward", "range", title=f"rewards on {size[0]} x {size[1]} images", title_justify="left")
    for column in (*IMAGES, "s to load", "s per image", "GB at most"):
        table.add_column(column, justify="right")
    for label, result in results.items():
        table.add_row(label, *(_cells(result) if isinstance(result, Trial) else ["[red]failed"]))
    return table


def _cells(trial: Trial) -> list[str]:
    memory = f"{trial.memory_gb:.2f}" + (f" + {trial.gpu_gb:.2f} GPU" if trial.gpu_gb else "")
    return [
        f"{trial.traits.low:.4g} to {trial.traits.high:.4g}",
        *("missing" if np.isnan(score) else f"{score:.3f}" for score in trial.scores),
        f"{trial.seconds_to_load:.1f}",
        f"{trial.seconds_per_image:.4f}",
        memory,
    ]


def _complain(console: Console, results: dict[str, Trial | Failure]) -> int:
    """Print the faults and doubts of the rewards and return the exit status."""
    failed = doubted = False
    for label, result in results.items():
        reason = result.fault if isinstance(result, Trial) else result.reason
        if reason:
            failed = True
            console.print(f"{label}: {reason}", style="red", markup=False, highlight=False)
        if isinstance(result, Failure) and result.advice:
            console.print(f"  {result.advice}", markup=False, highlight=False)
        if isinstance(result, Trial) and not reason and result.doubt:
            doubted = True
            warning = f"warning: {label} {result.doubt}"
            console.print(warning, style="yellow", markup=False, highlight=False)
    return FAILED if failed else DOUBTED if doubted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
