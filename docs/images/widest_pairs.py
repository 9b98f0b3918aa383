"""Draw the README's picture: the widest pair of each prompt of one step, from a run's images and ledger.

    python -m cluster train shapes --steps 1 --folder runs/pairs
    python docs/images/widest_pairs.py runs/pairs --step 1

The two images of a pair share prompt, weights and step; only their noise differs.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageFont

SCALE: Final = 5
SIDE: Final = 32 * SCALE
GAP, BETWEEN, MARGIN = 6, 30, 12
TEXT: Final = 46
PAPER, INK, GREY = "white", "#1f2328", "#656d76"
COLOURS: Final = {"low": "#b3261e", "high": "#1a7f37"}


@dataclass(frozen=True)
class Shot:
    """A candidate with the image that the run saved of it."""

    image: Path
    prompt: str
    reward: float


def pairs(run: Path, step: int) -> list[tuple[Shot, Shot]]:
    """Read the saved pairs of a step, each with the lower reward first."""
    rows: list[dict[str, Any]] = pq.read_table(run / f"ledger/step-{step:06d}.parquet").to_pylist()
    by_name = {f"g{row['group']:06d}-c{row['candidate']:02d}": row for row in rows}
    groups: dict[int, list[Shot]] = {}
    for path in sorted((run / f"images/step-{step:06d}").glob("g*.png")):
        row = by_name[path.stem]
        shot = Shot(path, row["prompt"], row["reward"])
        groups.setdefault(row["group"], []).append(shot)
    ordered = (sorted(shots, key=lambda shot: shot.reward) for shots in groups.values())
    return [(shots[0], shots[-1]) for shots in ordered if len(shots) > 1]


def draw(found: list[tuple[Shot, Shot]]) -> Image.Image:
    """Draw pairs side by side, the prompt above and the rewards below."""
    width = 2 * SIDE + GAP
    size = 2 * MARGIN + len(found) * (width + BETWEEN) - BETWEEN, 2 * MARGIN + 2 * TEXT + SIDE
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, pair in enumerate(found):
        left = MARGIN + number * (width + BETWEEN)
        prompt = re.sub("^a photo of ", "", pair[0].prompt)
        pen.text((left + width / 2, MARGIN), f"“{prompt}”", INK, ImageFont.load_default(20), anchor="ma")
        for kind, shot, x in zip(COLOURS, pair, (left, left + SIDE + GAP), strict=True):
            with Image.open(shot.image) as image:
                sheet.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, MARGIN + TEXT - 8))
            pen.rectangle((x, MARGIN + TEXT - 8, x + SIDE - 1, MARGIN + TEXT + SIDE - 9), outline=GREY)
            place = (x + SIDE / 2, MARGIN + TEXT + SIDE)
            pen.text(
                place, f"reward {shot.reward:.2f}", COLOURS[kind], ImageFont.load_default(24), anchor="ma"
            )
    return sheet


def main() -> None:
    """Write widest-pairs.png beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--step", type=int, required=True, help="a step of which it saved pairs")
    options = parser.parse_args()
    sheet = draw(pairs(options.run, options.step)).quantize(64)
    sheet.save(Path(__file__).with_name("widest-pairs.png"), optimize=True)


if __name__ == "__main__":
    main()
