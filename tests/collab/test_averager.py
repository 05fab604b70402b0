"""What goes into an average: nothing that is not finite, nobody more than allowed, and never 0 / 0."""

import asyncio
import math
import multiprocessing
import threading
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.averaging.partition import TensorPartReducer
from hivemind.optim.grad_averager import GradientAverager
from hivemind.optim.state_averager import TrainingStateAverager
from torch.optim.lr_scheduler import LambdaLR

from collab.agreement import SKETCH_SIZE
from collab.averager import SNAPSHOT_STEPS, Averager, Reducer, StateAverager
from collab.optimizer import StepGuard

HONEST = torch.tensor([1.0, 2.0, 3.0])


def average(kind: type[TensorPartReducer], parts: list[tuple[torch.Tensor, float]]) -> tuple[torch.Tensor, Any]:
    """What all senders of one part get back, and the reducer that made it; ours lets nobody count for more than 100."""

    async def run() -> tuple[torch.Tensor, Any]:
        limit = (100.0,) if kind is Reducer else ()
        reducer = kind([HONEST.shape], len(parts), *limit)
        tasks = [reducer.accumulate_part(sender, 0, part, weight) for sender, (part, weight) in enumerate(parts)]
        return (await asyncio.gather(*tasks))[0], reducer

    return asyncio.run(run())


BAD_PARTS = [
    pytest.param(torch.tensor([math.nan, 2.0, 3.0]), 10.0, id="NaN"),
    pytest.param(torch.tensor([1.0, math.inf, 3.0]), 10.0, id="infinite"),
    pytest.param(HONEST * 5, math.nan, id="NaN weight"),
    pytest.param(HONEST * 5, -9.0, id="negative weight"),
    pytest.param(HONEST * 5, math.inf, id="infinite weight"),
]


@pytest.mark.parametrize("part, weight", BAD_PARTS)
def test_a_bad_part_is_left_out_and_its_sender_named(part: torch.Tensor, weight: float) -> None:
    result, reducer = average(Reducer, [(HONEST, 10.0), (part, weight)])
    torch.testing.assert_close(result, HONEST)
    assert reducer.rejected_senders == {1}
    assert reducer.first_part_weight == 10.0


@pytest.mark.parametrize("part, weight", BAD_PARTS)
def test_stock_hivemind_takes_it_in(part: torch.Tensor, weight: float) -> None:
    """When this fails, upstream has mended it and `Reducer` can go."""
    result, _ = average(TensorPartReducer, [(HONEST, 10.0), (part, weight)])
    assert not torch.allclose(result, HONEST)


def test_nobody_counts_for_more_than_allowed() -> None:
    parts = [(HONEST, 100.0), (-HONEST, 1e6)]
    torch.testing.assert_close(average(Reducer, parts)[0], torch.zeros(3))  # 100 against 100
    assert torch.allclose(average(TensorPartReducer, parts)[0], -HONEST, rtol=1e-3)


def test_weights_of_zero_make_zero_and_not_nan() -> None:
    parts = [(HONEST, 0.0), (HONEST, 0.0)]
    assert average(Reducer, parts)[0].tolist() == [0.0, 0.0, 0.0]
    assert average(TensorPartReducer, parts)[0].isnan().all()


def test_honest_parts_are_averaged_by_their_samples() -> None:
    result, reducer = average(Reducer, [(HONEST, 30.0), (HONEST * 5, 10.0)])
    torch.testing.assert_close(result, HONEST * 2)
    assert reducer.rejected_senders == set() and reducer.first_part_weight == 40.0


