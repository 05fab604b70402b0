"""Faults of hivemind 1.1.12 that need real averagers: each is shown on its own classes and on ours, in one place.

When the stock half of a test fails, upstream has mended the fault, and the override that repairs it can go.
"""

import contextlib
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import hivemind
import pytest
import torch
from hivemind import DHT
from hivemind.averaging import DecentralizedAverager
from hivemind.averaging.allreduce import AllreduceException
from hivemind.averaging.control import AveragingStage, StepControl
from hivemind.compression import Uniform8BitQuantization
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.progress_tracker import LocalTrainingProgress, ProgressTracker
from hivemind.utils import get_dht_time

import collab.optimizer
from benchmarks.regression_peer import SETTINGS
from collab.averager import Averager
from collab.optimizer import Tracker, make_optimizer
from collab.peer import Peer
from collab.processes import StopSignal
from tests.swarm.processes import wait_until

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(90)]

SECONDS = 30.0  # no round here may take longer
RETRIES: dict[str, dict[str, bool]] = {"stock": {"allow_retries": False}, "ours": {}}  # ours never repeats a round
BOTH = pytest.mark.parametrize("kind", ["stock", "ours"])
lookups = multiprocessing.Value("i", 0)  # in the DHT, by all peers together


@pytest.fixture(scope="module")
def peers(guarded: None) -> Iterator[list[Peer]]:
    """Three peers that accept connections, and one that does not; their DHTs count what is looked up."""
    get = DHT._get

    async def counted(self: DHT, *args: Any, **kwargs: Any) -> None:
        with lookups.get_lock():
            lookups.value += 1
        await get(self, *args, **kwargs)

    before = signal.getsignal(signal.SIGINT)
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(DHT, "_get", counted)
        found: list[Peer] = []
        for client_mode in (False, False, False, True):
            options: dict[str, Any] = {"initial_peers": found[0].addresses()} if found else {}
            found.append(Peer(host_maddrs=["/ip4/127.0.0.1/tcp/0"], client_mode=client_mode, **options))
            stack.callback(found[-1].close)
        yield found
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def run_id(request: pytest.FixtureRequest) -> str:
    """A name of its own for every test, so that none meets another one's peers."""
    return "".join(letter for letter in request.node.name if letter.isalnum())


def report_progress(peer: Peer, run_id: str, *, step: int = 0, samples: int = 16, auxiliary: bool = False) -> None:
    """Tell the swarm that `peer` is there, at this step and with so many samples, whatever it really does."""
    progress = LocalTrainingProgress(
        peer_id=peer.dht.peer_id.to_bytes(), epoch=step, samples_accumulated=samples,
        samples_per_second=0.0 if auxiliary else 10.0, time=get_dht_time(), client_mode=False,
    )  # fmt: skip
    value, expiration = progress.dict(), get_dht_time() + 60
    assert peer.dht.store(f"{run_id}_progress", subkey=peer.signature_key, value=value, expiration_time=expiration)


def settle(peer: Peer) -> None:
    """Wait until the DHT has read all that was asked so far: it ends if the averager that asked is gone by then, for
    it catches no EOFError (dht/dht.py:128)."""
    peer.dht.get("anything")


# ---- averagers ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def averagers(
    kind: type[GradientAverager], peers: Sequence[Peer], run_id: str, auxiliary: int | None = None, **options: Any
) -> Iterator[list[Any]]:
    """One averager for each peer, of 1,000 values. `auxiliary` is the number of the peer that only helps."""
    made: list[GradientAverager] = []
    if issubclass(kind, Averager):
        options |= {"progress_key": f"{run_id}_progress", "lag": 0}
        for number, peer in enumerate(peers):
            report_progress(peer, run_id, auxiliary=number == auxiliary)
    try:
        for number, peer in enumerate(peers):
            made.append(
                kind(
                    [torch.nn.Parameter(torch.zeros(1000))], dht=peer.dht, prefix=f"{run_id}_grad_averager", start=True,
                    auxiliary=number == auxiliary, allow_state_sharing=False,
                    **{"min_matchmaking_time": 3.0, "request_timeout": 1.0, "allreduce_timeout": SECONDS} | options,
                )
            )  # fmt: skip
            if isinstance(made[-1], Averager):
                made[-1].round_number = 1
        yield made
    finally:
        for averager, peer in zip(made, peers, strict=False):
            settle(peer)
            averager.shutdown()


