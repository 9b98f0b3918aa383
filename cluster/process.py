"""How a process that has used Ray ends."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """End the process with a status, without taking the interpreter apart.

    Calls that were given up leave callbacks in Ray's threads, which crash when the interpreter goes first; a
    run that has finished would then be reported, and tried again, as one that failed.
    """
    atexit._run_exitfuncs()  # Ray's own, which ends its processes, and everybody else's
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
