"""The micro-batch: what is found on made-up devices, that looking for it leaves no trace, and memory that runs out."""

from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch

from collab.errors import UserError
from collab.tuning import (
    CALL_SECONDS,
    MicroBatch,
    find_micro_batch_size,
    size_of,
    split,
    tune_micro_batch,
    unless_out_of_memory,
)

Curve = Callable[[int], float | None]


def curve(overhead: float, per_sample: float, memory: int = 10**9) -> Curve:
    """Seconds of a call: something for the call, something for each sample, and an end of the memory."""
    return lambda size: None if size > memory else overhead + per_sample * size


class Device:
    """Notes which sizes it was asked for, and how long all of it took."""

    def __init__(self, seconds: Curve, first_call: float = 0.0) -> None:
        self.curve, self.first_call = seconds, first_call
        self.sizes: list[int] = []
        self.spent = 0.0

    def __call__(self, size: int) -> float | None:
        self.sizes.append(size)
        seconds = self.curve(size)
        if seconds is not None and len(self.sizes) == 1:
            seconds += self.first_call
        self.spent += seconds or 0.0
        return seconds


CASES = [
    # A GPU that is never full: up to the advised time of a call, which the next doubling would exceed.
    pytest.param(curve(0.1, 0.001), dict(largest=10**6), 512, id="time"),
    pytest.param(curve(0.1, 0.001, memory=100), dict(largest=10**6), 64, id="memory"),
    pytest.param(curve(0.1, 0.001), dict(largest=50), 32, id="target batch"),
    pytest.param(curve(0.1, 0.001), dict(largest=10**6, longest=0.6), 256, id="a short matchmaking time"),
    # 16 samples make 16/17 of its peak: all the sizes that follow together gain less than 5 % until 64.
    pytest.param(curve(0.01, 0.01), dict(largest=10**6), 16, id="plateau"),
    pytest.param(curve(0.0, 0.2), dict(largest=10**6), 1, id="plateau from the start"),
    pytest.param(curve(0.0, 0.03), dict(largest=10**6), 4, id="plateau of short calls"),
    pytest.param(lambda size: 0.01 * size**2, dict(largest=10**6), 1, id="slower and slower"),
    pytest.param(curve(0.0, 4.0), dict(largest=10**6), 1, id="a single sample takes too long already"),
    pytest.param(curve(0.0, 400.0), dict(largest=10**6), 1, id="a single sample takes minutes"),
    pytest.param(curve(0.5, 0.001), dict(largest=1), 1, id="a target batch of a few samples"),
]


@pytest.mark.parametrize(("seconds", "limits", "size"), CASES)
def test_the_first_limit_decides(seconds: Curve, limits: dict[str, Any], size: int) -> None:
    device = Device(seconds)
    found, found_seconds = find_micro_batch_size(device, **limits)
    assert found == size and found_seconds == pytest.approx(seconds(size))


def test_libraries_that_load_in_the_first_call_do_not_make_the_device_look_slow() -> None:
    for warm_up in (0.5, 3.0):
        assert find_micro_batch_size(Device(curve(0.01, 0.01), first_call=warm_up), largest=512)[0] == 16


def test_a_while_in_which_the_computer_is_busy_does_not_decide() -> None:
    smooth, calls = curve(0.2, 0.001), []

    def disturbed(size: int) -> float | None:
        calls.append(size)
        return 0.9 if size >= 4 and len(calls) < 6 else smooth(size)

    assert find_micro_batch_size(disturbed, largest=64)[0] == 64


