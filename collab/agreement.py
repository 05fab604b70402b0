"""Whether peers still have the same model: a few numbers that differ as much as the models do."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch

SKETCH_SIZE = 16
NOT_FINITE = 1e30  # stands for what JSON and comparisons cannot carry; far away from any model
TOLERANCE = 0.01
"""Relative distance of two models up to which they count as the same. Codecs make a thousandth between two averagings
of the parameters (measured with int8 at a learning rate of 0.003); a single missed step of that size makes a tenth."""


@torch.no_grad()
def sketch(params: Iterable[torch.Tensor]) -> list[float]:
    """A count sketch of all parameters (Charikar et al. 2002, section 3).

    Distances between sketches estimate distances between models, to about a quarter at this size.

    Every value is added to one of `SKETCH_SIZE` sums with a random sign that is the same on all peers. Unlike a hash it
    tells a rounding difference from another model.
    """
    sums = torch.zeros(SKETCH_SIZE, dtype=torch.float64)
    for index, param in enumerate(params):
        values = param.detach().flatten().to("cpu", torch.float32)
        generator = torch.Generator().manual_seed(index)
        signs = torch.randint(0, 2, values.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
        values = torch.nn.functional.pad(values * signs, (0, -len(values) % SKETCH_SIZE))
        sums += values.view(-1, SKETCH_SIZE).sum(0, dtype=torch.float64)
    return sums.nan_to_num(nan=NOT_FINITE, posinf=NOT_FINITE, neginf=NOT_FINITE).clamp(-NOT_FINITE, NOT_FINITE).tolist()


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Distance of two sketches, relative to the size of the second one."""
    difference, size = math.dist(one, other), math.hypot(*other)
    return difference / size if size else math.inf if difference else 0.0


def majority(sketches: Sequence[Sequence[float]]) -> list[float]:
    """The model that most peers have: the median of each number, which a minority cannot move far."""
    return [statistics.median(values) for values in zip(*sketches, strict=True)]


def spread(sketches: Sequence[Sequence[float]]) -> float:
    """The largest distance of any of these models from the majority's."""
    return max((distance(one, majority(sketches)) for one in sketches), default=0.0)


def strays(sketches: Mapping[str, Sequence[float]], tolerance: float) -> set[str]:
    """Peers whose model is not the one that most have.

    :param sketches: by peer id, all of the same global step.
    :param tolerance: relative distance up to which two models count as the same.
    :returns: all but the largest set of peers that agree with one of them; of two such sets that are equally large, the
      one with the smallest peer id stays, so that all peers come to the same result.
    """
    agreeing = [
        {other for other in sketches if distance(sketches[other], sketches[one]) <= tolerance}
        for one in sorted(sketches)
        if max(map(abs, sketches[one]), default=0.0) < NOT_FINITE
    ]
    return set(sketches) - max(agreeing, key=len, default=set())
