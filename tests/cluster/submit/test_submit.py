"""The command line of jobs: its errors before anything is sent, its requests and its output."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails, JobType
from ray.job_submission import JobStatus

from cluster.config.address import JOB_VARIABLE
from cluster.config.version import commit
from cluster.submit import __main__ as submit
from cluster.submit.__main__ import main
from cluster.trackers.ray_job import Job, submission, summary

Capture = pytest.CaptureFixture[str]
ADDRESS = ["--address", "http://127.0.0.1:1"]


class Client:
    """A cluster that starts nothing and records its requests."""

    def __init__(self) -> None:
        self.jobs: list[JobDetails] = []
        self.sent: dict[str, Any] = {}
        self.after_stop: dict[str, str] = {}

    def add(self, name: str, status: JobStatus, code: int | None = None, /, **metadata: str) -> None:
        self.jobs.append(
            JobDetails(
                type=JobType.SUBMISSION, submission_id=name, status=status, entrypoint="python",
                start_time=len(self.jobs), metadata=metadata, driver_exit_code=code, message="the last lines",
            )
        )  # fmt: skip

    def list_jobs(self) -> list[JobDetails]:
        return self.jobs

    def get_job_info(self, name: str) -> JobDetails:
        (found,) = [job for job in self.jobs if job.submission_id == name]
        return found

    def get_job_logs(self, name: str) -> str:
        return f"the log of {name}\n"

    async def tail_job_logs(self, name: str) -> Any:
        for line in ("step 1/2\n", "step 2/2\n"):
            yield line

    def submit_job(self, **job: Any) -> None:
        self.sent = job
        self.uploaded = Path(job["runtime_env"]["working_dir"]).stat().st_size
        self.add(job["submission_id"], JobStatus.FAILED, 2, **job["metadata"])

    def stop_job(self, name: str) -> None:
        job = self.get_job_info(name)
        job.status = JobStatus.STOPPED
        job.metadata = {**(job.metadata or {}), **self.after_stop}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    """The client that `reach` returns for every address."""
    found = Client()
    monkeypatch.setattr("cluster.submit.upload.reach", lambda address, tell: found)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    return found


@pytest.fixture
def refuse(capsys: Capture, client: Client) -> Callable[..., str]:
    """Run the command line, expect a refusal, and return its one line."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main([*arguments]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ")
        assert shown.err.count("\n") == 1
        assert not client.sent
        return shown.err.removeprefix("error: ").rstrip("\n")

    return run


@pytest.fixture
def shapes(model_folder: Path) -> list[str]:
    return ["shapes", "--model.path", str(model_folder), *ADDRESS]


def test_no_cluster_no_preset_no_verb(refuse: Callable[..., str], capsys: Capture) -> None:
    assert refuse("shapes") == "which cluster? Give --address http://HOST:8265, or set RAY_API_SERVER_ADDRESS"
    assert refuse(*ADDRESS).startswith("which preset or TOML file? Presets are flux-pickscore, klein")
    assert refuse("nonesuch", *ADDRESS).startswith("no preset or TOML file 'nonesuch'; presets are")
    assert refuse("shapes", "--address").startswith("argument --address: expected one argument")
    assert main([]) == 2
    assert "Submit a run to a Ray cluster" in capsys.readouterr().out


def test_the_configuration_is_checked_first(refuse: Callable[..., str], shapes: list[str]) -> None:
    assert "--selection.kepe" in refuse(*shapes, "--selection.kepe", "3")
    assert "selection.keep" in refuse(*shapes, "--selection.keep", "300")
    assert "is not a diffusers pipeline" in refuse(*shapes, "--model.path", "cluster")
    assert "unknown reward 'nonesuch'" in refuse(*shapes, "--rewards", '[{"name": "nonesuch"}]')
    assert "missing.txt" in refuse(*shapes, "--prompts.train", "missing.txt")


def test_what_a_job_cannot_do(refuse: Callable[..., str], shapes: list[str], tmp_path: Path) -> None:
    assert refuse(*shapes, "--folder", "runs/one") == (
        "--folder: expected an absolute path on all nodes of the cluster, got runs/one; "
        "Ray removes a job's own folder"
    )
    expected = "--name: expected letters, digits, dots, dashes and underscores, got 'a b'"
    assert refuse(*shapes, "--name", "a b") == expected
    for flag in ("--auto-resume", "--resume"):
        assert refuse(*shapes, flag) == f"{flag}: leave it out; the same --name again continues a run"
    assert refuse(*shapes, "--dry-run").startswith("--dry-run: python -m cluster.train PRESET --dry-run")
    assert refuse(*shapes, "--cluster.address", "auto").startswith("cluster.address: leave it out")
    path = tmp_path / "mine.toml"
    assert refuse(str(path), *ADDRESS).startswith(f"{path}: name the TOML file by its path in the checkout")


def test_what_would_stay_behind(refuse: Callable[..., str], shapes: list[str]) -> None:
    path = "tests/data/prompts.jsonl"
    (submit.CHECKOUT / path).parent.mkdir(exist_ok=True)
    (submit.CHECKOUT / path).write_text('{"prompt": "a photo of a red circle"}\n')
    try:
        flags = ("--prompts.train", path, "--rewards", '[{"name": "jpeg"}]')
        assert refuse(*shapes, *flags).startswith(f"prompts.train: {path} is not part of the upload")
    finally:
        (submit.CHECKOUT / path).unlink()
        (submit.CHECKOUT / path).parent.rmdir()


