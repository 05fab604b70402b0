"""Peers come and go all the time: the others train on, and lose hardly a round."""

import signal
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch

from benchmarks.regression_peer import loss_of, make_model
from tests.chaos.prices import Price
from tests.swarm.peers import Peers
from tests.swarm.processes import wait_until

pytestmark = pytest.mark.chaos

TRAINERS, STEPS, CALM_STEPS = 4, 32, 5
EVERY_STEPS = 2  # somebody comes and somebody goes
SETTINGS: dict[str, Any] = {
    "averaging_timeout": 6.0,
    "target_batch_size": 2000,
    "metadata_expiration": 10.0,
    "average_state_every": 4,
}


def held_out_loss(peers: Peers, number: int) -> float:
    """Of the weights with which a peer has left, on samples that nobody trains on."""
    model = make_model()
    model.load_state_dict(peers.weights(number))
    with torch.no_grad():
        return float(loss_of(model, seed=-1, size=4000))


def test_a_swarm_of_which_half_is_replaced_within_ten_steps_learns_on(peers: Peers, price: Price) -> None:
    for _ in range(TRAINERS):
        peers.start(steps=STEPS, **SETTINGS)
    peers.go()
    here: list[int] = list(range(TRAINERS))
    left: list[int] = []
    killed: list[int] = []
    gone_at: list[int] = []

    def wait_for(step: int) -> None:
        wait_until(
            lambda: max(map(peers.step, here)) >= step, 120, lambda: "\n".join(peers.programs[n].output() for n in here)
        )

    for how in cycle([signal.SIGTERM, signal.SIGKILL]):
        wait_for(min(max(map(peers.step, here)) + EVERY_STEPS, STEPS))
        if max(map(peers.step, here)) >= STEPS - CALM_STEPS:
            break
        peers.start(steps=STEPS, through=here[-1], **SETTINGS)
        here.append(len(peers.programs) - 1)
        goes = here.pop(0)
        (left if how == signal.SIGTERM else killed).append(goes)
        peers.programs[goes].interrupt(how)
        gone_at.append(max(map(peers.step, here)))
    for number in [*here, *left]:
        assert peers.programs[number].wait() == 0, peers.programs[number].output()

    assert len(gone_at) >= TRAINERS and all(later - sooner <= 10 for sooner, later in pairwise(gone_at)), gone_at
    verdicts = [verdict for number in range(len(peers.programs)) for verdict in peers.verdicts(number)]
    together = [verdict for verdict in verdicts if verdict["expected"] > 1]
    failed = [verdict for verdict in together if not verdict["applied"]]
    price("churn", f"{len(gone_at)} of {TRAINERS} in {STEPS} steps", rounds=len(together), failed_rounds=len(failed))
    assert len(failed) <= 0.1 * len(together), failed
    losses = [held_out_loss(peers, number) for number in [*left, here[-1]]]
    assert all(later < sooner for sooner, later in pairwise(losses)), losses
    one, *others = (peers.weights(number) for number in here)
    for other in others:
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-5)
