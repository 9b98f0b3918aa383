"""Makes a run folder as a training would leave it, with real Parquet, PNG and JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cluster.record.names import STAGES
from rollout.tiny.world import corrupt, draw_scene, scene_for, scene_prompts

STEPS, GROUPS, CANDIDATES, KEEP, PICTURED = 40, 6, 24, 8, 5
CONFIG = f"""
preset = "shapes"
seed = 7
steps = {STEPS}
groups_per_step = {GROUPS}
max_staleness = 1

[model]
path = "models/tiny-shapes"

[rollout]
dynamics = "sde"
noise_level = 0.7

[selection]
candidates = {CANDIDATES}
keep = {KEEP}
strategy = "noise_margin"
advantages = "batch"

[learner]
learning_rate = 3e-4

[[rewards]]
name = "composition"
weight = 1.0
"""
PROMPTS = list(scene_prompts())


def wrongness(step: int) -> float:
    """The chance of a wrong attribute, which training lowers."""
    return 0.08 + 0.42 * math.exp(-step / 14)


def paint(line: dict[str, Any], chance: float, seed: int) -> tuple[np.ndarray, float, float]:
    """An image for a prompt with its soft and strict reward; one seed is one scene but for errors."""
    drawn = corrupt(line, chance, np.random.default_rng(seed))
    facts = [(a.get(key), b.get(key)) for a, b in zip(line["include"], drawn["include"], strict=True)
             for key in ("class", "color", "count", "position") if key in a]  # fmt: skip
    share = sum(a == b for a, b in facts) / len(facts)
    counted = {**drawn, "include": [{**item, "count": min(item["count"], 2)} for item in drawn["include"]]}
    return draw_scene(scene_for(counted, np.random.default_rng(seed + 1))), share, float(share == 1)


def save(pixels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def table(rows: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    kinds = {key: pa.uint64() if key.endswith("_seed") else None for key in columns}
    pq.write_table(pa.table({key: pa.array(column, kinds[key]) for key, column in columns.items()}), path)


def make_step(folder: Path, step: int, pictured: bool) -> dict[str, Any]:
    """Write a step's ledger and images; return its metrics."""
    rng = np.random.default_rng(step)
    rows: list[dict[str, Any]] = []
    margins = []
    for group in range(GROUPS):
        line = PROMPTS[int(rng.integers(len(PROMPTS)))]
        seeds = [int(seed) for seed in rng.integers(2**63, 2**64, size=CANDIDATES, dtype=np.uint64)]
        painted = [paint(line, wrongness(step), seed) for seed in seeds]
        order = sorted(range(CANDIDATES), key=lambda c: painted[c][1])
        kept = {*order[: KEEP // 2], *order[-KEEP // 2 :]}
        margins.append(painted[order[-1]][1] - painted[order[0]][1])
        mean = float(np.mean([reward for _, reward, _ in painted]))
        rows += [
            {"step": step, "group": group, "candidate": c, "prompt": line["prompt"], "noise_seed": seeds[c],
             "path_seed": seeds[c] // 3, "policy_version": step - 1, "reward": reward,
             "reward_composition": reward, "valid": True, "selected": c in kept,
             "advantage": (reward - mean) / 0.3 if c in kept else None, "seconds": 0.05}
            for c, (_, reward, _) in enumerate(painted)
        ]  # fmt: skip
        if pictured and group < PICTURED:
            for c in (order[0], order[-1]):
                save(painted[c][0], folder / f"images/step-{step:06d}/g{group:06d}-c{c:02d}.png")
    table(rows, folder / f"ledger/step-{step:06d}.parquet")
    return metrics(step, rows, margins, rng)


def metrics(step: int, rows: list[dict[str, Any]], margins: list[float], rng: Any) -> dict[str, Any]:
    rewards = [row["reward"] for row in rows]
    noise = rng.uniform(0.8, 1.2, 8)
    times = dict(zip(STAGES, (2.1, 0.4, 0.01, 3.2, 0.15) * noise[:5], strict=True))
    return {
        "step": step, "policy_version": step - 1, "staleness": 0, "reward_mean": float(np.mean(rewards)),
        "reward_std": float(np.std(rewards)), "margin_mean": float(np.mean(margins)),
        "zero_margin_groups": sum(margin == 0 for margin in margins), "dropped_groups": 0,
        "candidates": len(rows), "valid": len(rows), "selected": sum(row["selected"] for row in rows),
        "loss": float(-0.01 * noise[5]), "ratio_mean": 1.0, "ratio_max_deviation": float(2e-4 * noise[6]),
        "clip_fraction": float(0.2 * noise[7]), "kl": 0.001 * step, "grad_norm": float(noise[6]),
        "learning_rate": 3e-4, "advantage_rms": float(1.2 * noise[7]),
        "image_color_entropy": 3.0 * wrongness(step), "image_edge_density": 0.2,
        **({"alarms": {"image_color_entropy": "fell from 1.3 to 0.6"}} if step == 17 else {}),
        **{f"seconds_{stage}": float(value) for stage, value in times.items()},
        "seconds_step": float(sum(times.values())),
    }  # fmt: skip


def make_evaluation(folder: Path, step: int) -> dict[str, Any]:
    rows = []
    for index, line in enumerate(PROMPTS[:180:9]):
        for sample in range(2):
            seed = 1000 * index + sample
            pixels, reward, strict = paint(line, wrongness(step) - 0.05, seed)
            save(pixels, folder / f"images/eval-{step:06d}/p{index:03d}-s{sample}.png")
            rows.append({"prompt_index": index, "sample": sample, "prompt": line["prompt"], "reward": reward,
                         "strict": strict, "reward_composition": reward, "noise_seed": seed})  # fmt: skip
    table(rows, folder / f"eval/step-{step:06d}.parquet")
    means = {f"eval_{key}": float(np.mean([row[key] for row in rows])) for key in ("reward", "strict")}
    return {"step": step, **means, "eval_composition": means["eval_reward"], "seconds_eval": 3.4}


def make_run(folder: Path, steps: int = STEPS, evaluations: tuple[int, ...] = (0, 10, 20, 30, 40)) -> Path:
    """Write a whole run folder; a second evaluation of a step shares the step's line."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(CONFIG)
    lines = []
    for step in range(steps + 1):
        line = make_step(folder, step, pictured=step in (1, 10, 20, 30, 40)) if step else {}
        line |= make_evaluation(folder, step) if step in evaluations else {}
        if line:
            lines.append(json.dumps(line))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / f"checkpoints/step-{steps}").mkdir(parents=True)
    (folder / f"checkpoints/step-{steps}/COMMITTED").touch()
    return folder
