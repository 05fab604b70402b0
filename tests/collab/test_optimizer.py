"""What the swarm's optimizer is made of: schedule, decay, clipping and its wiring. Whole rounds are in tests/swarm."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertForPreTraining

import collab.optimizer
from arguments import agreed_settings
from collab.lamb import Lamb
from collab.optimizer import CODECS, linear_schedule, make_optimizer, weight_decay_groups

PEER: Any = SimpleNamespace(dht=object(), private_key=object(), client_mode=True)


@pytest.fixture
def build(monkeypatch):
    """`make_optimizer` up to the point where processes would start: gives what hivemind's optimizer is built with."""

    def build_until_start(param_groups, auxiliary: bool = False, **given):
        monkeypatch.setattr(
            collab.optimizer,
            "SwarmOptimizer",
            lambda **options: SimpleNamespace(**options, share_state_memory=lambda: None),
        )
        settings = agreed_settings({"run_id": "ours", **given})
        return make_optimizer(PEER, param_groups, settings, swarm_id=settings["run_id"], auxiliary=auxiliary)

    return build_until_start


def one_group(*values: float) -> list[dict]:
    return [{"params": [torch.nn.Parameter(torch.tensor(values))], "weight_decay": 0.0}]


# ---- the learning rate -------------------------------------------------------------------------------------------


def test_warm_up_and_decay_are_linear():
    factor = linear_schedule(warmup_steps=10, total_steps=110, floor=0.0)
    assert factor(0) == pytest.approx(0.1), "the first update already moves"
    assert factor(4) == pytest.approx(0.5)
    assert factor(9) == 1.0, "the tenth update is the peak"
    assert factor(59) == pytest.approx(0.5)
    assert factor(108) == pytest.approx(0.01)
    assert factor(109) == 0.0
    assert factor(10_000) == 0.0


def test_the_floor_is_reached_by_the_last_step_only():
    factor = linear_schedule(warmup_steps=10, total_steps=110, floor=0.2)
    assert factor(108) > 0.2
    assert factor(109) == pytest.approx(0.2)
    assert factor(500) == pytest.approx(0.2)
    assert factor(0) == pytest.approx(0.1), "the floor is the end of the decay and no bound of the warm-up"


@pytest.mark.parametrize(("warmup", "total"), [(0, 5), (1, 5), (5, 5), (9, 5), (0, 1), (1, 1)])
def test_short_runs_have_a_schedule_too(warmup, total):
    factors = [linear_schedule(warmup, total, floor=0.1)(done) for done in range(total + 3)]
    assert all(0 < factor <= 1 for factor in factors)
    assert warmup > total or factors[total - 1] in (pytest.approx(0.1), 1.0)


def test_min_learning_rate_is_a_learning_rate(build):
    optimizer = build(
        one_group(1.0),
        learning_rate=0.5,
        min_learning_rate=0.02,
        warmup_steps=4,
        max_global_steps=20,
        optimizer="adamw",
    )
    inner = optimizer.optimizer(optimizer.params)
    scheduler = optimizer.scheduler(inner)
    rates = []
    for _ in range(25):
        rates.append(inner.param_groups[0]["lr"])
        inner.step()
        scheduler.step()
    assert rates[0] == pytest.approx(0.125) and rates[3] == max(rates) == pytest.approx(0.5)
    assert rates[19:] == [pytest.approx(0.02)] * 6


def test_a_late_joiner_arrives_at_the_same_learning_rate(build):
    """hivemind steps a newcomer's schedule as often as it missed a global step."""
    optimizer = build(one_group(1.0), warmup_steps=3, max_global_steps=20)
    rates = []
    for jumps in ([1] * 12, [12]):
        inner = optimizer.optimizer(one_group(1.0))
        scheduler = optimizer.scheduler(inner)
        for jump in jumps:
            inner.step()
            for _ in range(jump):
                scheduler.step()
        rates.append(inner.param_groups[0]["lr"])
    assert rates[0] == rates[1]


# ---- weight decay ------------------------------------------------------------------------------------------------


def names_in(model, group) -> set[str]:
    names = {id(param): name for name, param in model.named_parameters()}
    return {names[id(param)] for param in group["params"]}


def test_an_albert_decays_its_matrices_only():
    sizes: dict[str, Any] = dict(vocab_size=50, embedding_size=8, hidden_size=16, intermediate_size=32)
    model = AlbertForPreTraining(AlbertConfig(**sizes, num_attention_heads=2, num_hidden_layers=2))
    decayed, undecayed = weight_decay_groups(model, 0.01)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.01, 0.0)
    names = {name for name, _ in model.named_parameters()}
    kept = {name for name in names if name.endswith("bias") or "LayerNorm" in name or "layer_norm" in name}
    assert names_in(model, undecayed) == kept
    assert names_in(model, decayed) == names - kept
    assert "albert.embeddings.word_embeddings.weight" in names_in(model, decayed)


def test_norms_are_told_by_their_type_and_not_by_their_name():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.calm = torch.nn.LayerNorm(4)
            self.even = torch.nn.RMSNorm(4)
            self.batch = torch.nn.BatchNorm1d(4)
            self.instance = torch.nn.InstanceNorm1d(4, affine=True)
            self.layer_norm_like = torch.nn.Linear(4, 4)
            self.scale = torch.nn.Parameter(torch.ones(4))
            self.frozen = torch.nn.Linear(4, 4).requires_grad_(False)

    model = Block()
    decayed, undecayed = weight_decay_groups(model, 0.1)
    assert names_in(model, decayed) == {"layer_norm_like.weight", "scale"}
    assert names_in(model, undecayed) == {
        "layer_norm_like.bias",
        *(f"{norm}.{name}" for norm in ("calm", "batch", "instance") for name in ("weight", "bias")),
        "even.weight",
    }


