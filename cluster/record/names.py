"""The names of what a run folder and a checkpoint contain, and of the stages in their metrics."""

from __future__ import annotations

from typing import Final

CONFIG: Final = "config.toml"
METRICS: Final = "metrics.jsonl"
LOG: Final = "log.jsonl"
NONFINITE: Final = "nonfinite.jsonl"
LEDGER: Final = "ledger"
IMAGES: Final = "images"
EVAL: Final = "eval"
CHECKPOINTS: Final = "checkpoints"
TENSORBOARD: Final = "tensorboard"
REPORT: Final = "report.html"

MARKER: Final = "COMMITTED"
"""The commit marker of a checkpoint, written last."""

STAGES: Final = ("sample", "score", "select", "learn", "broadcast")
"""The stages of a step in order; the metric ``seconds_STAGE`` has the time of each."""
