"""End to end: a real pipeline, real rewards and every actor, as started by a user, in few shared runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from cluster.config.sources import resolve
from selection.ledger import ledger_schema, read_ledger
from tests.support.service_process import (
    CANDIDATES,
    EVAL_EVERY,
    FLAGS,
    GROUPS,
    KEEP,
    STEPS,
    Service,
    ledger_of,
    metrics_of,
    prepare,
    services,
    survivors,
    timeless,
)  # fmt: skip

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Start = Callable[..., Service]
REQUIRED = """
    step policy_version staleness reward_mean reward_std margin_mean zero_margin_groups candidates valid
    selected image_color_entropy image_pairwise_distance loss ratio_mean ratio_max_deviation
    clip_fraction kl grad_norm learning_rate seconds_sample seconds_score seconds_select seconds_learn
    seconds_broadcast seconds_step
""".split()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> Iterator[Start]:
    """Start the service in a new folder; processes left by a failed test are ended."""
    home = tmp_path_factory.mktemp("service")
    inputs = prepare(home, pipeline_folder)
    with services() as started:

        def begin(name: str, *flags: str) -> Service:
            folder = home / name
            return started(["shapes", *FLAGS, *inputs, "--folder", str(folder), *flags], folder)

        yield begin


@pytest.fixture(scope="module")
def finished(start: Start) -> Service:
    """The run that the others are compared with: two samplers, one learner rank, on-policy."""
    service = start("reference")
    assert service.finish() == 0, service.output
    return service


def test_the_output_tells_the_story(finished: Service) -> None:
    output = finished.output
    assert "Traceback" not in output
    assert output.startswith(f"run folder {finished.folder}\n")
    assert f"step {STEPS}/{STEPS}" in output
    assert f"report {finished.folder / 'report.html'}" in output


def test_the_run_folder_holds_what_it_promises(finished: Service) -> None:
    folder = finished.folder
    steps = [f"step-{step:06d}.parquet" for step in range(1, STEPS + 1)]
    assert sorted(path.name for path in (folder / "ledger").iterdir()) == steps
    evaluated = [f"step-{step:06d}.parquet" for step in range(0, STEPS + 1, EVAL_EVERY)]
    assert sorted(path.name for path in (folder / "eval").iterdir()) == evaluated
    committed = sorted(path.parent.name for path in (folder / "checkpoints").glob("*/COMMITTED"))
    assert (
        committed == sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-6", "step-8"]
    )
    assert list((folder / "tensorboard").glob("events.*"))
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    pictured = {path.name for path in (folder / "images").iterdir()}
    assert {"step-000001", "step-000003", "step-000008", "eval-000000", "eval-000008"} <= pictured
    assert not [path for path in folder.rglob(".*") if path.is_file()]


def test_the_log_tells_the_life_of_the_run(finished: Service) -> None:
    events = [json.loads(line) for line in (finished.folder / "log.jsonl").read_text().splitlines()]
    assert (events[0]["event"], events[-1]["event"]) == ("run started", "run ended")
    assert {event["run"] for event in events} == {"reference"}
    committed = [(e["checkpoint"], e["step"]) for e in events if e["event"] == "checkpoint committed"]
    assert [checkpoint for checkpoint, _ in committed] == [2, 4, 6, 8]
    assert all(checkpoint <= step <= checkpoint + 2 for checkpoint, step in committed)  # it arrives later


def test_the_configuration_of_the_folder_loads_again(finished: Service) -> None:
    settings = resolve(str(finished.folder / "config.toml"), {})
    assert (settings.preset, settings.steps, settings.folder) == ("shapes", STEPS, finished.folder)


def test_metrics_have_every_key_of_every_step(finished: Service) -> None:
    start, *steps = metrics_of(finished.folder)
    assert start["step"] == 0
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert not [key for line in steps for key in REQUIRED if line[key] is None]
    for line in (start, *steps):
        evaluated = line["step"] % EVAL_EVERY == 0
        assert ("eval_reward" in line, "eval_strict" in line, "eval_jpeg" in line) == (evaluated,) * 3


def test_metrics_are_those_of_an_on_policy_run(finished: Service) -> None:
    steps = metrics_of(finished.folder)[1:]
    assert [line["policy_version"] for line in steps] == list(range(STEPS))
    assert {line["staleness"] for line in steps} == {0}
    assert {line["candidates"] for line in steps} == {GROUPS * CANDIDATES}
    assert {line["selected"] for line in steps} == {GROUPS * KEEP}
    assert max(line["ratio_max_deviation"] for line in steps) <= 1e-5
    assert min(line["grad_norm"] for line in steps) > 0


def test_the_ledger_has_a_row_per_candidate(finished: Service) -> None:
    ledger = read_ledger(finished.folder / "ledger")
    assert ledger.column_names == ledger_schema(["jpeg", "shapes"]).names
    assert len(ledger) == STEPS * GROUPS * CANDIDATES
    rows = ledger.to_pylist()
    assert {(row["group"], row["candidate"]) for row in rows} == {
        (group, candidate) for group in range(STEPS * GROUPS) for candidate in range(CANDIDATES)
    }
    assert len({row["noise_seed"] for row in rows} | {row["path_seed"] for row in rows}) == 2 * len(rows)
    assert all((row["advantage"] is not None) == row["selected"] for row in rows)
    total = [row["reward_jpeg"] + 0.5 * row["reward_shapes"] for row in rows]
    assert [row["reward"] for row in rows] == pytest.approx(total)


def test_pictured_pairs_join_to_the_ledger(finished: Service) -> None:
    selected = {
        (row["step"], f"g{row['group']:06d}-c{row['candidate']:02d}.png")
        for row in read_ledger(finished.folder / "ledger").to_pylist()
        if row["selected"]
    }
    pictures = finished.folder.glob("images/step-*/*.png")
    found = {(int(path.parent.name.removeprefix("step-")), path.name) for path in pictures}
    assert found
    assert found <= selected


def test_evaluations_use_the_same_noise(finished: Service) -> None:
    tables = [pq.read_table(path) for path in sorted((finished.folder / "eval").iterdir())]
    identity = ["prompt_index", "sample", "prompt", "noise_seed"]
    assert all(table.select(identity) == tables[0].select(identity) for table in tables)
    assert len(tables[0]) == 3
    assert tables[0]["reward"] != tables[-1]["reward"]


def test_one_sampler_gives_the_same_run_as_two(start: Start, finished: Service) -> None:
    alone = start("alone", "--rollout.workers", "1")
    assert alone.finish() == 0, alone.output
    assert timeless(alone.folder) == timeless(finished.folder)
    assert ledger_of(alone.folder) == ledger_of(finished.folder)


def test_staleness_stays_within_its_bound_also_on_two_ranks(start: Start) -> None:
    service = start("stale", "--max_staleness", "1", "--learner.ranks", "2", "--learner.threads", "1")
    assert service.finish() == 0, service.output
    steps = metrics_of(service.folder)[1:]
    assert [line["staleness"] for line in steps] == [0] + [1] * (STEPS - 1)
    lags = {
        row["step"] - 1 - row["policy_version"] for row in read_ledger(service.folder / "ledger").to_pylist()
    }
    assert lags == {0, 1}
    assert min(line["grad_norm"] for line in steps) > 0


@pytest.fixture(scope="module")
def interrupted(start: Start) -> tuple[Service, list[psutil.Process]]:
    """Interrupt the run in the middle; return also its processes."""
    service = start("interrupted", "--checkpoint_every", "100")
    service.wait_for_step(2)
    family = service.family()
    service.interrupt()
    service.finish()
    return service, family


def test_ctrl_c_commits_a_checkpoint_and_says_how_to_resume(
    interrupted: tuple[Service, list[psutil.Process]],
) -> None:
    service, _ = interrupted
    assert service.process.returncode == 130, service.output
    assert "Traceback" not in service.output
    assert f"python -m cluster.train --resume {service.folder}" in service.output
    last = metrics_of(service.folder)[-1]["step"]
    assert 2 <= last < STEPS
    assert [path.parent.name for path in service.folder.glob("checkpoints/*/COMMITTED")] == [f"step-{last}"]
    assert (service.folder / "report.html").exists()


def test_ctrl_c_leaves_no_process_behind(interrupted: tuple[Service, list[psutil.Process]]) -> None:
    service, family = interrupted
    assert len(family) >= 5
    assert not survivors(family, service.process.pid)


def test_a_resumed_run_is_the_uninterrupted_one(
    interrupted: tuple[Service, list[psutil.Process]], finished: Service
) -> None:
    folder = shutil.copytree(interrupted[0].folder, interrupted[0].folder.with_name("resumed"))
    service = Service(["--resume", str(folder), "--checkpoint_every", "2"], folder)
    assert service.finish() == 0, service.output
    assert timeless(folder) == timeless(finished.folder)
    assert ledger_of(folder) == ledger_of(finished.folder)
    for path in (finished.folder / "eval").iterdir():
        assert pq.read_table(path) == pq.read_table(folder / "eval" / path.name)


def test_a_guard_that_pauses_leaves_a_run_that_can_go_on(start: Start) -> None:
    eager = ["--guard.steps", "2", "--guard.change", "0.001", "--guard.sigmas", "0"]
    service = start("paused", "--guard.action", "pause", *eager)
    assert service.finish() == 130, service.output
    *_, last = metrics_of(service.folder)
    assert last["step"] == 4
    assert set(last["alarms"]) & {"image_color_entropy", "image_pairwise_distance", "image_jpeg_size"}
    assert "step 4: guard: image_" in service.output
    assert f"python -m cluster.train --resume {service.folder}" in service.output
    resumed = Service(["--resume", str(service.folder), "--guard.action", "warn"], service.folder)
    assert resumed.finish() == 0, resumed.output
    assert metrics_of(service.folder)[-1]["step"] == STEPS


def test_a_reward_that_always_fails_ends_the_run_with_its_own_error(start: Start) -> None:
    service = start("broken", "--rewards", json.dumps([{"name": "tests.support.scorers:BrokenScorer"}]))
    assert service.finish() == 1, service.output
    assert "Traceback" not in service.output
    assert "failed: reward 'tests.support.scorers:BrokenScorer': 8 calls in" in service.output
    assert "RuntimeError: the detector is out of order" in service.output


@pytest.mark.parametrize(("step", "every"), [(1, "100"), (3, "2")], ids=["no checkpoint", "a checkpoint"])
def test_the_same_command_continues_a_run_that_was_killed(
    start: Start, finished: Service, step: int, every: str
) -> None:
    flags = (f"again-{step}", "--auto-resume", "--checkpoint_every", every)
    killed = start(*flags)
    killed.wait_for_step(step)
    killed.kill()
    again = start(*flags)
    assert again.finish() == 0, again.output
    assert timeless(again.folder) == timeless(finished.folder)
    assert ledger_of(again.folder) == ledger_of(finished.folder)


def test_ctrl_c_while_the_actors_start_leaves_nothing_behind(start: Start) -> None:
    service = start("early")
    service.wait_until(lambda: len([p for p in service.family() if p.name().startswith("ray::")]) >= 3)
    family = service.family()
    service.interrupt()
    service.wait_until(lambda: "stopping while the run starts" in service.output, 10)
    assert service.finish(60) == 130, service.output
    assert "Traceback" not in service.output
    assert "checkpoint" not in service.output
    assert "starting Ray (0 s)" in service.output
    assert not survivors(family, service.process.pid)


@pytest.mark.slow
@pytest.mark.parametrize("ray_is_there", [False, True])
def test_a_second_ctrl_c_while_a_run_starts_ends_it_at_once(start: Start, ray_is_there: bool) -> None:
    service = start(f"twice-{ray_is_there}")
    named = "ray::WorkerActor" if ray_is_there else "raylet"
    service.wait_until(lambda: any(p.name().startswith(named) for p in service.family()))
    family = service.family()
    service.interrupt()
    service.wait_until(lambda: "stopping while the run starts" in service.output, 10)
    service.interrupt()
    assert service.finish(10) == 130, service.output
    assert service.output.rstrip().endswith("ended at once")
    assert not survivors(family, service.process.pid)


def test_a_healthy_run_has_no_warnings_of_libraries(finished: Service) -> None:
    assert "library warning" not in (finished.folder / "log.jsonl").read_text()
    assert " warns in " not in finished.output


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_even_if_actors_die(start: Start, finished: Service) -> None:
    service = start("killed")
    service.wait_for_step(2)
    for process in service.family():
        if process.name().startswith("ray::WorkerActor") and process.environ().get("OMP_NUM_THREADS") == "1":
            process.kill()  # the samplers, the rewards and the selector; the learner has two threads
    assert service.finish() == 0, service.output
    lines = metrics_of(service.folder)
    assert lines[-1]["restarts"] >= 4
    assert ledger_of(service.folder) == ledger_of(finished.folder)
    assert timeless(service.folder) == timeless(finished.folder)
