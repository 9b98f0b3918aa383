"""The benchmark of one driver says what it needs before it begins."""

from __future__ import annotations

import pytest

from cluster.bench_scale import measure
from cluster.errors import UserError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("node")]


def test_a_store_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match=r"has 0\.2 GB; start with --cluster\.object_store_gb 6"):
        measure(1)