@pytest.mark.parametrize("sizes", [[16], [16, 16, 16], [16, 4], [3, 40, 1]], ids=str)
def test_the_mean_over_uneven_micro_batches_is_that_over_samples(sizes: list[int]) -> None:
    """Upstream divides by the number of micro-batches times the size of the first one: right only if all have it."""
    gradients = [torch.tensor([1.0, 10.0]) * (turn + 1) for turn in range(len(sizes))]
    weighted = torch.stack([size * gradient for size, gradient in zip(sizes, gradients, strict=True)])
    right = weighted.sum(0) / sum(sizes)

    def mean_of(averager: GradientAverager) -> torch.Tensor:
        for size, gradient in zip(sizes, gradients, strict=True):
            averager.parameters[0].grad = gradient.clone()
            averager.accumulate_grads_(size)
        averager.load_accumulators_into_averager_()
        with averager.get_tensors() as [tensor]:
            return tensor.clone()

    options: dict[str, Any] = dict(dht=None, prefix="test", client_mode=False, start=False)
    params = [torch.nn.Parameter(torch.zeros(2))]
    torch.testing.assert_close(mean_of(Averager(params, progress_key="test", lag=0, **options)), right)
    stock = mean_of(GradientAverager(params, **options))
    assert torch.allclose(stock, right) == (len(set(sizes)) == 1), "upstream has mended it"


def test_micro_batches_can_count_by_something_else_than_samples() -> None:
    """Batches of short texts have more samples, whose few tokens would count for more than those of long texts."""
    averager = Averager(
        [torch.nn.Parameter(torch.zeros(1))], progress_key="test", lag=0, dht=None, prefix="test", client_mode=False,
        start=False,
    )  # fmt: skip
    for _round in range(2):  # nothing is left of the first one
        for samples, weight, gradient in [(40, 20.0, 1.0), (10, 40.0, 4.0)]:
            averager.parameters[0].grad = torch.tensor([gradient])
            averager.weight = weight
            averager.accumulate_grads_(samples)
        assert averager.local_samples_accumulated == 50, "the swarm counts samples"
        averager.load_accumulators_into_averager_()
        with averager.get_tensors() as [tensor]:
            assert tensor.item() == pytest.approx((20 * 1 + 40 * 4) / 60)
        averager.reset_accumulated_grads_()


def guarded() -> tuple[StepGuard, torch.nn.Parameter, torch.optim.Optimizer]:
    param = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    optimizer = torch.optim.AdamW([param], lr=0.1, weight_decay=0.1)
    guard = StepGuard(max_grad_norm=1.0)
    guard.attach(optimizer)
    param.grad = torch.tensor([1.0, 1.0])
    optimizer.step()  # momentum, which could move the weights later on
    return guard, param, optimizer


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(bad: float) -> None:
    guard, param, optimizer = guarded()
    before = param.detach().clone()
    param.grad = torch.tensor([bad, 1.0])
    gradient = param.grad
    optimizer.step()
    assert torch.equal(param, before) and guard.held == 1
    assert param.grad is gradient  # hivemind checks that gradients stay the same tensors
    param.grad = torch.tensor([1.0, 1.0])
    optimizer.step()
    assert not torch.equal(param, before) and param.isfinite().all() and guard.held == 1


def test_a_step_can_be_held_back_once() -> None:
    guard, param, optimizer = guarded()
    before = param.detach().clone()
    guard.hold_next = True
    optimizer.step()
    assert torch.equal(param, before)
    optimizer.step()
    assert not torch.equal(param, before)


# ---- handing out states ------------------------------------------------------------------------------------------


@pytest.fixture
def donor(monkeypatch: pytest.MonkeyPatch) -> StateAverager:
    """A state averager without its processes, whose host hands out another state at each call."""
    averager = StateAverager.__new__(StateAverager)
    averager._empty = multiprocessing.RawValue("b", False)
    averager._state_sharing_priority = multiprocessing.Value("d", 7.0)
    averager._parent_pid = 0

    async def fetch(self: StateAverager) -> Any:
        await asyncio.sleep(0)
        return (b"", [], []) if self._empty.value else (b"epoch", [torch.zeros(2)], ["info"])

    monkeypatch.setattr(TrainingStateAverager, "_get_current_state_from_host_process", fetch)
    return averager


