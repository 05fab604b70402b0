"""Moments in 8 bits: how far decoded values are from true ones, in a step and over many."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collab.quantized import BLOCK, DITHER_PERIOD, NEAREST, decode, dither, empty_codes, encode

CPU = torch.device("cpu")


def round_trip(means: torch.Tensor, squares: torch.Tensor, numbers=(NEAREST, NEAREST)):
    coded = empty_codes(means.numel(), CPU)
    encode(coded, means.clone().view(-1, BLOCK), squares.clone().view(-1, BLOCK), numbers)
    return tuple(values.reshape(-1) for values in decode(coded))


def test_a_state_takes_two_bytes_a_value():
    coded = empty_codes(128_000, CPU)
    assert sum(tensor.nbytes for tensor in coded.values()) / 128_000 == pytest.approx(2 + 2 / BLOCK)
    assert all(bool((moment == 0).all()) for moment in decode(coded))


@settings(deadline=None)
@given(st.integers(-30, 30), st.integers(0, 10_000))
def test_values_near_the_largest_are_right_to_a_thirtysecond(scale: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(4 * BLOCK, generator=generator) * 15 / 16 + 1 / 16  # four powers of two
    values *= 2.0**scale
    signs = torch.rand(4 * BLOCK, generator=generator).sub(0.5).sign()
    means, squares = round_trip(values * signs, values)
    torch.testing.assert_close(means, values * signs, rtol=1 / 24, atol=0)  # their offset makes them a little coarser
    torch.testing.assert_close(squares, values, rtol=1 / 32, atol=0)


def test_zero_is_zero_among_large_first_moments_and_never_among_second_ones():
    """A weight without gradients must not move; a second moment of zero would divide by eps."""
    values = torch.zeros(BLOCK)
    values[7] = 3.0
    means, squares = round_trip(values, values)
    assert means.count_nonzero() == 1
    assert squares.min() == pytest.approx(2.0 * 2**-15), "the smallest code"


@pytest.mark.parametrize("factor", [1.0, 0.999, 0.9])
def test_no_update_explodes_however_far_apart_the_values_of_a_block_are(factor: float):
    values = 10.0 ** torch.linspace(-12, 0, 8 * BLOCK)[torch.randperm(8 * BLOCK, generator=torch.manual_seed(0))]
    for step in range(1, 50):
        means, squares = round_trip(values * factor, values**2, dither(8 * BLOCK, step, CPU))
        assert float((means / squares.sqrt()).max()) < 1.2 * factor


def test_extreme_values_stay_in_order():
    for largest in (1e-38, 1e-30, 1e30):
        values = largest * torch.linspace(0, 1, BLOCK)
        means, squares = round_trip(values, values)
        assert bool((means.diff() >= 0).all()) and bool((squares.diff() >= 0).all())
        assert means[-1] == pytest.approx(largest, rel=0.07) and squares[-1] == pytest.approx(largest, rel=0.07)


@pytest.mark.parametrize("numbers, decays", [("dither", True), ("nearest", False)])
def test_a_slow_decay_needs_the_dither(numbers: str, decays: bool):
    """beta2 = 0.999: a step changes a moment by a sixtieth of the distance of two codes."""
    squares = 0.5 + 0.5 * torch.rand(16 * BLOCK, generator=torch.manual_seed(0))
    means, now = torch.zeros_like(squares), squares.clone()
    for step in range(1, 1001):
        chosen = dither(len(now), step, CPU) if numbers == "dither" else (NEAREST, NEAREST)
        means, now = round_trip(means, now * 0.999, chosen)
    shrunk = (now / squares).log() / (1000 * torch.tensor(0.999).log())
    if decays:
        assert shrunk.mean() == pytest.approx(1.0, abs=0.06)
        assert float(shrunk.std()) < 0.06, "numbers drawn at random reach 0.2"
    else:
        assert float(shrunk.mean()) < 0.1


def test_rounding_is_right_on_average_over_the_steps():
    values = torch.rand(4 * BLOCK, generator=torch.manual_seed(0)) + 0.01
    sums = [torch.zeros_like(values), torch.zeros_like(values)]
    for step in range(1, 513):
        for total, moment in zip(sums, round_trip(values, values, dither(len(values), step, CPU)), strict=True):
            total += moment / 512
    for total in sums:
        torch.testing.assert_close(total, values, rtol=5e-4, atol=0)


def test_the_dither_is_the_same_wherever_a_tensor_is_cut():
    long = dither(3 * DITHER_PERIOD, step=77, device=CPU)
    short = dither(DITHER_PERIOD, step=77, device=CPU)
    assert torch.equal(long, short.repeat(1, 3, 1))
    assert not torch.equal(short, dither(DITHER_PERIOD, step=78, device=CPU))
