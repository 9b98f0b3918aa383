"""Submit a run to a Ray cluster, and manage runs there.

Before the checkout is submitted as a job, the run is checked as by ``train``; the cluster must require a
token, and the upload must be small enough. The same --name again continues a run from its last checkpoint.
Every key of the configuration can be overridden.

``status NAME``, ``logs NAME [--follow]``, ``stop NAME`` and ``list`` manage runs. The token is read from
RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from cluster.config.address import ADDRESS_VARIABLE
from cluster.config.command import Parser, Status, guarded, program, required
from cluster.config.errors import RunFailed, UserError
from cluster.config.settings import RunSettings
from cluster.train import configure, stamp

PROG: Final = "python -m cluster.submit"
"""The command in printed lines."""
CHECKOUT: Final = Path(__file__).resolve().parents[2]
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
VERBS: Final = ("status", "logs", "stop", "list")

PrintLine = Callable[[str], None]


@guarded
def main(arguments: Sequence[str]) -> int:
    """Run the command line and return the exit status."""
    print_line: PrintLine = partial(print, flush=True)
    verb = arguments[0] if arguments else ""
    try:
        if verb in VERBS:
            return _manage(verb, arguments[1:], print_line)
        return submit(arguments, print_line)
    except KeyboardInterrupt:
        print_line("no longer following; the run continues")
        return Status.INTERRUPTED
    except (RuntimeError, OSError) as error:  # of Ray's client, when a request fails
        raise RunFailed(str(error)) from error


def submit(arguments: Sequence[str], print_line: PrintLine) -> int:
    """Check a run, upload the checkout and start a job; returns its exit status if it is followed.

    Raises:
        UserError: naming what is wrong with the command line, the configuration, the cluster or the upload.
    """
    parser = _parser()
    if not arguments:
        parser.print_help()
    options, rest = parser.parse_known_args(arguments)
    _check_address(options)
    name, folder, command = _command(options, rest)
    settings = _check(command, options.address, print_line)
    from cluster.submit import jobs
    from cluster.submit.upload import LIMIT, check_travels, mebibytes, pack, reach

    client = reach(options.address, print_line)
    job = jobs.free_name(client, name, str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        upload = pack(CHECKOUT, Path(scratch) / "checkout.zip")
        check_travels({"configuration": Path(rest[0]), **_paths(settings)}, upload, CHECKOUT)
        print_line(
            f"upload {mebibytes(upload.size)} of at most {mebibytes(LIMIT)}, {len(upload.files)} files"
        )
        jobs.send(client, job, name, command, upload)
    print_line(f"submitted {job}, run folder {folder}")
    if options.follow:
        return jobs.follow(client, job, print_line)
    print_line(f"see also: {PROG} status|logs|stop {name} --address {options.address}")
    return Status.DONE


def _parser() -> Parser:
    parser = Parser(
        keys=True,
        prog=program("submit"),
        usage="%(prog)s PRESET_OR_TOML --address URL [--name NAME] [--section.key VALUE ...]\n"
        "       %(prog)s status|logs|stop NAME --address URL\n"
        "       %(prog)s list --address URL",
        description=__doc__,
    )
    parser.add_argument("--name", help="name of the run; default: the preset's and the time")
    parser.add_argument("--folder", help="run folder, an absolute path on all nodes; default: /runs/NAME")
    _add_cluster(parser)
    return parser


def _add_cluster(parser: Parser) -> None:
    parser.add_argument(
        "--address", default=os.environ.get(ADDRESS_VARIABLE), metavar="URL",
        help=f"dashboard of the cluster, such as http://HOST:8265; default: {ADDRESS_VARIABLE}",
    )  # fmt: skip
    parser.add_argument("--follow", action="store_true", help="show what the run prints until it ends")


def _check_address(options: argparse.Namespace) -> None:
    if options.address is None:
        raise UserError(f"which cluster? Give --address http://HOST:8265, or set {ADDRESS_VARIABLE}")


def _command(options: argparse.Namespace, rest: list[str]) -> tuple[str, Path, list[str]]:
    """Choose the run's name and folder, and the arguments of `cluster.train` in the job."""
    source = required(rest[0] if rest and not rest[0].startswith("-") else None)
    if refused := {"--resume", "--auto-resume"} & set(rest):
        raise UserError(f"{refused.pop()}: leave it out; the same --name again continues a run")
    if Path(source).is_absolute():
        raise UserError(f"{source}: name the TOML file by its path in the checkout, which the job also has")
    name = options.name or f"{Path(source).stem}-{stamp()}"
    if not NAME.fullmatch(name):
        raise UserError(f"--name: expected letters, digits, dots, dashes and underscores, got {name!r}")
    folder = Path(options.folder or f"/runs/{name}")
    if not folder.is_absolute():
        raise UserError(
            f"--folder: expected an absolute path on all nodes of the cluster, got {folder}; "
            "Ray removes a job's own folder"
        )
    return name, folder, [*rest, "--folder", str(folder), "--auto-resume"]


def _check(command: list[str], address: str, print_line: PrintLine) -> RunSettings:
    """Run the checks of the job's driver, unless they need files that only the cluster has."""
    options, settings = configure(command)
    if options.dry_run:
        raise UserError(
            "--dry-run: python -m cluster.train PRESET --dry-run prints the plan without a cluster"
        )
    if settings.cluster.address:
        raise UserError("cluster.address: leave it out; a job runs on the cluster that it is submitted to")
    elsewhere = [f"{key} {path}" for key, path in _paths(settings).items() if _only_there(path)]
    if elsewhere:
        print_line(f"not on this machine, so checked on the cluster: {', '.join(elsewhere)}")
        return settings
    from cluster.config.preflight import check

    # With the address, so that the memory and ports of this machine are not checked.
    remote = settings.cluster.model_copy(update={"address": address})
    for remark in check(settings.model_copy(update={"cluster": remote})).remarks:
        print_line(remark)
    return settings


def _paths(settings: RunSettings) -> dict[str, Path]:
    return {
        "prompts.train": settings.prompts.train,
        "prompts.eval": settings.prompts.eval,
        "model.path": Path(settings.model.path),
    }


def _only_there(path: Path) -> bool:
    return path.is_absolute() and not path.exists()


def _manage(verb: str, arguments: Sequence[str], print_line: PrintLine) -> int:
    """Show or stop a run of the cluster, or list all."""
    parser = Parser(
        prog=program(f"submit {verb}"), usage=f"%(prog)s {'' if verb == 'list' else 'NAME '}--address URL"
    )
    _add_cluster(parser)
    options, rest = parser.parse_known_args(arguments)
    _check_address(options)
    from cluster.submit import jobs
    from cluster.submit.upload import reach

    if verb == "list":
        if rest:
            raise UserError(f"list takes no {shlex.join(rest)}")
        return jobs.listing(reach(options.address, print_line))
    if len(rest) != 1 or rest[0].startswith("-"):
        given = shlex.join(rest) or "none"
        raise UserError(f"expected the name of one run, got {given}; {PROG} list shows them")
    client = reach(options.address, print_line)
    job = jobs.find(client, rest[0])
    if verb == "logs":
        return jobs.logs(client, job, print_line, ongoing=options.follow)
    return jobs.stop(client, job, print_line) if verb == "stop" else jobs.status(job, print_line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
