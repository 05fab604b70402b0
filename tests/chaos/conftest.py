"""What the tests of faults share."""

from tests.chaos.prices import price  # noqa: F401 - a fixture
from tests.swarm.conftest import peers, swarm  # noqa: F401 - fixtures