def test_a_state_has_the_number_of_the_step_in_it(donor: StateAverager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream counts a global step when its round begins: a newcomer would lack that update for good."""
    monkeypatch.setattr(StateAverager, "get_group_bits", lambda self: "")
    param = torch.nn.Parameter(torch.zeros(2))
    inner = torch.optim.SGD([param], lr=1.0)
    donor.__dict__.update(
        optimizer=inner, scheduler=LambdaLR(inner, lambda step: 1.0), extra_tensors=(), parameter_names=("param",),
        lock_optimizer=threading.Lock(), lock_averaged_tensors=threading.Lock(), local_epoch=0,
    )  # fmt: skip
    for step in (1, 2):
        donor.local_epoch = step  # the round has begun
        assert donor.get_current_state()[0]["epoch"] == step - 1
        param.grad = torch.ones(2)
        inner.step()
        TrainingStateAverager._update_scheduler(donor)
        metadata, [tensor, *_], _ = donor.get_current_state()
        assert metadata["epoch"] == step and torch.equal(tensor, torch.full((2,), -float(step)))


def test_newcomers_at_the_same_time_get_one_copy_and_later_ones_another(donor: StateAverager) -> None:
    async def run() -> None:
        states = await asyncio.gather(*(donor._get_current_state_from_host_process() for _ in range(3)))
        assert states[0][0] == b"epoch" and states[0][2] == ["info"] and not donor._empty.value
        states.append(await donor._get_current_state_from_host_process())
        assert len({id(tensors) for _, tensors, _ in states}) == 1
        old = weakref.ref(states[0][1])
        states.clear()
        await asyncio.sleep(0)  # `gather` has a reference until then
        assert old() is None, "nobody reads it any more"
        assert len((await donor._get_current_state_from_host_process())[1]) == 1

    asyncio.run(run())


def test_nobody_gets_a_state_that_is_much_older_than_the_model(donor: StateAverager) -> None:
    async def answers() -> int:
        return len([message async for message in donor.rpc_download_state(None, None)])

    async def run() -> None:
        donor._allow_state_sharing = multiprocessing.Value("b", True)
        _, read_slowly, _ = await donor._get_current_state_from_host_process()
        donor._state_sharing_priority.value = 7.0 + SNAPSHOT_STEPS + 1
        assert await answers() == 0, "there would be two copies"
        assert len(read_slowly) == 1

    asyncio.run(run())


def test_a_state_of_another_shape_or_with_values_that_are_not_finite_is_taken_over_from_nobody(
    donor: StateAverager,
) -> None:
    donor._averaged_tensors = [torch.zeros(2, 3)]
    moment = torch.ones(7)  # beyond the parameters, the optimizer knows the shapes
    assert donor._sound(torch.ones(2, 3), 0).sum() == 6 and donor._sound(moment, 1) is moment
    with pytest.raises(ValueError, match="another model"):
        donor._sound(torch.ones(1), 0)  # would be stretched
    for value in (float("nan"), float("inf")):
        for index, shape in ((0, (2, 3)), (1, (7,))):
            with pytest.raises(ValueError, match="NaN or infinite"):
                donor._sound(torch.full(shape, value), index)


@pytest.mark.parametrize(("cls", "waits"), [(TrainingStateAverager, True), (StateAverager, False)])
@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_step_of_this_peer_alone_does_not_wait_for_the_averaging_in_the_background(cls: Any, waits: bool) -> None:
    """With local updates the stock one waits: a condition is the wrong way round. Nor does its schedule go on."""
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    inner = torch.optim.SGD([weight], lr=1.0)
    waited: list[float] = []

    class Averaging(Future):
        def result(self, timeout: float | None = None) -> None:
            waited.append(timeout or 0.0)
            raise TimeoutError

    averager = cls.__new__(cls)
    averager.__dict__.update(
        delta_rule_averaging=True, offload_optimizer=False, reuse_tensors=False, custom_gradients=False,
        pending_updates={Averaging()}, finished_averaging_round=threading.Event(), status_loglevel=0,
        finished_optimizer_step=threading.Event(), lock_optimizer=threading.Lock(), _allreduce_timeout=9.0,
        step_executor=ThreadPoolExecutor(2), optimizer=inner, scheduler=LambdaLR(inner, lambda done: 1 / (1 + done)),
        local_epoch=3, _parent_pid=0,
    )  # fmt: skip
    averager.step(optimizer_step=True)
    assert waited == ([9.0] if waits else [])
    assert weight.item() == (0.0 if waits else 0.75), "at the rate of the fourth step, a quarter"
    averager.step_executor.shutdown()


@pytest.mark.parametrize(("known", "asked"), [(0, 0), (1, 0), (7, 6)])
def test_with_steps_in_flight_a_state_may_lie_that_far_behind_but_not_before_the_first_step(
    donor: StateAverager, monkeypatch: pytest.MonkeyPatch, known: int, asked: int
) -> None:
    """Others read the global step meanwhile: the length of texts follows it."""
    seen: list[int] = []
    monkeypatch.setattr(
        TrainingStateAverager, "load_state_from_peers", lambda self, **kwargs: seen.append(self.local_epoch)
    )
    donor.__dict__.update(local_epoch=known, steps_in_flight=1, _outer_pipe=SimpleNamespace(send=lambda call: None))
    assert not donor.load_state_from_peers()
    assert seen == [asked] and donor.local_epoch == known


# ---- parts of a swarm that meet again


class Judge(Averager):
    """What an averager knows of its rounds, without a process."""

    peer_id = "a"

    def __init__(self) -> None:
        pass

    def __del__(self) -> None:
        pass

    def meet(self, number: int, told: dict[str, Any], fails: bool = False) -> set[str]:
        """Go through a round; gives the strays."""
        found = self._strays(number, told)
        if not fails:
            self._remember(number, told)
        return found


OURS, THEIRS = [1.0] * SKETCH_SIZE, [1.1] * SKETCH_SIZE


def test_of_two_parts_that_meet_again_one_keeps_its_model_and_all_peers_agree_which() -> None:
    for who in ("ab", "cd"):
        averager = Judge()
        assert averager.meet(7, dict.fromkeys(who, OURS)) == set()
        assert averager.meet(8, {"a": OURS, "b": OURS, "c": THEIRS, "d": THEIRS}) == {"c", "d"}
    assert averager.meet(9, {"a": OURS, "b": OURS, "c": THEIRS}) == set(), "it was with all of them before"


def test_who_was_alone_for_some_rounds_is_compared_when_it_is_back() -> None:
    averager = Judge()
    averager.meet(7, dict.fromkeys("abc", OURS))
    assert averager.meet(10, {"a": THEIRS, "b": OURS, "c": OURS}) == {"a"}


def test_who_could_not_be_compared_yet_is_compared_in_the_next_round() -> None:
    """Seen when two halves met in pieces: three peers had one model already, the fourth one trained on with its own."""
    averager = Judge()
    averager.meet(7, dict.fromkeys("ab", OURS))
    assert averager.meet(8, {"a": OURS, "b": None, "c": None, "d": None}) == set()
    assert averager.meet(9, {"a": OURS, "b": THEIRS, "c": THEIRS, "d": THEIRS}) == {"a"}
    newcomer = Judge()
    assert newcomer.meet(8, {"a": None, "b": OURS, "c": OURS}) == set()
    assert newcomer.meet(9, {"a": THEIRS, "b": OURS, "c": OURS}) == set(), "its state was the others', a step ago"


def test_a_round_that_is_tried_again_is_no_meeting() -> None:
    averager = Judge()
    averager.meet(7, dict.fromkeys("abc", OURS))
    assert averager.meet(7, {"a": THEIRS, "b": OURS}) == set()


def test_who_meets_others_in_a_round_that_fails_is_compared_when_it_is_tried_again() -> None:
    averager = Judge()
    averager.meet(7, dict.fromkeys("ab", OURS))
    told = {"a": THEIRS, "b": OURS, "c": OURS}
    assert averager.meet(8, told, fails=True) == averager.meet(8, told) == {"a"}


@pytest.mark.parametrize("said", [None, "text", [1.1] * (SKETCH_SIZE - 1), [math.nan] * SKETCH_SIZE, ["1"] * 16, 7])
def test_who_has_just_taken_over_a_state_or_talks_nonsense_is_no_stray_and_has_no_vote(said: object) -> None:
    assert Judge().meet(8, {"a": said, "b": OURS, "c": said, "d": said}) == set()
