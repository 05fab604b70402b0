"""Batches made ahead, and what is known about them."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tasks import Batch
from tasks.loader import AHEAD, Loader
from tests.swarm.processes import wait_until

SECONDS = 10


class Numbers:
    """Batches 0, 1, 2, ..., each when it is allowed."""

    def __init__(self, fails_at: int = -1, allowed: int = 10**6) -> None:
        self.made, self.fails_at = 0, fails_at
        self.allowed = threading.Semaphore(allowed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.allowed.acquire()
        if self.made == self.fails_at:
            raise ValueError("no more text")
        self.made += 1
        return {"number": torch.tensor([self.made - 1])}

    def state_dict(self) -> dict[str, Any]:
        return {"made": self.made}

    def close(self) -> None:
        self.allowed.release()


@pytest.fixture
def load() -> Iterator[Callable[..., Loader]]:
    loaders: list[Loader] = []

    def load(stream: Numbers, stop: object = False, pinned: bool = False) -> Loader:
        loaders.append(Loader(stream, stop, pinned))
        return loaders[-1]

    yield load
    for loader in loaders:
        loader.close()


def number(batch: Batch) -> int:
    return int(batch["number"])


def until(condition: Callable[[], bool]) -> None:
    wait_until(condition, SECONDS, lambda: "the loader's thread did not get there")


def test_batches_are_made_ahead_and_the_state_is_that_of_the_last_one_taken(load):
    stream = Numbers()
    loader = load(stream)
    assert loader.state_dict() == {"made": 0}
    until(lambda: stream.made == AHEAD + 1)
    assert [number(next(loader)) for _ in range(3)] == [0, 1, 2]
    assert loader.state_dict() == {"made": 3}
    until(lambda: stream.made == AHEAD + 4)


def test_what_was_put_back_comes_first(load):
    loader = load(Numbers())
    next(loader)
    loader.put_back([{"number": torch.tensor([100])}, {"number": torch.tensor([101])}])
    assert [number(next(loader)) for _ in range(3)] == [100, 101, 1]


def test_a_restart_gives_up_what_was_made_ahead_and_keeps_what_was_put_back(load):
    first, second = Numbers(), Numbers()
    loader = load(first)
    until(lambda: first.made == AHEAD + 1)
    next(loader)
    loader.put_back([{"number": torch.tensor([100])}])
    second.made = 50
    loader.restart(second)
    assert [number(next(loader)) for _ in range(3)] == [100, 50, 51]
    assert loader.state_dict() == {"made": 52}


def test_a_failure_is_raised_where_the_batch_is_asked_for_each_time(load):
    loader = load(Numbers(fails_at=2))
    assert [number(next(loader)) for _ in range(2)] == [0, 1]
    for _ in range(2):
        with pytest.raises(ValueError, match="no more text"):
            next(loader)


def test_a_closed_loader_makes_nothing_more(load):
    stream = Numbers()
    loader = load(stream)
    until(lambda: stream.made == AHEAD + 1)
    loader.close()
    until(lambda: not loader._thread.is_alive())
    assert stream.made == AHEAD + 1


def test_closing_ends_the_wait_for_a_batch(load):
    stream = Numbers(allowed=0)
    loader = load(stream)
    loader.close()
    until(lambda: not loader._thread.is_alive())


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_for_a_gpu_are_pinned_before_they_are_asked_for(load, monkeypatch, pinned):
    threads: list[str] = []

    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:  # needs a GPU
        threads.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    loader = load(Numbers(), pinned=pinned)
    assert [number(next(loader)) for _ in range(3)] == [0, 1, 2]
    assert set(threads) == ({"batches"} if pinned else set())


def test_being_told_to_stop_ends_the_wait_too(load):
    stop: list[bool] = []
    loader = load(Numbers(allowed=1), stop)
    next(loader)
    threading.Timer(0.2, stop.append, [True]).start()
    assert next(loader, None) is None
