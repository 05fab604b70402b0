"""How much memory a peer's processes take, and giving back what they need no more."""

import ctypes
import sys
from pathlib import Path

import psutil
import torch


def memory_in_use(pid: int | None = None) -> int:
    """Bytes of RAM that a process and everything it has started take now.

    On Linux memory that several processes share counts once (PSS); elsewhere what each has for itself (USS), so that
    the tensors which averagers share are missing. A trainer's 2 GB take 10 ms to count: once in a global step is fine.

    :param pid: of this process if it is not given.
    """
    me = psutil.Process(pid)
    return sum(map(_bytes_of, (me, *me.children(recursive=True))))


def _bytes_of(process: psutil.Process) -> int:
    try:
        if sys.platform != "linux":
            return int(process.memory_full_info().uss)
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    except (psutil.Error, OSError, StopIteration):  # it has just ended
        return 0


def peak_on_device(device: torch.device) -> int:
    """The most bytes that tensors of this process took on a GPU at one moment; 0 on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def give_back_freed_memory() -> None:
    """Return what was freed to the system.

    glibc keeps it for later, as much as several copies of the model after large tensors came and went; and what a
    process keeps so is copied for each child that it forks, as soon as it uses it again. Some milliseconds; elsewhere
    nothing happens.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
