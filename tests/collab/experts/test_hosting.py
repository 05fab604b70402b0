"""Servers and who calls them, each a peer of its own on the loopback."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from collab.errors import UserError
from collab.experts.directory import ExpertDirectory, Remote
from collab.experts.joined import refuse_what_experts_cannot
from collab.experts.mixture import Mixture
from collab.experts.plan import ExpertPlan
from collab.experts.server import ExpertHost
from collab.metrics import run_validators
from collab.peer import Peer
from tests.collab.experts.conftest import Experts
from tests.swarm.processes import wait_until

LIFETIME = 6.0


@pytest.fixture
def a_peer(start_peer: Callable[..., Peer]) -> Callable[[], Peer]:
    peers: list[Peer] = []

    def start() -> Peer:
        peer = start_peer(initial_peers=peers[0].addresses() if peers else ())
        peer.dht.add_validators(run_validators("test", "test_abc", 30.0))
        peers.append(peer)
        return peer

    return start


@pytest.fixture
def start_host(a_peer: Callable[[], Peer], tmp_path: Path) -> Iterator[Callable[..., ExpertHost]]:
    hosts: list[ExpertHost] = []

    def start(plan: ExpertPlan, folder: str, wanted: int) -> ExpertHost:
        place = tmp_path / folder
        made = ExpertHost(a_peer(), plan, "test", LIFETIME, wanted=wanted, folder=place, name=folder, save_seconds=1.0)
        hosts.append(made)
        return hosts[-1]

    yield start
    for host in hosts:
        if host.is_alive():
            host.stop()


@pytest.fixture
def find(a_peer: Callable[[], Peer]) -> Iterator[Callable[..., ExpertDirectory]]:
    directories: list[ExpertDirectory] = []

    def start(plan: ExpertPlan, count: int, near: ExpertHost | None = None) -> ExpertDirectory:
        made = ExpertDirectory(a_peer(), plan, "test", LIFETIME, near.experts if near else {})
        directories.append(made)
        wait_until(lambda: len(made.alive()) == count, 20, lambda: f"found {sorted(made.alive())}")
        return made

    yield start
    for directory in directories:
        directory.stop()


@pytest.mark.parametrize("codec, tolerance", [("none", 1e-6), ("scaled_float16", 5e-3)])
def test_experts_elsewhere_are_the_same_function_as_experts_here(
    start_host, find, plan, trained, mixture, codec, tolerance
) -> None:
    plan = dataclasses.replace(plan, codec=codec)
    host = start_host(plan, "one", 4)
    for index, expert in host.experts.items():
        expert.load_bytes(trained[index].as_bytes())
    remote = Mixture(plan, 0)
    remote.load_state_dict(mixture.state_dict())
    remote.experts, mixture.experts = find(plan, 4), Experts(trained)
    rows, same = (torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(3)).requires_grad_() for _ in range(2))
    for _ in range(2):  # the second time after a step of each expert
        there, here = remote(rows), mixture(same)
        assert torch.allclose(there, here, atol=tolerance)
        there.square().mean().backward()
        here.square().mean().backward()
        assert rows.grad is not None and same.grad is not None
        assert torch.allclose(rows.grad, same.grad, atol=tolerance)
        mine, its = remote.gate.weight.grad, mixture.gate.weight.grad
        assert mine is not None and its is not None and torch.allclose(mine, its, atol=tolerance)
    assert [host.experts[i].steps for i in range(4)] == [trained[i].steps for i in range(4)]


def test_servers_share_the_experts_and_one_takes_over_those_of_another_that_is_gone(start_host, find, plan) -> None:
    plan = dataclasses.replace(plan, timeout=5.0)
    one, two = start_host(plan, "one", 2), start_host(plan, "two", 9)
    assert len(one.experts) == len(two.experts) == 2 and sorted([*one.experts, *two.experts]) == [0, 1, 2, 3]
    with pytest.raises(UserError, match="All 4 experts of the run test are served already, by 2 servers"):
        start_host(plan, "three", 1)
    directory = find(plan, 4, near=one)
    kinds = {index: isinstance(expert, Remote) for index, expert in directory.alive().items()}
    assert kinds == {index: index in two.experts for index in range(4)}, "its own are called without the network"

    mixture = Mixture(plan, 0)
    mixture.experts = directory
    rows = torch.randn(64, 8, requires_grad=True)
    for _ in range(3):
        mixture(rows).square().sum().backward()
    trained = {index: expert.as_bytes() for index, expert in two.experts.items()}
    steps = {index: expert.steps for index, expert in two.experts.items()}
    assert min(steps.values()) > 0
    wait_until(lambda: all(one._copy(i).exists() and one._copy(i).stat().st_size == len(trained[i]) for i in steps),
               20, lambda: "no copies of the other server's experts")  # fmt: skip

    two.stop()
    mixture(rows).sum().backward()
    assert rows.grad is not None and rows.grad.isfinite().all()
    wait_until(lambda: sorted(directory.alive()) == sorted(one.experts), 10, lambda: "the dead are still asked")
    heir = start_host(plan, "heir", 9)
    assert {index: expert.steps for index, expert in heir.experts.items()} == steps
    wait_until(lambda: len(directory.alive()) == 4, 10, lambda: f"only {sorted(directory.alive())}")
    assert {view.index: view.server for view in directory.views()} == {
        i: "heir" if i in steps else "one" for i in range(4)
    }


def test_a_server_that_falls_silent_is_set_aside_until_it_answers(start_host, find, plan) -> None:
    host = start_host(plan, "one", 2)
    directory = find(plan, 2)
    expert = next(iter(directory.alive().values()))
    directory.failed(expert, "no answer")
    assert not directory.alive(), "the whole server: its other experts would not answer, either"
    wait_until(lambda: len(directory.alive()) == 2, 10, lambda: "it is not asked again")
    assert len(host.experts) == 2 and directory.calls_failed == 1


def test_what_does_not_go_with_experts_is_refused(plan) -> None:
    refuse_what_experts_cannot(None, 0, True)
    refuse_what_experts_cannot(plan, 4, False)
    with pytest.raises(UserError, match="no experts to serve"):
        refuse_what_experts_cannot(None, 1, False)
    with pytest.raises(UserError, match="computed twice"):
        refuse_what_experts_cannot(plan, 0, True)
