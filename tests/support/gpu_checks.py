"""Checks of the suite for GPUs that end in every way."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from cluster.bench.gpu.check import Setup, SkippedError
from cluster.bench.table import Measurement

ROW = Measurement("before", [1.0])


def crashing(setup: Setup) -> Iterator[Measurement]:
    yield ROW
    os.write(2, b"its last words\n")
    os.abort()


def hanging(setup: Setup) -> Iterator[Measurement]:
    yield ROW
    time.sleep(1000)


def raising(setup: Setup) -> Iterator[Measurement]:
    yield ROW
    raise ValueError("as planted")


def skipping(setup: Setup) -> Iterator[Measurement]:
    yield ROW
    raise SkippedError("not here")


def passing(setup: Setup) -> Iterator[Measurement]:
    yield ROW
