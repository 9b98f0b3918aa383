"""Shared fixtures of the service's tests."""

from tests.support.run_fixtures import (  # noqa: F401 - fixtures
    configure,
    judged_apart,
    judged_here,
    model_folder,
    node,
    set_free_memory,
)