def contribute(averager: GradientAverager, value: float) -> None:
    averager.parameters[0].grad = torch.full((1000,), value)
    averager.accumulate_grads_(batch_size=8)


def begin(averager: GradientAverager, control: StepControl | None = None) -> StepControl:
    return averager.step(control=control, timeout=SECONDS, wait=False)


def has_stopped_looking(control: StepControl) -> bool:
    return control.stage == AveragingStage.AWAITING_TRIGGER


def averaged(averager: GradientAverager) -> torch.Tensor:
    with averager.get_tensors() as [tensor]:
        return tensor.clone()


@BOTH
def test_an_auxiliary_peer_receives_no_gradients(peers: list[Peer], run_id: str, kind: str) -> None:
    """Stock hivemind computes who is an auxiliary peer and does not pass it on: it is sent all averages, for nothing,
    and sends a whole set of tensors with a weight of zero."""
    options = {} if kind == "ours" else {"target_group_size": 3, "min_group_size": 3}
    cls = Averager if kind == "ours" else GradientAverager
    with averagers(cls, peers[:3], run_id, auxiliary=2, **options) as [one, other, helper]:
        contribute(one, 1.0)
        contribute(other, 3.0)
        rounds = [begin(averager) for averager in (helper, one, other)]
        results = [control.result(SECONDS) for control in rounds]
        torch.testing.assert_close(averaged(one), torch.full((1000,), 2.0))
        torch.testing.assert_close(averaged(other), torch.full((1000,), 2.0))
        if kind == "stock":
            assert averaged(helper).mean() == pytest.approx(2.0) and len(results[0]) == 3
        else:
            assert not averaged(helper).any()
            assert {(len(tally.peers), tally.assistants, tally.parts) for tally in results} == {(2, 1, 1.0)}


