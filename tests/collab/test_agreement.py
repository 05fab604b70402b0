"""Telling another model from a rounding difference."""

import math

import pytest
import torch

from collab.agreement import SKETCH_SIZE, distance, majority, sketch, spread, strays


def model(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.02 for shape in ((100, 64), (64,), (7, 3), ())]


def moved(params: list[torch.Tensor], relative: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return [p + torch.randn(p.shape, generator=generator) * 0.02 * relative for p in params]


def test_equal_models_have_equal_sketches() -> None:
    assert sketch(model()) == sketch(model()) and len(sketch(model())) == SKETCH_SIZE


def test_rounding_to_float16_is_no_other_model() -> None:
    rounded = [param.half().float() for param in model()]
    assert 0 < distance(sketch(rounded), sketch(model())) < 0.004


@pytest.mark.parametrize("relative", [0.01, 0.1, 1.0])
def test_the_distance_of_sketches_is_that_of_the_models(relative: float) -> None:
    estimates = [distance(sketch(moved(model(seed), relative)), sketch(model(seed))) / relative for seed in range(20)]
    assert 0.6 < sum(estimates) / len(estimates) < 1.6


def test_the_spread_is_that_of_the_peer_that_strayed() -> None:
    healthy = [sketch(moved(model(), 1e-4)), sketch(model()), sketch(moved(model(), 2e-4))]
    assert spread(healthy) < 0.001
    assert 0.05 < spread([*healthy, sketch(moved(model(), 0.1))]) < 0.2
    assert spread([]) == 0.0


def test_a_liar_cannot_move_the_majority() -> None:
    honest = [sketch(moved(model(), 1e-4)), sketch(model()), sketch(moved(model(), 2e-4))]
    liar = [1e12] * SKETCH_SIZE
    assert distance(majority([*honest, liar]), honest[1]) < 0.02


def test_what_is_not_finite_is_another_model() -> None:
    broken = sketch([torch.tensor([math.nan, 1.0])])
    assert distance(broken, sketch(model())) > 1e6 and all(map(math.isfinite, broken))
    assert distance([0.0] * SKETCH_SIZE, [0.0] * SKETCH_SIZE) == 0.0


def test_most_peers_are_right_and_the_others_stray() -> None:
    good, bad = sketch(model()), sketch(moved(model(), 0.1))
    near = sketch(moved(model(), 1e-4))
    assert strays({"a": bad, "b": good, "c": near}, 0.01) == {"a"}
    assert strays({"a": bad, "b": bad, "c": good}, 0.01) == {"c"}
    assert strays({"a": good, "b": near, "c": good}, 0.01) == set()


def test_two_peers_that_differ_come_to_the_same_verdict_and_one_stays() -> None:
    assert strays({"a": sketch(model()), "b": sketch(model(1))}, 0.01) == {"b"}


def test_a_model_that_is_not_finite_always_strays() -> None:
    broken = sketch([torch.full((100,), math.nan)])
    assert strays({"a": broken, "b": broken, "c": sketch(model())}, 0.01) == {"a", "b"}
    assert strays({"a": broken, "b": broken}, 0.01) == {"a", "b"}
