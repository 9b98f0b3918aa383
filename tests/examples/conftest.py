"""What the tests of examples share with those of the service, by name for pytest."""

from tests.support.run_fixtures import judged_here  # noqa: F401 - a fixture
