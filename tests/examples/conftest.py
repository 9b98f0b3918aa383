"""Fixtures that the tests of examples share with those of the service."""

from tests.support.run_fixtures import judged_here  # noqa: F401 - a fixture
