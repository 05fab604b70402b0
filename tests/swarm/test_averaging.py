"""Who takes part in a round, and what happens to it when somebody does not."""

import json
import signal
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.swarm.peers import Peers
from tests.swarm.processes import assert_no_survivors, wait_until

pytestmark = pytest.mark.swarm


def test_peers_that_accept_no_connections_average_through_an_auxiliary_peer(peers: Peers) -> None:
    auxiliary = peers.start("auxiliary")
    clients = [peers.start("client"), peers.start("client")]
    peers.go()
    assert [client.wait() for client in clients] == [0, 0], clients[0].output()
    for number in (1, 2):
        applied = [report for report in peers.reports(number) if report["applied"]]
        assert len(applied) >= 3, peers.reports(number)
        for report in applied:
            assert report["met"] == 2 and report["parts"] == 1.0
            assert report["samples"] == 0  # a client averages nothing itself
    for name, tensor in peers.weights(1).items():
        torch.testing.assert_close(tensor, peers.weights(2)[name], rtol=0, atol=1e-5)
    auxiliary.interrupt()
    assert auxiliary.wait() == 0, auxiliary.output()
    assert json.loads((peers.folder / "log-0.json").read_text())["assisted"] >= 3


def test_an_auxiliary_peer_adds_no_traffic(peers: Peers) -> None:
    """Stock hivemind makes it send a full set of tensors with weight zero."""
    peers.start("auxiliary")
    trainers = [peers.start(), peers.start()]
    peers.go()
    assert [trainer.wait() for trainer in trainers] == [0, 0], trainers[0].output()
    size = sum(tensor.numel() * 4 for tensor in load_file(peers.folder / "averaged-1.safetensors").values())
    helped = [report for number in (1, 2) for report in peers.reports(number) if report["applied"]]
    assert len(helped) >= 4
    for report in helped:
        # Two trainers send each other half of their tensors, and half of the averages: one whole set each way. What the
        # auxiliary peer averages instead changes who gets it, not how much it is.
        assert report["bytes_sent"] < 1.3 * size, (report, size)
        assert report["met"] == 2


def test_the_survivor_of_a_killed_peer_goes_on_alone_and_says_so(peers: Peers) -> None:
    survivor = peers.start(steps=5, averaging_timeout=6.0, metadata_expiration=10.0)
    victim = peers.start(steps=50, averaging_timeout=6.0, metadata_expiration=10.0)
    peers.go()
    victim.process.kill()
    assert_no_survivors(victim)  # p2pd, DHT and averagers end with it
    assert survivor.wait() == 0, survivor.output()
    reports = peers.reports(0)
    assert len(reports) == 5
    assert not reports[-1]["applied"] and reports[-1]["met"] == 1
    for tensor in peers.weights(0).values():
        assert tensor.isfinite().all()


def test_a_peer_that_was_late_once_is_not_late_for_ever_with_delayed_updates(peers: Peers) -> None:
    steps, healed = 16, 5
    settings: dict[str, Any] = {"delay_optimizer_step": True, "delay_grad_averaging": True, "average_state_every": 5}
    programs = [peers.start(steps=steps, target_batch_size=1000, **settings) for _ in range(2)]
    peers.go()

    def told() -> str:
        return "\n".join(program.output() for program in programs)

    wait_until(lambda: min(peers.step(0), peers.step(1)) >= 4, 120, told)
    programs[1].interrupt(signal.SIGSTOP)
    frozen_at = peers.step(0)
    wait_until(lambda: "nobody came" in programs[0].output() or peers.step(0) > frozen_at + 1, 60, told)
    programs[1].interrupt(signal.SIGCONT)
    for number, program in enumerate(programs):
        assert program.wait() == 0, told()  # although a round may still run in the background
        reports = peers.reports(number)[-healed:]
        assert [report["met"] for report in reports] == [2] * healed, reports
        assert [report["parts"] for report in reports] == [1.0] * healed, reports
    assert told().count("already") < 50, "a round that cannot succeed any more was repeated"
