"""Export a run's newest committed checkpoint to a folder that plain diffusers loads.

``lora`` is for `load_lora_weights`, ``pipeline`` for `from_pretrained`, each with a model card. The folder
contains the current weights or, with ``--ema``, their average, which the run's evaluations use.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config.command import Parser, Status, guarded, program


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    options = _parser().parse_args(arguments)
    from cluster.export.steps import check, push, write

    export = check(options)
    write(export)
    print(export.folder)
    if export.push is not None:
        print(push(export.folder, export.push))
    return Status.DONE


def _parser() -> Parser:
    parser = Parser(prog=program("export"), description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument(
        "--what", choices=["lora", "pipeline"], required=True,
        help="the LoRA adapter alone, or the whole pipeline (a LoRA is fused into it)",
    )  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="the averaged weights; default: the current ones")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="which committed checkpoint; default: the newest")
    which.add_argument("--best", action="store_true", help="the one with the best held-out score (best_by)")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="default: RUN/export/WHAT-step-N")
    parser.add_argument(
        "--push", metavar="OWNER/NAME",
        help="also upload to this repository of the model hub, made private if it is new; default: no upload",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
