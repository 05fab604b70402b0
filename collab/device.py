"""The device that a peer computes on, and the precision that suits it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from collab.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_devices(names: str) -> list[torch.device]:
    """The devices of a peer, the main one first.

    `auto` is every GPU that is of the same kind as the first one (a weaker one would hold up the others), else the CPU.
    Otherwise names as torch has them, with commas between them. :raises UserError: one of them is not there.
    """
    if names == "auto":
        if torch.cuda.is_available():
            gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
            return [gpu for gpu in gpus if torch.cuda.get_device_name(gpu) == torch.cuda.get_device_name(gpus[0])]
        names = "mps" if torch.backends.mps.is_available() else "cpu"
    return [_device(name.strip()) for name in names.split(",")]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"The device {name!r} cannot be used: {reason}. Leave --device out, or give cpu; for a GPU, install "
            f"its driver and the build of torch for it."
        ) from error
    return device


def in_words(devices: Sequence[torch.device]) -> str:
    """What a peer computes on, in public: "cuda 2 x NVIDIA RTX 3060" or "cpu, 2 threads"; 60 characters at most.

    The processor of a computer without a GPU is nobody's business.
    """
    kind = devices[0].type
    if kind == "cuda":
        number = f"{len(devices)} x " if len(devices) > 1 else ""
        return f"cuda {number}{torch.cuda.get_device_name(devices[0])}"[:60]
    return f"cpu, {torch.get_num_threads()} threads" if kind == "cpu" else kind


def pick_precision(wanted: str, device: torch.device, allowed: Sequence[str] = tuple(PRECISIONS)) -> torch.dtype:
    """The dtype of the forward and backward pass; weights, gradients and averaging stay in float32.

    `auto`: bfloat16 on GPUs that compute in it, float16 on older ones (with scaled losses), float32 on CPUs, where
    `collab.step` then measures what is faster; if the run does not allow that one, the best that it does.

    :param allowed: what the run's organizer admits.
    :raises UserError: `wanted` is not among them.
    """
    if wanted != "auto":
        if wanted not in allowed:
            raise UserError(
                f"This run is not computed in {wanted}. Leave --precision out, or give {' or '.join(allowed)}."
            )
        return PRECISIONS[wanted]
    best = ["float32", "bfloat16", "float16"]
    if device.type == "cuda":
        # Emulated bfloat16 (before Ampere) is slower than float32.
        modern = torch.cuda.get_device_capability(device) >= (8, 0)
        best = ["bfloat16", "float16", "float32"] if modern else ["float16", "float32", "bfloat16"]
    return PRECISIONS[next(name for name in best if name in allowed)]


@contextmanager
def half_of_the_threads() -> Iterator[None]:
    """Leave the other half of torch's threads to what goes on beside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
