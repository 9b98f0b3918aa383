"""Remake the report of a run: ``python -m cluster.report RUN_FOLDER``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.record.run_data import NotARunError
from cluster.report.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Remake a report from the command line; the exit status is 2 if the folder is no run."""
    parser = argparse.ArgumentParser(prog="python -m cluster.report", description="Remake report.html.")
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="the folder of a run")
    folder = parser.parse_args(arguments).folder
    try:
        path = write_report(folder)
    except NotARunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {folder}: {error.strerror or error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