def test_a_tied_parameter_is_in_one_group_once():
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    decayed, undecayed = weight_decay_groups(model, 0.1)
    assert len(decayed["params"]) == 1 and not undecayed["params"]


# ---- clipping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_what_the_optimizer_applies_is_clipped_over_all_groups(build, kind):
    """hivemind writes the averaged gradient into `.grad` and then steps: the clipping belongs between the two."""
    groups = [*one_group(1.0, 1.0), *one_group(1.0)]
    inner = build(groups, optimizer=kind, max_grad_norm=1.0).optimizer(groups)
    groups[0]["params"][0].grad = torch.tensor([2.0, 3.0])
    groups[1]["params"][0].grad = torch.tensor([6.0])  # all together a norm of 7
    inner.step()
    first, second = (inner.state[group["params"][0]]["exp_avg"] for group in groups)
    torch.testing.assert_close(first, 0.1 * torch.tensor([2.0, 3.0]) / 7, rtol=1e-4, atol=0)
    torch.testing.assert_close(second, 0.1 * torch.tensor([6.0]) / 7, rtol=1e-4, atol=0)


def test_a_small_gradient_is_not_scaled_up(build):
    groups = one_group(1.0)
    inner = build(groups, optimizer="adamw", max_grad_norm=1.0).optimizer(groups)
    groups[0]["params"][0].grad = torch.tensor([0.5])
    inner.step()
    assert groups[0]["params"][0].grad.item() == pytest.approx(0.5)


def test_a_norm_of_zero_turns_clipping_off(build):
    groups = one_group(1.0)
    inner = build(groups, optimizer="adamw", max_grad_norm=0.0).optimizer(groups)
    groups[0]["params"][0].grad = torch.tensor([50.0])
    inner.step()
    assert groups[0]["params"][0].grad.item() == 50.0


# ---- every agreed setting reaches the optimizer ------------------------------------------------------------------


def test_settings_reach_the_inner_optimizer(build):
    groups = [*one_group(1.0), *one_group(2.0)]
    groups[0]["weight_decay"] = 0.3
    options = dict(learning_rate=0.25, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-4)
    for kind, cls in (("lamb", Lamb), ("adamw", torch.optim.AdamW)):
        inner = build(groups, optimizer=kind, **options).optimizer(groups)
        assert type(inner) is cls
        assert [group["weight_decay"] for group in inner.param_groups] == [0.3, 0.0]
        for group in inner.param_groups:
            assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.25, (0.8, 0.9), 1e-4)


@pytest.mark.parametrize("kind", ["lamb", "adamw"])
def test_the_state_is_there_from_the_start_and_changes_nothing(build, kind):
    """A newcomer loads the swarm's state into it; weights and the first real step are those of a fresh optimizer."""
    groups, untouched = one_group(3.0, -4.0), one_group(3.0, -4.0)
    groups[0]["weight_decay"] = untouched[0]["weight_decay"] = 0.1
    inner = build(groups, optimizer=kind, learning_rate=0.25, max_grad_norm=0.0).optimizer(groups)
    [param], [other] = groups[0]["params"], untouched[0]["params"]
    assert param.grad is None and torch.equal(param, other) and inner.param_groups[0]["lr"] == 0.25
    assert inner.state[param]["exp_avg"].tolist() == [0.0, 0.0]
    fresh = {"lamb": Lamb, "adamw": torch.optim.AdamW}[kind](untouched, lr=0.25, eps=1e-6)
    for optimizer, each in ((inner, param), (fresh, other)):
        each.grad = torch.tensor([0.5, 2.0])
        optimizer.step()
    assert torch.equal(param, other)


def test_settings_reach_hivemind(build):
    optimizer = build(
        one_group(1.0),
        target_batch_size=77,
        matchmaking_time=4.0,
        averaging_timeout=44.0,
        metadata_expiration=22.0,
        average_state_every=3,
        grad_compression="scaled_float16",
        state_compression="none",
        delay_state_averaging=True,
    )
    assert (optimizer.run_id, optimizer.target_batch_size, optimizer.average_state_every) == ("ours", 77, 3)
    assert (optimizer.matchmaking_time, optimizer.averaging_timeout) == (4.0, 44.0)
    assert optimizer.grad_compression is CODECS["scaled_float16"]
    assert optimizer.state_averaging_compression is CODECS["none"]
    assert optimizer.tracker_opts["metadata_expiration"] == 22.0
    assert optimizer.delay_state_averaging and not optimizer.delay_optimizer_step
    assert optimizer.client_mode is True


@pytest.mark.parametrize("matchmaking_time", [1.0, 2.0, 15.0, 100.0])
def test_requests_time_out_before_matchmaking_does(build, matchmaking_time):
    """hivemind refuses to start otherwise."""
    optimizer = build(one_group(1.0), matchmaking_time=matchmaking_time, averaging_timeout=200.0)
    for options in (optimizer.averager_opts, optimizer.grad_averager_factory.keywords):
        assert 0 < options["request_timeout"] < matchmaking_time


def test_an_auxiliary_peer_delays_nothing(build):
    """It has no gradients of its own that something could be delayed behind."""
    given = dict(delay_optimizer_step=True, delay_grad_averaging=True)
    for auxiliary in (False, True):
        optimizer = build(one_group(1.0), auxiliary=auxiliary, **given)
        assert optimizer.auxiliary is auxiliary
        assert optimizer.delay_optimizer_step is not auxiliary and optimizer.delay_grad_averaging is not auxiliary


def test_parameters_on_the_cpu_lie_in_shared_memory(build):
    """Else hivemind moves them under a running step when a newcomer asks for the state."""
    groups = one_group(1.0)
    build(groups)
    assert groups[0]["params"][0].is_shared()
