"""A run as far as signals see it: ``python -m tests.support.interruptible start|train SECONDS``.

The main thread is in a call for SECONDS that runs no Python code, as calls of Ray's are; a child is there.
"""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import time

from rich.console import Console

from cluster.interrupts import Interrupts


def block(seconds: float) -> None:
    """Do not come back to Python, and let other threads work."""
    started = time.perf_counter()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 200_000)
    rate = 200_000 / (time.perf_counter() - started)
    print("BLOCKED", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", int(rate * seconds))
    print("BACK", flush=True)


async def train(interrupts: Interrupts, seconds: float) -> None:
    """Steps without end, until one is the last."""
    stop = asyncio.Event()
    interrupts.training(stop)
    while not stop.is_set():
        await asyncio.sleep(0)
        block(seconds)


def main(phase: str, seconds: float) -> None:
    """Go through the phases of a run up to the one that is tested."""
    interrupts = Interrupts(Console())
    with interrupts.handling(), subprocess.Popen(["sleep", "600"]) as child:
        try:
            print("CHILD", child.pid, flush=True)
            if phase == "connect":
                block(seconds)
            interrupts.starting()
            if phase == "start":
                block(seconds)
            asyncio.run(train(interrupts, seconds))
        except KeyboardInterrupt:
            print("LEFT", flush=True)
        finally:
            interrupts.closing()
            child.kill()
            if phase == "close":
                block(seconds)
    print("OVER", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
