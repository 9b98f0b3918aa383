"""Check that the object store of a local node fits into shared memory; otherwise Ray would put it on disk."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

from cluster.config.errors import UserError

SHARED_MEMORY: Final = Path("/dev/shm")
"""The location of Ray's object store on Linux."""
ANYWAY: Final = "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"
"""Ray's own variable by which a user accepts a store on disk."""
MARGIN: Final = 1.1
"""The factor by which shared memory should exceed the store, as Ray advises."""


def check_object_store(gigabytes: float) -> str:
    """Check that the store fits into free shared memory, since all images and weights pass through it.

    Returns:
        A remark if the store is too large and the user accepts that, else an empty text.

    Raises:
        UserError: naming both sizes and the remedies.
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