def test_what_is_sent(client: Client, shapes: list[str], capsys: Capture) -> None:
    assert main([*shapes, "--name", "first", "--steps", "4"]) == 0
    sent = client.sent
    assert sent["submission_id"] == "first"
    assert shlex.split(sent["entrypoint"]) == [
        "python", "-m", "cluster.train", *shapes[:3], "--steps", "4",
        "--folder", "/runs/first", "--auto-resume",
    ]  # fmt: skip
    assert sent["metadata"] == {"name": "first", "folder": "/runs/first"}
    variables = {"RAY_JOB_STOP_WAIT_TIME_S": "600", "NOISEMARGIN_COMMIT": commit()}
    assert sent["runtime_env"]["env_vars"] == variables
    assert 2**20 < client.uploaded < 30 * 2**20
    shown = capsys.readouterr().out
    assert f"upload {client.uploaded / 2**20:.1f} MiB of at most 100.0 MiB" in shown
    assert "submitted first, run folder /runs/first" in shown


def test_a_later_attempt_has_a_number(client: Client, shapes: list[str]) -> None:
    client.add("first", JobStatus.FAILED, name="first")
    client.add("first-2", JobStatus.STOPPED, name="first")
    assert main([*shapes, "--name", "first", "--folder", "/elsewhere/first"]) == 0
    assert client.sent["submission_id"] == "first-3"
    assert client.sent["metadata"] == {"name": "first", "folder": "/elsewhere/first"}


def test_a_name_or_folder_in_use(refuse: Callable[..., str], client: Client, shapes: list[str]) -> None:
    client.add("one", JobStatus.RUNNING, name="one", folder="/runs/one")
    expected = (
        "--name: one is RUNNING in folder /runs/one; stop it first (python -m cluster.submit stop one), "
        "or choose another name and folder"
    )
    assert refuse(*shapes, "--name", "one") == expected
    assert refuse(*shapes, "--name", "two", "--folder", "/runs/one") == expected


def test_what_only_the_cluster_can_see_is_left_to_it(client: Client, capsys: Capture) -> None:
    flags = ["--prompts.train", "/models/a.jsonl", "--prompts.eval", "/models/b.jsonl"]
    assert main(["shapes", *ADDRESS, *flags]) == 0
    told = "not on this machine, so checked on the cluster: prompts.train /models/a.jsonl, prompts.eval"
    assert told in capsys.readouterr().out
    assert client.sent


def test_following_a_run_gives_its_status(client: Client, shapes: list[str], capsys: Capture) -> None:
    assert main([*shapes, "--name", "first", "--follow"]) == 2
    shown = capsys.readouterr().out
    assert "step 1/2\nstep 2/2\nfirst failed, exit status 2, folder /runs/first\n" in shown


def test_what_is_said_of_a_run(client: Client, capsys: Capture) -> None:
    client.add("one", JobStatus.FAILED, 1, name="one", folder="/runs/one")
    client.add("one-2", JobStatus.RUNNING, name="one", folder="/runs/one", step="4/40", reward="0.5")
    assert main(["status", "one", *ADDRESS]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "job         one-2", "state       RUNNING", "step        4/40", "reward      0.5",
        "folder      /runs/one",
    ]  # fmt: skip
    client.jobs.pop()
    assert main(["status", "one", *ADDRESS]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "state       FAILED", "exit status 1", "folder      /runs/one", "the last lines",
    ]  # fmt: skip
    assert main(["logs", "one", *ADDRESS]) == 0
    assert capsys.readouterr().out == "the log of one\n"
    assert main(["list", *ADDRESS]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["one", "FAILED", "/runs/one"]


def test_stopping_a_run(client: Client, capsys: Capture) -> None:
    client.add("one", JobStatus.RUNNING, name="one", step="5/40")
    client.after_stop = {"checkpoint": "5"}
    assert main(["stop", "one", *ADDRESS]) == 0
    shown = capsys.readouterr().out
    assert "one stopped, step 5/40, checkpoint 5\n" in shown
    assert "the same --name one again continues it" in shown
    assert "without a checkpoint" not in shown
    client.add("two", JobStatus.RUNNING, name="two", step="5/40")
    client.after_stop = {}
    assert main(["stop", "two", *ADDRESS]) == 0
    assert "it ended without a checkpoint of its last step" in capsys.readouterr().out


def test_runs_that_are_none(refuse: Callable[..., str], client: Client) -> None:
    client.add("one", JobStatus.SUCCEEDED, 0)
    for verb in ("status", "logs", "stop"):
        assert refuse(verb, "two", *ADDRESS) == "no run 'two' on the cluster; its jobs are one"
        assert refuse(verb, *ADDRESS).startswith("expected the name of one run, got none")
    assert refuse("stop", "one", *ADDRESS) == "one has ended already: SUCCEEDED"
    assert refuse("list", "one", *ADDRESS) == "list takes no one"


def test_a_cluster_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def fail(address: str, tell: object) -> None:
        raise RuntimeError("Request failed with status code 500: no disk")

    monkeypatch.setattr("cluster.submit.upload.reach", fail)
    assert main(["list", *ADDRESS]) == 1
    assert capsys.readouterr().err == "failed: Request failed with status code 500: no disk\n"


def test_a_driver_knows_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(JOB_VARIABLE, raising=False)
    assert submission() is None
    Job("/runs/one", 4).log({"step": 1, "reward_mean": 0.5})  # no job, so nobody is told
    monkeypatch.setenv(JOB_VARIABLE, json.dumps({"metadata": {"job_submission_id": "one-2"}}))
    assert submission() == "one-2"
    assert summary({"name": "one", "folder": "/runs/one", "reward": "0.5", "step": "4/40"}) == (
        "step 4/40, reward 0.5, folder /runs/one"
    )
