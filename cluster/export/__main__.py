"""Make a folder that plain diffusers loads, from a run's newest committed checkpoint.

``lora`` is for `load_lora_weights`, ``pipeline`` for `from_pretrained`, each with a model card. The folder
holds the current weights; ``--ema`` takes their average instead, with which the run's evaluations draw.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config.command import Parser, Status, guarded, program


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    from cluster.export.steps import check, push, write

    order = check(options)
    write(order)
    print(order.folder)
    if order.push is not None:
        print(push(order.folder, order.push))
    return Status.DONE


def _parser() -> Parser:
    parser = Parser(prog=program("export"), description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--what", choices=["lora", "pipeline"], required=True,
        help="the LoRA adapter alone, or the whole pipeline (a LoRA is fused into it)",
    )  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="the averaged weights; default: the current ones")
    parser.add_argument("--step", type=int, help="which committed checkpoint; default: the newest")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: RUN/export/WHAT-step-N")
    parser.add_argument(
        "--push", metavar="OWNER/NAME",
        help="also upload to this repository of the model hub, made private if it is new; default: no upload",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
