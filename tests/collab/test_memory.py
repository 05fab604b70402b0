"""The figure for memory counts what it should, once."""

import multiprocessing

import torch

from collab.memory import give_back_freed_memory, memory_in_use, peak_on_device

MEGABYTE = 10**6


def hold(tensor: torch.Tensor, ready, done) -> None:
    tensor.numpy().sum()  # its pages belong to this process as well now
    ready.set()
    done.wait(60)


def test_shared_memory_counts_once_and_that_of_children_as_well() -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    before = memory_in_use()
    tensor = torch.ones(25 * MEGABYTE).share_memory_()
    child = context.Process(target=hold, args=(tensor, ready, done))
    child.start()
    try:
        assert ready.wait(60)
        added = memory_in_use() - before
    finally:
        done.set()
        child.join()
    assert 90 * MEGABYTE < added < 180 * MEGABYTE, "100 MB, and a process"


def test_what_was_freed_goes_back_to_the_system() -> None:
    kept = []
    for _ in range(2000):  # 64 kB, in between of what stays
        kept += [torch.ones(16_000), torch.ones(1)]
    full = memory_in_use()
    del kept[::2]
    give_back_freed_memory()
    assert memory_in_use() < full - 90 * MEGABYTE


def test_a_cpu_has_no_memory_of_its_own() -> None:
    assert peak_on_device(torch.device("cpu")) == 0