def test_short_calls_that_fit_between_those_of_others_do_not_win() -> None:
    """Another program has the core for 100 ms out of every 200: only calls shorter than that can be lucky."""
    clock = 0.0

    def busy_computer(size: int) -> float:
        nonlocal clock
        began, work = clock, 0.004 + 0.006 * size
        while work > 0:
            until = 0.2 * (clock // 0.2) + 0.1
            if clock >= until:  # the other one's turn
                clock = until + 0.1 + 1e-9
                continue
            step = min(work, until - clock)
            clock, work = clock + step, work - step
        return clock - began

    assert find_micro_batch_size(busy_computer, largest=64)[0] >= 8


def test_a_size_that_the_device_does_not_like_is_passed_over() -> None:
    def seconds(size: int) -> float:
        return 0.2 + 0.001 * size + 0.3 * (size == 8)

    assert find_micro_batch_size(seconds, largest=64)[0] == 64


def test_it_takes_seconds_only() -> None:
    for seconds in (curve(0.5, 0.001), curve(0.0, 0.3), curve(0.9, 1e-6), curve(4.5, 0.0)):
        device = Device(seconds)
        find_micro_batch_size(device, largest=10**9)
        assert device.spent < 12.0
    slow = Device(curve(0.0, 400.0))
    find_micro_batch_size(slow, largest=10**9)
    assert slow.sizes == [1], "a second call would tell nothing new"


def test_memory_of_a_cpu_is_not_tried_out() -> None:
    """There it ends the program."""
    device = Device(curve(0.1, 0.001))
    assert find_micro_batch_size(device, largest=512, has_room=lambda: max(device.sizes) < 8)[0] == 8
    assert max(device.sizes) == 8


def test_a_device_that_is_too_small_for_one_sample_is_said_to_be() -> None:
    with pytest.raises(UserError, match="too small for the run's model"):
        find_micro_batch_size(curve(0.1, 0.1, memory=0), largest=512)


# ---- on a model --------------------------------------------------------------------------------------------------


def model_with_memory() -> torch.nn.Module:
    """Dropout draws random numbers, and batch norm remembers what it has seen."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))


def test_the_search_leaves_no_trace() -> None:
    model = model_with_memory()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    trial = {"inputs": torch.randn(3, 4), "weights": torch.rand(3)}
    expected = {name: tensor.clone() for name, tensor in trial.items()}
    random_state = torch.get_rng_state()
    sizes = []

    def call(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(size_of(batch))
        assert len(batch["weights"]) == sizes[-1]
        if sizes[-1] == 1:  # batch norm needs two
            batch = {name: tensor.repeat_interleave(2, 0) for name, tensor in batch.items()}
        loss = (model(batch["inputs"]).sum(1) * batch["weights"]).mean()
        loss.backward()
        return loss.detach()

    tuned = tune_micro_batch(call, model, trial, target_batch_size=128, matchmaking_time=15.0)
    assert tuned.size in (1, 2, 4, 8, 16) and max(sizes) <= 16, "an eighth of the target batch at most"
    assert f"Micro-batch of {tuned.size} samples" in tuned.as_line()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters()) and model.training
    assert all(torch.equal(tensor, expected[name]) for name, tensor in trial.items())


@pytest.mark.parametrize(
    ("matchmaking_time", "longest"), [(15.0, CALL_SECONDS), (1.0, 0.5)], ids=["hivemind's advice", "half of the wait"]
)
def test_how_long_a_call_may_take(monkeypatch: pytest.MonkeyPatch, matchmaking_time: float, longest: float) -> None:
    asked: dict[str, Any] = {}

    def find(try_batch: Any, **limits: Any) -> tuple[int, float]:
        asked.update(limits)
        return 1, 1.0

    monkeypatch.setattr("collab.tuning.find_micro_batch_size", find)
    tune_micro_batch(
        lambda batch: batch["x"], torch.nn.Linear(1, 1), {"x": torch.zeros(1)},
        target_batch_size=4096, matchmaking_time=matchmaking_time,
    )  # fmt: skip
    assert asked["longest"] == longest and asked["largest"] == 512 and asked["has_room"]()


# ---- memory that runs out later on -------------------------------------------------------------------------------


def test_samples_that_did_not_fit_come_again_in_smaller_batches() -> None:
    """The loop of run_trainer.py in small: a longer text than those of the trial needs more memory."""

    def call(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        if size_of(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return batch["x"]

    micro_batch = MicroBatch(12)
    seen: list[int] = []

    def stream() -> Any:
        first = 0
        while True:
            yield {"x": torch.arange(first, first := first + micro_batch())}

    batches: Any = stream()
    while len(seen) < 24:
        batch = next(batches)
        result = unless_out_of_memory(call, batch)
        if result is None:
            micro_batch.halve()
            batches = chain(split(batch, micro_batch), batches)
        else:
            seen += result.tolist()
    assert seen == list(range(24)) and micro_batch.size == 3


def test_memory_that_is_too_small_for_one_sample_ends_the_program_with_a_reason() -> None:
    micro_batch = MicroBatch(3)
    micro_batch.halve()
    with pytest.raises(UserError, match="--offload_optimizer"):
        micro_batch.halve()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("any text"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["CUDA", "MPS", "CPU"],
)
def test_memory_runs_out_in_the_words_of_each_device(error: RuntimeError) -> None:
    def call(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise error

    assert unless_out_of_memory(call, {"x": torch.zeros(1)}) is None


def test_other_errors_are_not_taken_for_it() -> None:
    def call(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        unless_out_of_memory(call, {"x": torch.zeros(1)})
