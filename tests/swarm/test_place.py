"""A trainer that comes back goes on with the samples after those that it has given."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.swarm.conftest import Swarm
from tests.swarm.processes import wait_until

pytestmark = pytest.mark.swarm


def test_a_killed_trainer_goes_on_where_it_was_and_another_one_elsewhere(swarm: Swarm) -> None:
    _, address = swarm.start_auxiliary(swarm.configure(max_global_steps=1000, target_batch_size=512))
    cache = swarm.new_cache("own_cache")

    def places() -> list[dict[str, Any]]:
        return [json.loads(file.read_text()) for file in Path(cache, "places").glob("*/*.json")]

    first = swarm.start_trainer("first", address, "--cache_dir", str(cache))
    wait_until(lambda: len(places()) == 1 and places()[0]["state"]["batches"] > 60, 90, first.output)
    first.interrupt(signal.SIGKILL)
    first.wait()
    [left] = places()

    again = swarm.start_trainer("again", address, "--cache_dir", str(cache))
    other = swarm.start_trainer("other", address, "--cache_dir", str(cache))
    wait_until(
        lambda: (
            len(places()) == 2
            and any(
                place["name"] == left["name"] and place["state"]["batches"] > left["state"]["batches"]
                for place in places()
            )
        ),
        90,
        lambda: again.output() + other.output(),
    )
    [ahead] = [place for place in places() if place["name"] == left["name"]]
    read, reads = (place["state"]["texts"]["sources"][0] for place in (left, ahead))
    assert (reads["passes"], reads["given"]) >= (read["passes"], read["given"])
    assert "begins anew" not in again.output() + other.output()
