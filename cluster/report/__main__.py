"""Write the report of a run again, to report.html in its folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config.command import Parser, Status, guarded, program
from cluster.config.errors import UserError


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    parser = Parser(prog=program("report"), description=__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="the folder of a run")
    folder = parser.parse_args(arguments).folder
    from cluster.report.report import write_report

    try:
        print(write_report(folder))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror or error}") from None
    return Status.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