@BOTH
def test_parts_that_were_lost_are_counted(
    peers: list[Peer], run_id: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With numpy 2.4 no 8-bit codec of hivemind can be decoded. Stock hivemind says that it averaged with 2 peers."""

    def extract(self: Any, message: Any) -> torch.Tensor:
        raise TypeError("only 0-dimensional arrays can be converted to Python scalars")

    monkeypatch.setattr(Uniform8BitQuantization, "extract", extract)  # the averagers' processes are forked with it
    options = {"compression": Uniform8BitQuantization(), "next_chunk_timeout": 2.0}
    cls = Averager if kind == "ours" else GradientAverager
    with averagers(cls, peers[:2], run_id, **options) as [one, other]:
        contribute(one, 1.0)
        contribute(other, 3.0)
        results = [control.result(SECONDS) for control in [begin(one), begin(other)]]
        assert averaged(one).mean() < 2.0 < averaged(other).mean(), "they have not met in the middle"
        if kind == "stock":
            assert [len(result) for result in results] == [2, 2], "nobody notices"
        else:
            assert all(tally.parts <= 0.5 for tally in results), results


@BOTH
def test_all_peers_meet_although_one_begins_to_look_late(peers: list[Peer], run_id: str, kind: str) -> None:
    """Peers do not agree on when a step will be complete. Stock hivemind groups whoever has declared itself when the
    first declaration ends, long before anybody is ready; the third peer finds nobody."""
    cls = Averager if kind == "ours" else GradientAverager
    with averagers(cls, peers[:3], run_id) as [one, other, late]:
        for averager, value in ((one, 1.0), (other, 2.0), (late, 6.0)):
            contribute(averager, value)
        early = [averager.schedule_step(timeout=SECONDS) for averager in (one, other)]
        if kind == "stock":
            wait_until(lambda: all(map(has_stopped_looking, early)), SECONDS, lambda: f"{early}")
        third = late.schedule_step(timeout=SECONDS if kind == "ours" else 3.5)
        rounds = [begin(averager, control) for averager, control in ((one, early[0]), (other, early[1]), (late, third))]
        results = [control.result(SECONDS) for control in rounds[: 3 if kind == "ours" else 2]]
        if kind == "stock":
            assert [len(result) for result in results] == [2, 2]
            assert averaged(one).mean() == pytest.approx(1.5) and averaged(late).mean() == pytest.approx(6.0)
            assert "could not find a group" in str(rounds[2].exception(SECONDS))
        else:
            assert [(len(tally.peers), tally.expected) for tally in results] == [(3, 3)] * 3
            assert averaged(one).mean() == averaged(late).mean() == pytest.approx(3.0)


@BOTH
@pytest.mark.parametrize("claims", [(10.0, -5.0), (0.0, 0.0)], ids=["a wild one", "nobody wants to average"])
def test_what_peers_say_about_their_links_fails_no_round(
    peers: list[Peer], run_id: str, kind: str, claims: tuple[float, float]
) -> None:
    """Stock hivemind asserts that they are sensible, and the round is lost for everybody."""
    cls = Averager if kind == "ours" else GradientAverager
    with averagers(cls, peers[:2], run_id) as [one, other]:
        contribute(one, 1.0)
        contribute(other, 3.0)
        one.bandwidth, other.bandwidth = claims
        rounds = [averager.schedule_step(timeout=SECONDS, **RETRIES[kind]) for averager in (one, other)]
        for averager, control in zip((one, other), rounds, strict=True):
            begin(averager, control)
        failures = [control.exception(SECONDS) for control in rounds]
        assert [failure is None for failure in failures] == [kind == "ours"] * 2, failures
        assert torch.allclose(averaged(one), torch.full((1000,), 2.0)) is (kind == "ours")


class _FailsOnce(DecentralizedAverager):
    """The first all-reduce breaks off when a part of the tensors is averaged already."""

    failures_left = 1

    async def _run_allreduce_inplace_(self, tensors: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        if self.failures_left:
            self.failures_left -= 1
            tensors[0][:500] += 100.0
            raise AllreduceException("the connection is gone")
        await super()._run_allreduce_inplace_(tensors, *args, **kwargs)


class StockThatFailsOnce(_FailsOnce, GradientAverager):
    """Averagers have to be classes of a module: peers find each other by their names."""


class OursThatFailsOnce(_FailsOnce, Averager):
    """The same of ours."""


@BOTH
def test_a_repeated_round_starts_from_what_the_peers_put_in(peers: list[Peer], run_id: str, kind: str) -> None:
    """Stock hivemind repeats a failed all-reduce with tensors that are half averaged."""
    cls = OursThatFailsOnce if kind == "ours" else StockThatFailsOnce
    with averagers(cls, peers[:2], run_id) as [one, other]:
        contribute(one, 1.0)
        contribute(other, 3.0)
        rounds = [begin(one), begin(other)]
        if kind == "ours":
            for control in rounds:
                assert control.exception(SECONDS) is not None
            rounds = [averager.retry(weight=8.0, timeout=SECONDS) for averager in (one, other)]
        for control in rounds:
            control.result(SECONDS)
        right = torch.full((1000,), 2.0)
        for averager in (one, other):
            assert torch.allclose(averaged(averager), right) is (kind == "ours")


@BOTH
def test_a_search_for_peers_leaves_the_dht_in_peace(peers: list[Peer], run_id: str, kind: str) -> None:
    """Stock hivemind asks it again and again without a pause: hundreds of times until the search ends."""
    cls = Averager if kind == "ours" else GradientAverager
    with averagers(cls, peers[:1], run_id) as [averager]:
        report_progress(peers[1], run_id)  # so that there is somebody to look for
        before = lookups.value
        control = averager.schedule_step(timeout=3.5)
        wait_until(lambda: has_stopped_looking(control), SECONDS, lambda: f"{control}")
        if kind == "stock":
            assert lookups.value - before > 50
        else:
            assert 2 <= lookups.value - before <= 12, "one every half second"


def test_starting_an_averager_lets_ctrl_c_do_nothing_until_we_listen_again(peers: list[Peer], run_id: str) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with averagers(GradientAverager, peers[:1], run_id):
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            stop = StopSignal()
            stop.listen()
            signal.raise_signal(signal.SIGINT)
            assert stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the optimizer -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def optimizer_of(kind: str, peer: Peer, run_id: str, param: torch.nn.Parameter, **settings: Any) -> Iterator[Any]:
    """AdamW on one parameter. `settings`: what stock hivemind and we call the same."""
    options = {"target_batch_size": 24, "averaging_timeout": 4.0} | settings
    made: Any
    if kind == "ours":
        bandwidth = options.pop("bandwidth", None)
        wanted = SETTINGS | {"failed_round": "local"} | options
        groups = [{"params": [param], "weight_decay": 0.0}]
        made = make_optimizer(peer, groups, wanted, swarm_id=run_id, bandwidth=bandwidth)
    else:
        averager_options = {"request_timeout": 0.5, "bandwidth": options.pop("bandwidth", None)}
        made = hivemind.Optimizer(
            dht=peer.dht, run_id=run_id, params=[param], optimizer=partial(torch.optim.AdamW, weight_decay=0.0),
            matchmaking_time=1.0, offload_optimizer=False, delay_state_averaging=False, average_state_every=1000,
            averager_opts=averager_options, tracker_opts={"private_key": peer.private_key},
            grad_averager_factory=partial(GradientAverager, request_timeout=0.5), **options,
        )  # fmt: skip
    try:
        yield made
    finally:
        made.tracker.shutdown(1.0)
        settle(peer)
        if kind == "ours":
            assert made.leave()
        else:
            for averager in (made.state_averager, made.grad_averager):
                averager.shutdown()
            made._parent_pid = 0  # it is down; its __del__ would do it once more


def micro_batch(optimizer: Any, param: torch.nn.Parameter, gradient: torch.Tensor) -> None:
    optimizer.zero_grad()
    param.grad = gradient.clone()
    optimizer.step(batch_size=8)


def momentum(optimizer: Any, param: torch.nn.Parameter) -> torch.Tensor:
    """The gradient of the first step: AdamW's first moment is a tenth of it."""
    return optimizer.opt.state[param]["exp_avg"] * 10


GRADIENT = torch.tensor([0.3, -0.4])  # of a norm that is not clipped


@BOTH
def test_a_failed_round_goes_on_with_the_own_gradient(peers: list[Peer], run_id: str, kind: str) -> None:
    """Stock hivemind has emptied the accumulators when it falls back to them: a step with a gradient of zero."""
    for ghost in peers[1:3]:
        report_progress(ghost, run_id)  # two peers that will not come, with enough samples for a step
    param = torch.nn.Parameter(torch.zeros(2))
    with optimizer_of(kind, peers[0], run_id, param) as optimizer:
        micro_batch(optimizer, param, GRADIENT)
        assert optimizer.local_epoch == 1
        right = GRADIENT if kind == "ours" else torch.zeros(2)
        torch.testing.assert_close(momentum(optimizer, param), right)
        if kind == "ours":
            assert optimizer.last_round.reason and optimizer.last_round.expected == 2


@BOTH
def test_a_lone_peer_steps_with_all_its_micro_batches(
    peers: list[Peer], run_id: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock hivemind, which loads the accumulated gradient only while it looks for others, takes the last one alone."""
    complete = property(lambda tracker: tracker.local_progress.samples_accumulated >= 24)
    monkeypatch.setattr(ProgressTracker, "ready_to_update_epoch", complete)
    monkeypatch.setattr(ProgressTracker, "estimated_next_update_time", property(lambda tracker: get_dht_time() + 60))
    param = torch.nn.Parameter(torch.zeros(2))
    with optimizer_of(kind, peers[0], run_id, param) as optimizer:
        for factor in (0.0, 0.1, 0.8):
            micro_batch(optimizer, param, factor * GRADIENT)
        assert optimizer.local_epoch == 1
        right = 0.3 * GRADIENT if kind == "ours" else 0.8 * GRADIENT
        torch.testing.assert_close(momentum(optimizer, param), right)


@BOTH
def test_the_bandwidth_reaches_the_averager_of_gradients(peers: list[Peer], run_id: str, kind: str) -> None:
    """Stock hivemind gives `averager_opts` to the averager of parameters alone. It also offers everybody's gradients
    to newcomers, who have no use for them."""
    param = torch.nn.Parameter(torch.zeros(2))
    with optimizer_of(kind, peers[0], run_id, param, bandwidth=5.0) as optimizer:
        assert optimizer.state_averager.bandwidth == 5.0
        assert optimizer.grad_averager.bandwidth == (5.0 if kind == "ours" else None)
        assert optimizer.grad_averager.allow_state_sharing is (kind == "stock")


@BOTH
def test_a_peer_that_accepts_no_connections_makes_a_step(
    peers: list[Peer], run_id: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock hivemind takes the mode of the DHT only if it is told another one (optim/optimizer.py:203)."""
    for tracker in (ProgressTracker, Tracker):
        monkeypatch.setattr(tracker, "ready_to_update_epoch", True)
    param = torch.nn.Parameter(torch.zeros(2))
    with optimizer_of(kind, peers[3], run_id, param) as optimizer:
        refused = pytest.raises(ValueError, match="client mode") if kind == "stock" else contextlib.nullcontext()
        with refused:
            micro_batch(optimizer, param, GRADIENT)
        assert optimizer.local_epoch == 1


@BOTH
def test_live_tensors_stay_where_they_are_when_a_newcomer_downloads_them(
    peers: list[Peer], run_id: str, kind: str
) -> None:
    """Stock hivemind hands live CPU tensors to another process, which moves their memory into shared memory under a
    running step: NaN or garbage in 14 of 100 tries."""
    donated, received = (torch.nn.Parameter(torch.full((2,), value)) for value in (5.0, 0.0))
    with (
        optimizer_of(kind, peers[0], run_id, donated) as donor,
        optimizer_of(kind, peers[1], run_id, received) as newcomer,
    ):
        live = {"parameter": donated, **donor.opt.state[donated]}
        before = {name: tensor.data_ptr() for name, tensor in live.items()}

        def downloaded() -> bool:
            answer = newcomer.state_averager.load_state_from_peers(timeout=SECONDS)
            there = torch.equal(received, donated)
            assert answer is (there if kind == "ours" else None), "upstream does not tell"
            return there

        wait_until(downloaded, SECONDS, lambda: "no state came")
        moved = {name for name, tensor in live.items() if tensor.data_ptr() != before[name]}
        assert moved == (live.keys() if kind == "stock" else set())


@BOTH
def test_a_newcomer_gets_the_state_of_one_moment(peers: list[Peer], run_id: str, kind: str) -> None:
    """Stock hivemind sends the live tensors of a CPU peer: those that are sent after its next step come from there."""
    param = torch.nn.Parameter(torch.zeros(2))
    with optimizer_of(kind, peers[0], run_id, param) as donor:
        _, tensors, _ = donor.state_averager.get_current_state()
        with torch.no_grad():
            param.fill_(5.0)
        assert torch.equal(tensors[0], param) is (kind == "stock")


@BOTH
def test_a_checkpoint_brings_its_global_step_along(peers: list[Peer], run_id: str, kind: str) -> None:
    """Stock hivemind goes on reporting global step 0, and its schedule starts anew."""
    param = torch.nn.Parameter(torch.zeros(2))
    with optimizer_of(kind, peers[0], run_id, param) as optimizer:
        state = optimizer.state_dict()
        state["state"]["local_epoch"] = 7
        optimizer.load_state_dict(state)
        assert optimizer.local_epoch == 7
        assert optimizer.tracker.local_progress.epoch == (7 if kind == "ours" else 0)
        if kind == "ours":
            assert optimizer.state_averager.scheduler.last_epoch == 7


# ---- the tracker of progress -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ProgressTracker, Tracker])
def test_progress_is_not_stored_after_every_micro_batch(
    peers: list[Peer], run_id: str, cls: type[ProgressTracker], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each store costs the DHT's process more than a small micro-batch costs the trainer. A new global step is told at
    once."""
    monkeypatch.setattr(collab.optimizer, "PROGRESS_SECONDS", 3600.0)
    stored: list[int] = []
    store = peers[0].dht.store

    def counted(*args: Any, **kwargs: Any) -> Any:
        stored.append(kwargs["value"]["samples_accumulated"])
        return store(*args, **kwargs)

    monkeypatch.setattr(peers[0].dht, "store", counted)
    options: dict[str, Any] = {"private_key": peers[0].private_key, "client_mode": False, "metadata_expiration": 600.0}
    tracker = cls(peers[0].dht, run_id, 1000, start=True, **options)
    try:
        taken_up = lambda: not tracker.should_report_progress.is_set()  # noqa: E731
        for samples in range(8, 88, 8):
            tracker.report_local_progress(0, samples)
            wait_until(taken_up, SECONDS, lambda: "the tracker hangs")
        with tracker.pause_updates():
            tracker.update_epoch(1)
        wait_until(lambda: stored[-1:] == [0], SECONDS, lambda: f"{stored}")
        assert len(stored) >= 10 if cls is ProgressTracker else len(stored) <= 3, stored
    finally:
        monkeypatch.setattr(peers[0].dht, "store", store)
        tracker.shutdown(5.0)
