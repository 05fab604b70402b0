"""The device that a peer computes on, and the precision that suits it."""

from collections.abc import Sequence

import torch

from collab.errors import UserError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU, else the CPU; any other name is torch's. :raises UserError: it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
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


def pick_precision(wanted: str, device: torch.device, allowed: Sequence[str] = tuple(PRECISIONS)) -> torch.dtype:
    """The dtype of the forward and backward pass; weights, gradients and averaging stay in float32.

    `auto`: bfloat16 on GPUs that compute in it, float16 on older ones (with scaled losses), float32 on CPUs, where
    support for bfloat16 does not tell whether it is faster; if the run does not allow that one, the best that it does.

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
