"""Check that the object store of a local node fits into shared memory; else Ray would put it on disk."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

from cluster.config.errors import UserError

SHARED_MEMORY: Final = Path("/dev/shm")
"""Where Ray keeps objects on Linux."""
ANYWAY: Final = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
"""Ray's own variable by which a user puts up with a store on disk."""
MARGIN: Final = 1.1
"""How much larger than the store shared memory should be, as Ray advises."""


def check_object_store(gigabytes: float) -> str:
    """Refuse a store larger than what is free of shared memory, since every image and weight goes through it.

    Returns a remark if it is too large and the user puts up with that; else an empty text.

    Raises:
        UserError: naming both sizes and what helps.
    """
    if sys.platform != "linux":
        return ""
    try:
        total, _, free = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        raise UserError(f"cluster.object_store_gb: Ray needs {SHARED_MEMORY}: {error.strerror}") from None
    if gigabytes * 1e9 <= free:
        return ""
    sizes = f"{gigabytes:g} GB, but {SHARED_MEMORY} has {free / 1e9:.3g} GB free of {total / 1e9:.3g} GB"
    if os.environ.get(ANYWAY):
        return f"{sizes}, and {ANYWAY} is set"
    raise UserError(
        f"cluster.object_store_gb: {sizes}, so objects would go through the disk; lower it, start the "
        f"container with --shm-size={round(gigabytes * MARGIN * 1000)}m, or set {ANYWAY}=1 to run slowly"
    )
