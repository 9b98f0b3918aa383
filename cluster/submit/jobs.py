"""Jobs of a Ray cluster: submit a run, follow it, and manage it by name."""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Callable
from itertools import chain, count
from typing import Final

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from rich.console import Console
from rich.table import Table

from cluster.config.command import Status
from cluster.config.errors import UserError
from cluster.config.version import COMMIT_VARIABLE, commit
from cluster.submit.upload import Upload
from cluster.trackers.ray_job import FACTS

PROG: Final = "python -m cluster.submit"
STOP_WAIT: Final = 600
"""Seconds for a stopped run to finish its step and a checkpoint; Ray's default is 3."""
STOP_VARIABLE: Final = "RAY_JOB_STOP_WAIT_TIME_S"

PrintLine = Callable[[str], None]


def free_name(client: JobSubmissionClient, name: str, folder: str) -> str:
    """Choose the job's name: the run's, with a number from its second attempt on.

    Raises:
        UserError: if a run of that name or folder is in progress.
    """
    jobs = client.list_jobs()
    for job in jobs:
        known = job.metadata or {}
        same = known.get("name") == name or known.get("folder") == folder
        if same and not job.status.is_terminal():
            raise UserError(
                f"--name: {job.submission_id} is {job.status} in folder {known.get('folder')}; stop it first "
                f"({PROG} stop {job.submission_id}), or choose another name and folder"
            )
    taken = {job.submission_id for job in jobs}
    attempts = (f"{name}-{number}" for number in count(2))
    return next(attempt for attempt in chain([name], attempts) if attempt not in taken)


def send(client: JobSubmissionClient, job: str, name: str, command: list[str], upload: Upload) -> None:
    """Submit a run as a job, with its commit and enough time to stop."""
    # Ray reads the first variable in the job's supervisor, which has the job's environment.
    variables = {STOP_VARIABLE: str(STOP_WAIT), COMMIT_VARIABLE: commit()}
    client.submit_job(
        submission_id=job,
        entrypoint=shlex.join(["python", "-m", "cluster.train", *command]),
        runtime_env={"working_dir": str(upload.path), "env_vars": variables},
        metadata={"name": name, "folder": command[command.index("--folder") + 1]},
    )


def follow(client: JobSubmissionClient, job: str, print_line: PrintLine) -> int:
    """Show the output of a job until it ends, and return its exit status."""

    async def show() -> None:
        async for text in client.tail_job_logs(job):
            sys.stdout.write(text)
            sys.stdout.flush()

    asyncio.run(show())
    while not (found := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.5)
    print_line(_outcome(found))
    if found.status == JobStatus.SUCCEEDED:
        return Status.DONE
    if found.status == JobStatus.STOPPED:
        return Status.INTERRUPTED
    return found.driver_exit_code or Status.FAILED


def _outcome(job: JobDetails) -> str:
    metadata = job.metadata or {}
    facts = [f"{key} {metadata[key]}" for key in FACTS if key in metadata]
    code = [] if job.driver_exit_code is None else [f"exit status {job.driver_exit_code}"]
    return f"{job.submission_id} {', '.join([str(job.status).lower(), *code, *facts])}"


def status(job: JobDetails, print_line: PrintLine) -> int:
    """Show the state of a run."""
    facts = {"job": job.submission_id, "state": str(job.status), "exit status": job.driver_exit_code}
    facts |= {key: (job.metadata or {}).get(key) for key in FACTS}
    for key, value in facts.items():
        if value is not None:
            print_line(f"{key:<12}{value}")
    if job.status == JobStatus.FAILED:
        print_line(job.message or "")
    return Status.DONE


def logs(client: JobSubmissionClient, job: JobDetails, print_line: PrintLine, *, ongoing: bool) -> int:
    """Show the output of a run so far, or until it ends."""
    if ongoing:
        return follow(client, job.submission_id or "", print_line)
    sys.stdout.write(client.get_job_logs(job.submission_id or ""))
    return Status.DONE


def stop(client: JobSubmissionClient, job: JobDetails, print_line: PrintLine) -> int:
    """Stop a run after its step, wait for its checkpoint and print the outcome.

    Raises:
        UserError: if it has ended.
    """
    if job.status.is_terminal():
        raise UserError(f"{job.submission_id} has ended already: {job.status}")
    client.stop_job(job.submission_id or "")
    print_line(
        f"asked {job.submission_id} to stop; it ends its step and commits a checkpoint, within {STOP_WAIT} s"
    )
    while not job.status.is_terminal():
        time.sleep(0.5)
        job = client.get_job_info(job.submission_id or "")
    facts = job.metadata or {}
    print_line(_outcome(job))
    if "checkpoint" not in facts:
        print_line("it ended without a checkpoint of its last step; steps after the previous one are lost")
    print_line(f"the same --name {facts.get('name', job.submission_id)} again continues it")
    return Status.DONE


def find(client: JobSubmissionClient, name: str) -> JobDetails:
    """Find the newest job of a run.

    Raises:
        UserError: if the cluster has no such run.
    """
    jobs = [job for job in client.list_jobs() if job.submission_id]
    found = [job for job in jobs if name in (job.submission_id, (job.metadata or {}).get("name"))]
    if not found:
        known = ", ".join(sorted(str(job.submission_id) for job in jobs)) or "none"
        raise UserError(f"no run {name!r} on the cluster; its jobs are {known}")
    return max(found, key=lambda job: job.start_time or 0)


def listing(client: JobSubmissionClient) -> int:
    """Show every job of the cluster, newest first."""
    jobs = [job for job in client.list_jobs() if job.submission_id]
    table = Table("job", "state", *FACTS, box=None)
    for job in sorted(jobs, key=lambda job: -(job.start_time or 0)):
        facts = job.metadata or {}
        table.add_row(job.submission_id, str(job.status), *(facts.get(key, "") for key in FACTS))
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return Status.DONE
