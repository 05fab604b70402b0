"""How fast a peer is, and what its devices do with their time."""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from collab.tuning import Batch, no_trace, unless_out_of_memory

HALF_PRECISION_PEAKS = {
    "P100": 18.7, "V100-PCIE": 112, "V100": 125, "T4": 65, "A10": 125, "L4": 121, "A100": 312, "H100 PCIe": 756,
    "H100": 989, "H200": 989, "RTX 3090": 71, "RTX 4090": 165,
}  # fmt: skip
"""TFLOP/s by part of the device's name: NVIDIA's data sheets and white papers, float16 with sums in float32, dense."""


class Speed:
    """Counts what a peer did between two looks.

    :param flops_per_token: of both passes, `count_flops`; 0 if it is not known.
    :param peak: FLOP/s of all devices together, `peak_flops`; 0 if it is not known.
    """

    def __init__(self, flops_per_token: float = 0.0, peak: float = 0.0) -> None:
        self._flops_per_token, self._peak = flops_per_token, peak
        self._seconds: dict[str, float] = defaultdict(float)
        self._tokens, self._since = 0, time.monotonic()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The time in here is that of `name`: data, compute or averaging."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds[name] += time.monotonic() - began

    def add(self, tokens: int) -> None:
        """So many real tokens went into a gradient."""
        self._tokens += tokens

    def take(self) -> dict[str, Any]:
        """The fields of a `PeerRecord` that this is about, since the last call."""
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        shares = {part: min(1.0, self._seconds[part] / seconds) for part in ("data", "compute", "averaging")}
        tokens, rate = self._tokens, self._tokens / seconds
        self._seconds.clear()
        self._tokens, self._since = 0, now
        return {
            "tokens": tokens,
            "tokens_per_second": rate,
            "mfu": min(1.0, rate * self._flops_per_token / self._peak) if self._peak else 0.0,
            "data_wait": shares["data"],
            "compute_share": shares["compute"],
            "averaging_wait": shares["averaging"],
        }


def count_flops(call: Callable[[Batch], Any], model: torch.nn.Module, batch: Batch) -> int:
    """Floating point operations of the products in both passes over `batch`, by torch's own counter; 0 if memory does
    not suffice for it."""
    with no_trace(model), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        done = unless_out_of_memory(call, batch)  # the fused kernels of CPUs are not counted
    return int(counter.get_total_flops()) if done is not None else 0


def peak_flops(devices: Sequence[torch.device], precision: torch.dtype) -> float:
    """FLOP/s that these devices have in this precision, by their data sheets; 0 if one of them is not known."""
    if precision == torch.float32 or any(device.type != "cuda" for device in devices):
        return 0.0
    peaks = [_peak_of(torch.cuda.get_device_name(device)) for device in devices]
    return sum(peaks) if all(peaks) else 0.0


def _peak_of(name: str) -> float:
    found = [key for key in HALF_PRECISION_PEAKS if re.search(rf"\b{re.escape(key)}\b(?! Laptop)", name)]
    return HALF_PRECISION_PEAKS[max(found, key=len)] * 1e12 if found else 0.0
