"""Submit a run to a Ray cluster: ``python -m cluster.submit PRESET_OR_TOML --address URL [--key value ...]``.

It checks the configuration as ``cluster.train`` does, the cluster's lock and the size of the upload, and then
submits the checkout as a job. ``--name NAME`` names the run, ``--folder`` says where its results go (default
/runs/NAME, the volume of our recipes), ``--follow`` shows its output until it ends. The same name again
continues a run from its last checkpoint.

``status NAME``, ``logs NAME [--follow]``, ``stop NAME`` and ``list`` look after runs. RAY_API_SERVER_ADDRESS
stands in for ``--address``; the token comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Final

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console
from rich.table import Table

from cluster.config.errors import UserError
from cluster.config.preflight import check
from cluster.config.settings import RunSettings, preset_names
from cluster.interrupts import INTERRUPTED
from cluster.submit.upload import ADDRESS_VARIABLE, LIMIT, Upload, check_travels, mebibytes, pack, reach
from cluster.trackers.ray_job import TOLD
from cluster.train import configure, stamp

PROG: Final = "python -m cluster.submit"
CHECKOUT: Final = Path(__file__).resolve().parents[2]
STOP_WAIT: Final = 600
"""Seconds that a stopped run has for its step and a checkpoint; Ray's own limit is 3."""
STOP_VARIABLE: Final = "RAY_JOB_STOP_WAIT_TIME_S"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Tell = Callable[[str], None]


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    tell: Tell = partial(Console().print, markup=False, highlight=False, soft_wrap=True)
    try:
        if not arguments or {"-h", "--help"} & set(arguments[:1]):
            tell(__doc__ or "")
            raise UserError(f"which preset or TOML file? Presets are {', '.join(preset_names())}")
        verb = VERBS.get(arguments[0])
        return verb(arguments[1:], tell) if verb else submit(arguments, tell)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        tell("no longer watching; the run is not concerned")
        return INTERRUPTED
    except (RuntimeError, OSError) as error:  # what Ray's client raises when the cluster does not do as asked
        print(f"failed: {error}", file=sys.stderr)
        return 1


def submit(arguments: list[str], tell: Tell) -> int:
    """Check a run, upload the checkout and start a job; returns its exit status if it is followed."""
    options, rest = _options(arguments, "--name", "--folder", follow=True)
    name, folder, command = _command(options, rest)
    settings = _check(command, options.address, tell)
    client = reach(options.address, tell)
    job = _free_name(client, name, str(folder))
    with tempfile.TemporaryDirectory() as scratch:
        upload = pack(CHECKOUT, Path(scratch) / "checkout.zip")
        check_travels({"configuration": Path(rest[0]), **_paths(settings)}, upload, CHECKOUT)
        tell(f"upload {mebibytes(upload.size)} of at most {mebibytes(LIMIT)}, {len(upload.files)} files")
        _send(client, job, name, command, upload)
    tell(f"submitted {job}, run folder {folder}")
    if options.follow:
        return _follow(client, job, tell)
    tell(f"see also: {PROG} status|logs|stop {name} --address {options.address}")
    return 0


def _options(arguments: list[str], *flags: str, follow: bool = False) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog=PROG, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--address", default=os.environ.get(ADDRESS_VARIABLE))
    for flag in flags:
        parser.add_argument(flag)
    if follow:
        parser.add_argument("--follow", action="store_true")
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if options.address is None:
        raise UserError("which cluster? Give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS")
    return options, rest


def _command(options: argparse.Namespace, rest: list[str]) -> tuple[str, Path, list[str]]:
    """The run's name and folder, and the arguments of `cluster.train` that the job gets."""
    if not rest or rest[0].startswith("-"):
        raise UserError(f"which preset or TOML file? Presets are {', '.join(preset_names())}")
    if refused := {"--resume", "--auto-resume"} & set(rest):
        raise UserError(f"{refused.pop()}: leave it out; the same --name again continues a run")
    if Path(rest[0]).is_absolute():
        raise UserError(f"{rest[0]}: name the TOML file by its path in the checkout, which the job has, too")
    name = options.name or f"{Path(rest[0]).stem}-{stamp()}"
    if not NAME.fullmatch(name):
        raise UserError(f"--name: expected letters, digits, dots, dashes and underscores, got {name!r}")
    folder = Path(options.folder or f"/runs/{name}")
    if not folder.is_absolute():
        raise UserError(
            f"--folder: expected an absolute path that every node of the cluster sees, got {folder}; "
            "a job's own folder does not last"
        )
    return name, folder, [*rest, "--folder", str(folder), "--auto-resume"]


def _check(command: list[str], address: str, tell: Tell) -> RunSettings:
    """What the driver of the job will check, except for what only the cluster can see."""
    options, settings = configure(command)
    if options.dry_run:
        raise UserError(
            "--dry-run: python -m cluster.train PRESET --dry-run prints the plan without a cluster"
        )
    if settings.cluster.address:
        raise UserError("cluster.address: leave it out; a job runs on the cluster that it is submitted to")
    elsewhere = [f"{key} {path}" for key, path in _paths(settings).items() if _only_there(path)]
    if elsewhere:
        tell(f"left to the cluster to check, since not on this machine: {', '.join(elsewhere)}")
        return settings
    there = settings.cluster.model_copy(update={"address": address})  # its memory and ports, not ours
    for remark in check(settings.model_copy(update={"cluster": there})).remarks:
        tell(remark)
    return settings


