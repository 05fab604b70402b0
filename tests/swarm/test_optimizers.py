"""Kinds of optimizers inside hivemind's: state in RAM makes the same updates, state in 8 bits reaches newcomers."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.regression_peer import SETTINGS
from collab.optimizer import make_optimizer
from collab.peer import Peer
from tests.swarm.processes import wait_until

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]

STEPS, HELD = 4, 2


@pytest.fixture
def start_peer(guarded: None) -> Iterator[Callable[..., Peer]]:
    before = signal.getsignal(signal.SIGINT)
    with contextlib.ExitStack() as stack:
        yield lambda **options: stack.enter_context(
            contextlib.closing(Peer(host_maddrs=["/ip4/127.0.0.1/tcp/0"], nat_port_map=False, **options))
        )
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("kind", ["lamb", "lamb_8bit"])
def test_an_offloaded_optimizer_makes_the_same_updates(start_peer: Callable[..., Peer], kind: str) -> None:
    """With clipping, and with a step that is held back."""
    peer = start_peer()
    weights = [train_alone(peer, kind, offload) for offload in (False, True)]
    for beside, offloaded in zip(*weights, strict=True):
        assert torch.equal(beside, offloaded)
    assert not torch.equal(weights[0][HELD - 1], weights[0][HELD])
    assert torch.equal(weights[0][HELD], weights[0][HELD + 1]), "this step was held back"


def train_alone(peer: Peer, kind: str, offload: bool) -> list[torch.Tensor]:
    """The weights before, and after each global step."""
    generator = torch.Generator().manual_seed(0)
    param = torch.nn.Parameter(torch.randn(100, 90, generator=generator))
    settings = SETTINGS | {"optimizer": kind, "target_batch_size": 16, "max_grad_norm": 0.5}
    groups = [{"params": [param], "weight_decay": 0.1}]
    optimizer = make_optimizer(peer, groups, settings, swarm_id=f"{kind}-{offload}", offload_optimizer=offload)
    seen = [param.detach().clone()]
    with contextlib.ExitStack() as stack:
        stack.callback(optimizer.leave)
        for step in range(STEPS):
            # Powers of two: their mean is exact, however many micro-batches make a step.
            exponents = torch.randint(-8, 2, param.shape, generator=generator)
            gradient = 2.0**exponents * (torch.rand(param.shape, generator=generator) - 0.4).sign()
            optimizer.guard.hold_next = step == HELD

            def made(step: int = step, gradient: torch.Tensor = gradient) -> bool:
                optimizer.zero_grad()
                param.grad = gradient.clone()
                optimizer.step(batch_size=8)
                return bool(optimizer.local_epoch > step)

            wait_until(made, 20, lambda: "no global step was made")
            seen.append(param.detach().clone())
        assert optimizer.guard.held == 1 and optimizer.guard.grad_norm > 0.5
    return seen


@pytest.mark.parametrize("kind", ["lamb_8bit", "adamw_8bit"])
def test_a_newcomer_takes_over_the_very_codes(start_peer: Callable[..., Peer], kind: str) -> None:
    donor_peer = start_peer()
    peers = [donor_peer, start_peer(initial_peers=donor_peer.addresses())]
    settings = SETTINGS | {"optimizer": kind, "target_batch_size": 16}
    with contextlib.ExitStack() as stack:
        params, optimizers = [torch.nn.Parameter(torch.full((100, 90), value)) for value in (1.0, 2.0)], []
        for peer, param in zip(peers, params, strict=True):
            groups = [{"params": [param], "weight_decay": 0.0}]
            optimizers.append(make_optimizer(peer, groups, settings, swarm_id=kind))
            stack.callback(optimizers[-1].leave)
        (donor, newcomer), (donated, received) = optimizers, params
        donated.grad = torch.randn(100, 90, generator=torch.Generator().manual_seed(0))
        donor.opt.step()
        places = {key: value.data_ptr() for key, value in newcomer.opt.state[received].items()}

        wait_until(lambda: newcomer.state_averager.load_state_from_peers(timeout=20), 40, lambda: "no state came")
        assert torch.equal(donated, received)
        for key, value in donor.opt.state[donated].items():
            taken_over = newcomer.opt.state[received][key]
            assert torch.equal(taken_over, value) and taken_over.dtype == value.dtype
            assert taken_over.data_ptr() == places[key] and taken_over.is_shared()
        assert donor.opt.state[donated]["mean_codes"].any()
