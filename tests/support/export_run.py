"""A run folder with a checkpoint as a training leaves it, and a model hub on a local port."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from cluster.config.sources import resolve
from cluster.record.held_out import held_out
from cluster.record.marker import Commit, to_marker
from cluster.record.names import MARKER
from cluster.record.run_folder import RunFolder
from learner.digests import digests
from rewards.combine import Scores
from rollout.records import Prompt
from rollout.worker import RolloutWorker

TEXT = 'a photo of "two" red circles'
SIZE = {"width": 32, "height": 32, "steps": 4, "eval_steps": 4, "guidance": 2.0, "workers": 1}
STEPS = (2, 4)


@dataclass
class MadeRun:
    """A run folder, and the images of its held-out prompt by the last checkpoint's average."""

    folder: Path
    images: np.ndarray


def make_run(folder: Path, base: Path, *, lora_rank: int) -> MadeRun:
    """Two committed checkpoints and one that was cut off; the average differs from the current weights."""
    settings = resolve(
        "shapes",
        {"folder": str(folder), "steps": 6, "seed": 9, "eval_samples": 1, "rollout": SIZE,
         "model": {"path": str(base), "lora_rank": lora_rank, "lora_alpha": 12}},
    )  # fmt: skip
    run = RunFolder(folder)
    run.create(settings)
    worker = RolloutWorker(settings.model, settings.rollout, settings.seed)
    drawn = held_out([Prompt(index=0, text=TEXT)], settings)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    for step in (0, *STEPS):
        images = worker.evaluate([prompt for prompt, _, _ in drawn], [noise for _, _, noise in drawn])[1]
        scores = {"shapes": np.array([0.25 + step / 10])}
        done = Scores(
            rewards=scores,
            weights={"shapes": 1.0},
            valid=np.array([True]),
            total=scores["shapes"],
            strict=None,
        )
        run.save_evaluation(step, drawn, done, images)
        reward = float(scores["shapes"][0])
        wins = {"eval_win_rate": float(step > 0)}
        run.log({"step": step, "eval_reward": reward, "eval_shapes": reward, **wins})
        if step:
            _checkpoint(run.checkpoints / f"step-{step}", worker, step)
        _move(worker, step)
    (run.checkpoints / "step-6").mkdir()
    return MadeRun(folder, images)


def _checkpoint(folder: Path, worker: RolloutWorker, step: int) -> None:
    folder.mkdir(parents=True)
    average = {name: p.detach().clone() for name, p in worker.parameters}
    save_file(average, folder / "average.safetensors")
    save_file({name: p * 1.5 for name, p in average.items()}, folder / "weights.safetensors")
    commit = Commit(step=step, empty_batches=0, files=digests(folder), settings={}, packages={})
    (folder / MARKER).write_bytes(to_marker(commit))


def _move(worker: RolloutWorker, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in worker.parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


@dataclass
class Hub:
    """What a hub was sent."""

    address: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    created: list[dict[str, Any]] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    files: dict[str, bytes] = field(default_factory=dict)
    card: str | None = None


@contextmanager
def running_hub(refuse: int | None = None) -> Iterator[Hub]:
    """A hub that takes one commit into one new repository, or refuses every call with a status."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.calls.append(("POST", self.path))
            hub.tokens.add(self.headers.get("Authorization"))
            self.answer(refuse or 200, {"error": "no room"} if refuse else _respond(hub, self.path, body))

        def do_GET(self) -> None:
            hub.calls.append((self.command, self.path))
            if hub.card is None or not self.path.endswith("/someone/base/resolve/main/README.md"):
                return self.answer(404, {"error": "not found"})
            self.send(200, hub.card.encode(), {"ETag": '"a"', "X-Repo-Commit": "0" * 40})

        do_HEAD = do_GET

        def answer(self, status: int, body: Any) -> None:
            self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _respond(hub: Hub, path: str, body: bytes) -> Any:
    if path == "/api/repos/create":
        hub.created.append(json.loads(body))
        return {"url": f"{hub.address}/someone/some-model", "name": "someone/some-model", "id": "0"}
    if "/preupload/" in path:
        asked = json.loads(body)["files"]
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]}
    if "/commit/" in path:
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return {
            "success": True,
            "commitUrl": f"{hub.address}/someone/some-model/commit/0",
            "commitOid": "0" * 40,
        }
    return {}