def _paths(settings: RunSettings) -> dict[str, Path]:
    return {
        "prompts.train": settings.prompts.train,
        "prompts.eval": settings.prompts.eval,
        "model.path": Path(settings.model.path),
    }


def _only_there(path: Path) -> bool:
    return path.is_absolute() and not path.exists()


def _free_name(client: JobSubmissionClient, name: str, folder: str) -> str:
    """The job's name: the run's, with a number from its second attempt on."""
    jobs = client.list_jobs()
    for job in jobs:
        known = job.metadata or {}
        same = known.get("name") == name or known.get("folder") == folder
        if same and not job.status.is_terminal():
            raise UserError(
                f"--name: {job.submission_id} is {job.status} in folder {known.get('folder')}; stop it first "
                f"({PROG} stop {job.submission_id}), or take another name and folder"
            )
    taken = {job.submission_id for job in jobs}
    attempts = (f"{name}-{number}" for number in count(2))
    return next(attempt for attempt in chain([name], attempts) if attempt not in taken)


def _send(client: JobSubmissionClient, job: str, name: str, command: list[str], upload: Upload) -> None:
    client.submit_job(
        submission_id=job,
        entrypoint=shlex.join(["python", "-m", "cluster.train", *command]),
        # Ray's process beside the driver reads the variable, and it lives in the job's environment.
        runtime_env={"working_dir": str(upload.path), "env_vars": {STOP_VARIABLE: str(STOP_WAIT)}},
        metadata={"name": name, "folder": command[command.index("--folder") + 1]},
    )


def _follow(client: JobSubmissionClient, job: str, tell: Tell) -> int:
    async def show() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    asyncio.run(show())
    while not (found := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.5)
    tell(_outcome(found))
    if found.status == JobStatus.SUCCEEDED:
        return 0
    return INTERRUPTED if found.status == JobStatus.STOPPED else found.driver_exit_code or 1


def _outcome(job: JobDetails) -> str:
    facts = {**(job.metadata or {})}
    story = [f"{key} {facts[key]}" for key in TOLD if key in facts]
    code = [] if job.driver_exit_code is None else [f"exit status {job.driver_exit_code}"]
    return f"{job.submission_id} {', '.join([str(job.status).lower(), *code, *story])}"


def status(arguments: list[str], tell: Tell) -> int:
    """Say what has become of a run."""
    _, job, _ = _named(arguments, tell)
    facts = {"job": job.submission_id, "state": str(job.status), "exit status": job.driver_exit_code}
    facts |= {key: (job.metadata or {}).get(key) for key in TOLD}
    for key, value in facts.items():
        if value is not None:
            tell(f"{key:<12}{value}")
    if job.status == JobStatus.FAILED:
        tell(job.message or "")
    return 0


def logs(arguments: list[str], tell: Tell) -> int:
    """Show what a run has printed, or what it prints until it ends."""
    client, job, follow = _named(arguments, tell)
    if follow:
        return _follow(client, job.submission_id or "", tell)
    sys.stdout.write(client.get_job_logs(job.submission_id or ""))
    return 0


def stop(arguments: list[str], tell: Tell) -> int:
    """Stop a run after its step, wait for its checkpoint and say what happened."""
    client, job, _ = _named(arguments, tell)
    if job.status.is_terminal():
        raise UserError(f"{job.submission_id} has ended already: {job.status}")
    client.stop_job(job.submission_id or "")
    tell(
        f"asked {job.submission_id} to stop; it ends its step and commits a checkpoint, within {STOP_WAIT} s"
    )
    while not job.status.is_terminal():
        time.sleep(0.5)
        job = client.get_job_info(job.submission_id or "")
    facts = job.metadata or {}
    tell(_outcome(job))
    if "checkpoint" not in facts:
        tell("it ended without a checkpoint of its last step; what came after the one before is lost")
    tell(f"the same --name {facts.get('name', job.submission_id)} again continues it")
    return 0


def _named(arguments: list[str], tell: Tell) -> tuple[JobSubmissionClient, JobDetails, bool]:
    """The newest job of that name, and whether to follow it."""
    options, rest = _options(arguments, follow=True)
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError(
            f"expected the name of one run, got {shlex.join(rest) or 'none'}; {PROG} list has them"
        )
    client, name = reach(options.address, tell), rest[0]
    jobs = [job for job in client.list_jobs() if job.submission_id]
    found = [job for job in jobs if name in (job.submission_id, (job.metadata or {}).get("name"))]
    if not found:
        known = ", ".join(sorted(str(job.submission_id) for job in jobs)) or "none"
        raise UserError(f"no run {name!r} on the cluster; there is {known}")
    return client, max(found, key=lambda job: job.start_time or 0), options.follow


def listing(arguments: list[str], tell: Tell) -> int:
    """Show every job of the cluster, newest first."""
    options, rest = _options(arguments)
    if rest:
        raise UserError(f"list takes no {shlex.join(rest)}")
    jobs = [job for job in reach(options.address, tell).list_jobs() if job.submission_id]
    table = Table("job", "state", *TOLD, box=None)
    for job in sorted(jobs, key=lambda job: -(job.start_time or 0)):
        facts = job.metadata or {}
        table.add_row(job.submission_id, str(job.status), *(facts.get(key, "") for key in TOLD))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


VERBS: Final = {"status": status, "logs": logs, "stop": stop, "list": listing}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
