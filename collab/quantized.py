"""The two moments of an Adam-like optimizer in a byte each: block-wise 8-bit floating point, in plain torch.

Why it is as it is, each point measured on an ALBERT's gradients (docs/optimizers.md):

- *Floating point*, because second moments span many powers of two within a block: integers of one step size code the
  small ones as zero, and the update explodes. A code is the top bits of the float32 itself, counted from the exponent
  of its block, so that coding and decoding are a few additions and shifts of integers: no table, no logarithm.
- *Second moments* have 4 bits of mantissa and 16 powers of two below the block's largest value. What is smaller is
  rounded up to the smallest code: an update may become too small by it, never too large.
- *First moments* have a sign, 4 bits of mantissa and 8 powers of two, and below those equal steps of 1/4096 to 1/2048
  of the block's largest value. Zero is exactly zero.
- *Dither.* In one step a second moment decays by a thousandth, far less than half the distance of two codes: rounded to
  nearest it would never decay. So each value is rounded up as often, over the steps, as it should be: up if its
  remainder plus a number between 0 and 1 reaches 1. That number follows from the step and the place in the tensor
  alone, hence is the same on all peers and after a restart. It moves on by a fixed irrational share in each step (an
  additive recurrence), which makes half the error of random numbers: ups and downs alternate.
"""

from collections.abc import Mapping
from typing import Any

import torch

BLOCK = 128
"""Values that share an exponent: the width of ALBERT's embeddings, whose rows differ most."""
MANTISSA = 4
CUT = 23 - MANTISSA  # bits of float32 that are rounded away
NEAREST = 2 ** (CUT - 1)
SIGN = -(2**31)
DITHER_PERIOD = 2**16
# The two-dimensional golden ratio: shares of 1 that fill the square of (place, step) most evenly.
PER_PLACE, PER_STEP = (round(2**CUT * share) for share in (0.7548776662466927, 0.5698402909980532))


def dither(places: int, step: int, device: torch.device) -> torch.Tensor:
    """What is added to float32 values, seen as integers, before their last bits are cut off.

    :param places: how many values are coded at once, a multiple of `BLOCK`. A tensor's value at place i gets the number
      i modulo `DITHER_PERIOD`, however it is cut into pieces of whole periods.
    :param step: the number of the update.
    :returns: int32 of shape (2, places // BLOCK, BLOCK) for the first and the second moments.
    """
    place = torch.arange(places, device=device) % DITHER_PERIOD * PER_PLACE
    start = step * PER_STEP % 2**CUT
    both = torch.stack([place + start, place + start + 2 ** (CUT - 1)]) % 2**CUT
    return both.to(torch.int32).view(2, -1, BLOCK)


def empty_codes(values: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The state of a parameter with this many values: moments of zero. The last block may be partly empty."""

    def zeros(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(-(-values // BLOCK), width, dtype=dtype, device=device)

    return {
        "mean_codes": zeros(BLOCK, torch.int8),
        "mean_exponents": zeros(1, torch.uint8),
        "square_codes": zeros(BLOCK, torch.uint8),
        "square_exponents": zeros(1, torch.uint8),
    }


def encode(coded: Mapping[str, torch.Tensor], means: torch.Tensor, squares: torch.Tensor, numbers: Any) -> None:
    """Write moments into those blocks of `empty_codes`.

    :param means: float32 of shape (blocks, BLOCK), and so are `squares`; they are used up as scratch.
    :param numbers: a pair of what is added before rounding down, each a tensor of `dither`, or `NEAREST`.
    """
    _encode_means(means, numbers[0], coded["mean_codes"], coded["mean_exponents"])
    _encode_squares(squares, numbers[1], coded["square_codes"], coded["square_exponents"])


def decode(coded: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """First and second moments, float32 of shape (blocks, BLOCK). A second one is zero only if its whole block is."""
    return (
        _decode_means(coded["mean_codes"], coded["mean_exponents"]),
        _decode_squares(coded["square_codes"], coded["square_exponents"]),
    )


def _encode_means(values: torch.Tensor, number: Any, codes: torch.Tensor, exponents: torch.Tensor) -> None:
    # A code is the sign, and how many numbers of 4-bit mantissa lie between the offset, a power of two, and
    # offset + |value|: below the offset these are equally far from each other.
    torch.bitwise_and((values.view(torch.int32) >> 24).to(torch.int8), -128, out=codes)
    largest = values.abs_().amax(1, keepdim=True).mul_(1.07)  # with room for the offset and for rounding up
    lowest = (largest.view(torch.int32) >> 23).sub_(7).clamp_min_(1)
    bits = values.add_((lowest << 23).view(torch.float32)).view(torch.int32)
    bits.add_(number).bitwise_right_shift_(CUT).sub_(lowest << MANTISSA)
    codes.bitwise_or_(bits.to(torch.int8))
    exponents.copy_(lowest)


def _decode_means(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    lowest, signs = exponents.to(torch.int32), codes.to(torch.int32).bitwise_and_(SIGN)
    bits = (codes & 127).to(torch.int32).add_(lowest << MANTISSA).bitwise_left_shift_(CUT)
    bits.view(torch.float32).sub_((lowest << 23).view(torch.float32))
    return bits.bitwise_or_(signs).view(torch.float32)


def _encode_squares(values: torch.Tensor, number: Any, codes: torch.Tensor, exponents: torch.Tensor) -> None:
    bits = values.view(torch.int32).add_(number).bitwise_right_shift_(CUT)
    lowest = (bits.amax(1, keepdim=True) >> MANTISSA).sub_(15).clamp_min_(0)
    codes.copy_(bits.sub_(lowest << MANTISSA).clamp_min_(0))
    exponents.copy_(lowest)


def _decode_squares(codes: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    bits = codes.to(torch.int32).add_(exponents.to(torch.int32) << MANTISSA)
    return bits.bitwise_left_shift_(CUT).view(torch.float32)
