"""What the swarm's optimizer is made of: schedule, decay, clipping and its wiring. Whole rounds are in tests/swarm."""

import contextlib
import os
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import hivemind
import pytest
import torch
from hivemind.averaging.control import AveragingStage
from hivemind.optim.progress_tracker import LocalTrainingProgress, ProgressTracker
from hivemind.optim.state_averager import TrainingStateAverager, initialize_optimizer_state_
from hivemind.utils import PerformanceEMA, ValueWithExpiration, get_dht_time
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    BertForPreTraining,
    DebertaV2ForMaskedLM,
    LlamaForCausalLM,
    ModernBertForMaskedLM,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
)

import collab.optimizer
from arguments import OptimizerArguments, agreed_settings
from collab.adamw import AdamW8bit
from collab.averager import StateAverager
from collab.errors import UserError
from collab.lamb import Lamb
from collab.link import Link
from collab.optimizer import (
    CODECS,
    MOST_FAILED_LOADS,
    OPTIMIZERS,
    SwarmOptimizer,
    Tracker,
    linear_schedule,
    make_optimizer,
    weight_decay_groups,
)
from collab.spikes import SpikeGuard

PEER: Any = SimpleNamespace(dht=object(), private_key=object(), client_mode=True)


@pytest.fixture
def build(monkeypatch):
    """`make_optimizer` up to the point where processes would start: gives what hivemind's optimizer is built with."""

    def build_until_start(param_groups, auxiliary: bool = False, own: dict | None = None, **given):
        monkeypatch.setattr(
            collab.optimizer,
            "SwarmOptimizer",
            lambda **options: SimpleNamespace(**options, share_state_memory=lambda: None),
        )
        settings = agreed_settings({"run_id": "ours", **given})
        swarm_id = settings["run_id"]
        return make_optimizer(PEER, param_groups, settings, swarm_id=swarm_id, auxiliary=auxiliary, **own or {})

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


def test_a_persons_own_optimizer_and_schedule_take_the_place_of_the_settings(build):
    own = {"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.1), "scheduler": lambda o: ExponentialLR(o, 0.5)}
    optimizer = build(one_group(1.0), own=own, max_grad_norm=1.0)
    inner = optimizer.optimizer(optimizer.params)
    scheduler = optimizer.scheduler(inner)
    for rate in (0.1, 0.05):
        before = inner.param_groups[0]["params"][0].detach().clone()
        inner.param_groups[0]["params"][0].grad = torch.tensor([4.0])
        inner.step()
        moved = before - inner.param_groups[0]["params"][0].detach()
        assert moved.item() == pytest.approx(rate), "the rate is the schedule's, and the gradient is clipped as ever"
        scheduler.step()


def test_a_persons_own_optimizer_without_schedule_keeps_its_rate(build):
    optimizer = build(one_group(1.0), own={"optimizer": lambda groups: torch.optim.SGD(groups, lr=0.3)})
    inner = optimizer.optimizer(optimizer.params)
    scheduler = optimizer.scheduler(inner)
    inner.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.3 and scheduler._step_count == 2


def test_a_persons_own_optimizer_is_tried_before_anything_starts(build):
    with pytest.raises(UserError, match="dampening=0"):
        build(one_group(1.0), own={"optimizer": lambda groups: torch.optim.SGD(groups, 0.1, 0.9, dampening=0.5)})


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


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "albert": (AlbertForPreTraining, {"embedding_size": 8}),
    "bert": (BertForPreTraining, {}),
    "roberta": (RobertaForMaskedLM, {}),
    "deberta-v2": (DebertaV2ForMaskedLM, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "modernbert": (ModernBertForMaskedLM, {"pad_token_id": 0, "norm_bias": True}),
    "llama": (LlamaForCausalLM, {}),
    "t5": (T5ForConditionalGeneration, {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_no_norm_and_no_bias_of_a_model_of_transformers_is_decayed_and_all_else_is(kind: str) -> None:
    """LlamaRMSNorm and T5LayerNorm are not torch's; a new weight of a norm is all ones, and nothing else is."""
    cls, options = MODELS[kind]
    sizes = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
    model = cls(cls.config_class(**({"vocab_size": 50} if kind == "t5" else sizes), **options))
    norms = {name for name, param in model.named_parameters() if bool((param == 1).all())}
    biases = {name for name, _ in model.named_parameters() if name.endswith("bias")}
    decayed, undecayed = weight_decay_groups(model, 0.01)
    assert len(norms) >= 4
    assert names_in(model, undecayed) == norms | biases
    assert names_in(model, decayed) == {name for name, _ in model.named_parameters()} - norms - biases


def test_a_tied_parameter_is_in_one_group_once():
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    decayed, undecayed = weight_decay_groups(model, 0.1)
    assert len(decayed["params"]) == 1 and not undecayed["params"]


# ---- clipping ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
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
    kinds: dict[str, Any] = {"lamb": Lamb, "lamb_8bit": Lamb, "adamw": torch.optim.AdamW, "adamw_8bit": AdamW8bit}
    assert kinds.keys() == OPTIMIZERS.keys() == set(get_args(get_type_hints(OptimizerArguments)["optimizer"]))
    for kind, cls in kinds.items():
        inner = build(groups, optimizer=kind, **options).optimizer(groups)
        assert type(inner) is cls
        assert [group["weight_decay"] for group in inner.param_groups] == [0.3, 0.0]
        for group in inner.param_groups:
            assert (group["lr"], tuple(group["betas"]), group["eps"]) == (0.25, (0.8, 0.9), 1e-4)


@pytest.mark.parametrize("kind", sorted(OPTIMIZERS))
def test_the_state_is_there_from_the_start_and_changes_nothing(build, kind):
    """A newcomer loads the swarm's state into it; weights and the first real step are those of a fresh optimizer."""
    values = [float(value) for value in torch.linspace(-4, 3, 5000)]
    groups, untouched = one_group(*values), one_group(*values)
    groups[0]["weight_decay"] = untouched[0]["weight_decay"] = 0.1
    inner = build(groups, optimizer=kind, learning_rate=0.25, max_grad_norm=0.0).optimizer(groups)
    [param], [other] = groups[0]["params"], untouched[0]["params"]
    assert param.grad is None and torch.equal(param, other) and inner.param_groups[0]["lr"] == 0.25
    moment = inner.state[param]["mean_codes" if kind.endswith("8bit") else "exp_avg"]
    assert moment.numel() >= 5000 and not moment.any()
    fresh = OPTIMIZERS[kind](untouched, lr=0.25, eps=1e-6)
    for optimizer, each in ((inner, param), (fresh, other)):
        each.grad = torch.linspace(-1, 2, 5000)
        optimizer.step()
    assert torch.equal(param, other)


def test_adamw_goes_on_from_a_state_in_8_bits(build):
    groups = one_group(*[0.5] * 5000)
    coded = build(groups, optimizer="adamw_8bit").optimizer(groups)
    groups[0]["params"][0].grad = torch.ones(5000)
    coded.step()
    inner = build(groups, optimizer="adamw").optimizer(groups)
    inner.load_state_dict(coded.state_dict())
    groups[0]["params"][0].grad = torch.ones(5000)
    inner.step()
    assert inner.state[groups[0]["params"][0]]["step"] == 2


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


def test_local_updates_average_parameters_alone_and_after_every_step(build):
    """What peers want of their losses is said with gradients, so nothing is gone back to."""
    groups = one_group(1.0)
    optimizer = build(groups, local_updates=True, average_state_every=5, rollback_after=10)
    assert optimizer.use_local_updates and optimizer.grad_averager_factory is None
    assert optimizer.average_state_every == 1 and optimizer.delay_state_averaging
    assert optimizer.spikes.patience == 0
    assert optimizer.averager_opts["max_weight"] == optimizer.target_batch_size, "what one peer can claim"
    settings = agreed_settings({"run_id": "ours", "local_updates": True})
    with pytest.raises(UserError, match="leave out --offload_optimizer"):
        make_optimizer(PEER, groups, settings, swarm_id="ours", offload_optimizer=True)


def test_an_auxiliary_peer_delays_nothing(build):
    """It has no gradients of its own that something could be delayed behind."""
    given = dict(delay_optimizer_step=True, delay_grad_averaging=True)
    for auxiliary in (False, True):
        optimizer = build(one_group(1.0), auxiliary=auxiliary, **given)
        assert optimizer.auxiliary is auxiliary
        assert optimizer.delay_optimizer_step is not auxiliary and optimizer.delay_grad_averaging is not auxiliary
        # hivemind makes no step in the background without; no volunteer should have to know that
        assert optimizer.offload_optimizer is not auxiliary
        assert optimizer.delay_state_averaging is not auxiliary


def test_parameters_on_the_cpu_lie_in_shared_memory(build):
    """Else hivemind moves them under a running step when a newcomer asks for the state."""
    groups = one_group(1.0)
    build(groups)
    assert groups[0]["params"][0].is_shared()


# ---- faults of hivemind 1.1.12: each is shown on its own class and on ours; when the stock half fails, it is mended --


def bare(cls: Any, **attributes: Any) -> Any:
    """An optimizer without its processes, for a single method."""
    optimizer = cls.__new__(cls)
    optimizer.__dict__.update(_parent_pid=0, auxiliary=False, client_mode=False, grad_averager=SimpleNamespace())
    optimizer.__dict__.update(scheduled_grads=None, scheduled_state=None, spikes=SpikeGuard(0), snapshots=None)
    optimizer.__dict__.update(status_loglevel=0, **attributes)
    return optimizer


class Calls:
    """Something that counts how often it is called, and gives an answer."""

    def __init__(self, answer: Any = None) -> None:
        self.number, self.answer = 0, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.number += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


def quiet_tracker(step: int) -> Any:
    """Knows the others' global step, and tells nobody anything."""
    return SimpleNamespace(
        pause_updates=contextlib.nullcontext, global_epoch=step, report_local_progress=Calls(), withdraw=Calls()
    )


@pytest.mark.parametrize(("cls", "ended"), [(hivemind.Optimizer, True), (SwarmOptimizer, False)])
def test_an_object_that_shares_its_attributes_ends_nothing_when_it_is_collected(cls, ended) -> None:
    """Schedulers and wrappers of Accelerate make such objects; with the averagers gone, all calls hang."""
    averager = SimpleNamespace(is_alive=lambda: True, shutdown=Calls(), step=Calls())
    optimizer = bare(cls, state_averager=averager, grad_averager=averager, shutdown_timeout=1.0)
    optimizer.tracker = SimpleNamespace(shutdown=Calls())
    wrapper = cls.__new__(cls)
    wrapper.__dict__ = optimizer.__dict__
    optimizer._parent_pid = os.getpid()
    del wrapper
    assert bool(averager.shutdown.number) is ended
    optimizer._parent_pid = 0


def test_starting_an_optimizer_leaves_weights_alone_that_stock_hivemind_decays(build) -> None:
    groups = one_group(3.0, -4.0)
    groups[0]["weight_decay"] = 0.1
    [param] = groups[0]["params"]
    initialize_optimizer_state_(torch.optim.AdamW(groups, lr=0.25))
    assert param.tolist() != [3.0, -4.0]
    param.data = torch.tensor([3.0, -4.0])
    inner = build(groups, optimizer="adamw", learning_rate=0.25).optimizer(groups)
    assert param.tolist() == [3.0, -4.0]
    assert inner.state[param], "hivemind makes no step of its own if there is a state"


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_chainable_schedule_would_decay_twice_for_a_newcomer(build) -> None:
    """It downloads the learning rate, and then catches up with the schedule from that. Ours is a closed form."""

    def rates(make: Any) -> tuple[float, float]:
        peers = []
        for _ in range(2):
            inner = torch.optim.SGD(one_group(1.0), lr=0.5)
            peers.append(SimpleNamespace(optimizer=inner, scheduler=make(inner), local_epoch=0))
        donor, newcomer = peers
        donor.local_epoch = newcomer.local_epoch = 10
        TrainingStateAverager._update_scheduler(donor)
        newcomer.optimizer.load_state_dict(donor.optimizer.state_dict())
        TrainingStateAverager._update_scheduler(newcomer)
        return donor.optimizer.param_groups[0]["lr"], newcomer.optimizer.param_groups[0]["lr"]

    right, chained = rates(lambda inner: ExponentialLR(inner, 0.9))
    assert chained == pytest.approx(right * 0.9**10)
    options = build(one_group(1.0), warmup_steps=3, max_global_steps=20)
    right, ours = rates(options.scheduler)
    assert ours == right and type(options.scheduler(torch.optim.SGD(one_group(1.0)))) is LambdaLR


@pytest.mark.parametrize(("cls", "reloads"), [(hivemind.Optimizer, False), (SwarmOptimizer, True)])
def test_a_peer_that_missed_a_step_takes_over_the_state(cls, reloads) -> None:
    """Stock hivemind counts the step as made, and makes it with what this peer has: its own gradient alone."""
    optimizer = bare(
        cls,
        state_averager=SimpleNamespace(local_epoch=4),
        tracker=SimpleNamespace(global_epoch=5),
        delay_grad_averaging=False,
        _should_check_synchronization_on_update=False,
        _must_reload=False,
    )
    assert optimizer._should_load_state_from_peers() is reloads
    optimizer.tracker.global_epoch = 6
    assert optimizer._should_load_state_from_peers()


def test_with_delayed_averaging_one_step_behind_is_normal_at_any_time() -> None:
    """Stock hivemind calls it out of sync at the first news of each step."""
    news = threading.Event()
    news.set()
    optimizer = bare(
        SwarmOptimizer,
        state_averager=SimpleNamespace(local_epoch=4),
        tracker=SimpleNamespace(global_epoch=5, fetched_global_progress_this_epoch=news),
        delay_grad_averaging=True,
        _should_check_synchronization_on_update=True,
        _must_reload=False,
    )
    assert not optimizer._should_load_state_from_peers()
    optimizer.tracker.global_epoch = 6
    assert optimizer._should_load_state_from_peers()


@pytest.mark.parametrize(("cls", "ready"), [(ProgressTracker, True), (Tracker, False)])
def test_a_step_is_not_made_of_samples_that_nobody_has_reported(cls, ready) -> None:
    """Stock hivemind counts on while the others average: by its estimate they have computed 10,000 samples."""
    tracker = cls.__new__(cls)
    threading.Thread.__init__(tracker)  # it looks whether it is alive when it goes
    tracker.target_batch_size, tracker.metadata_expiration = 4096, 60.0
    tracker.min_refresh_period, tracker.max_refresh_period, tracker.default_refresh_period = 0.5, 10.0, 3.0
    tracker.expected_drift_peers, tracker.expected_drift_rate, tracker.status_loglevel = 3, 0.2, 0
    tracker.prefix, tracker.performance_ema, tracker._local_public_key = "ours", PerformanceEMA(alpha=0.1), b"me"
    own = dict(peer_id=b"me", epoch=4, samples_per_second=100.0, client_mode=False)
    tracker.local_progress = LocalTrainingProgress(**own, samples_accumulated=0, time=get_dht_time())

    def look(samples: int, seconds_ago: float) -> bool:
        other = LocalTrainingProgress(
            **(own | {"peer_id": b"other", "samples_per_second": 1000.0}),
            samples_accumulated=samples, time=get_dht_time() - seconds_ago,
        )  # fmt: skip
        tracker.global_progress = tracker._parse_swarm_progress_data({b"other": ValueWithExpiration(other.dict(), 0)})
        return bool(tracker.ready_to_update_epoch)

    assert look(0, seconds_ago=10.0) is ready
    assert not look(2500, seconds_ago=0.0)
    assert look(2500, seconds_ago=2.0), "the last micro-batches before a step may be estimated"
    assert look(4096, seconds_ago=0.0)


@pytest.mark.parametrize(("cls", "ready"), [(ProgressTracker, True), (Tracker, False)])
def test_a_peer_that_has_died_computes_nothing_any_more(cls, ready, monkeypatch) -> None:
    """Stock hivemind makes steps too early, with 70 to 89 % of their samples, until the record of the dead expires."""
    tracker, now = bare_tracker(cls=cls), get_dht_time()
    record = LocalTrainingProgress(
        peer_id=b"me", epoch=5, samples_accumulated=20, samples_per_second=4.0, client_mode=False, time=now
    )
    tracker.local_progress = record
    died = record.copy(update={"epoch": 4, "time": now - 6.0})
    records = {b"me": record, b"other": record, b"dead": died}
    entries = {name: ValueWithExpiration(told.dict(), 0) for name, told in records.items()}

    def ready_after(seconds: float, samples: int) -> bool:
        monkeypatch.setattr(hivemind.optim.progress_tracker, "get_dht_time", lambda: now)
        monkeypatch.setattr(collab.optimizer, "get_dht_time", lambda: now)
        tracker.global_progress = tracker._parse_swarm_progress_data(entries)
        monkeypatch.setattr(hivemind.optim.progress_tracker, "get_dht_time", lambda: now + seconds)
        monkeypatch.setattr(collab.optimizer, "get_dht_time", lambda: now + seconds)
        tracker.local_progress = record.copy(update={"samples_accumulated": samples})
        return bool(tracker.ready_to_update_epoch)

    assert ready_after(2.1, samples=28) is ready
    assert ready_after(3.1, samples=32), "two peers, of 64 samples 20 each and 4 a second"
    entries[b"dead"] = ValueWithExpiration(died.copy(update={"epoch": 5, "samples_accumulated": 4}).dict(), 0)
    assert ready_after(2.4, samples=29) is ready, "what it has computed since its last word, if anything, is lost"
    assert ready_after(2.6, samples=30), "what it has reported may have been averaged"


@pytest.mark.parametrize("search", [None, SimpleNamespace(triggered=False, done=lambda: True)])
@pytest.mark.parametrize("cls", [hivemind.Optimizer, SwarmOptimizer])
def test_a_round_begins_with_a_deadline_although_there_was_no_early_search_or_it_failed(cls, search) -> None:
    """Stock hivemind takes a failed search for the round itself, and goes on as if it had failed.

    Without any it begins a round that lasts for ever, for which a leader takes nobody in.
    """
    searches: list[float | None] = []

    def schedule_step(timeout: float | None = None) -> SimpleNamespace:
        searches.append(timeout)
        return SimpleNamespace(triggered=False, done=lambda: False)

    def step(control: Any, **_: Any) -> Any:
        return schedule_step() if control is None else control

    averager = SimpleNamespace(step=step, schedule_step=schedule_step, local_samples_accumulated=8)
    optimizer = bare(
        cls,
        state_averager=SimpleNamespace(local_epoch=4),
        grad_averager=averager,
        tracker=SimpleNamespace(global_progress=SimpleNamespace(num_peers=2, epoch=4)),
        averaging_timeout=15.0,
    )
    optimizer.scheduled_grads = search
    optimizer._load_local_gradients_into_optimizer = optimizer._report = optimizer.zero_grad = Calls()
    begins = optimizer._begin_averaging_gradients(None)
    if cls is SwarmOptimizer:
        assert begins and searches == [15.0]
    else:
        assert searches == [None] if begins else searches == []


def bare_tracker(lag: int = 0, cls: Any = Tracker) -> Any:
    tracker = cls.__new__(cls)
    threading.Thread.__init__(tracker)
    tracker.__dict__.update(
        target_batch_size=64, min_refresh_period=0.5, max_refresh_period=10.0, default_refresh_period=3.0,
        expected_drift_peers=3, expected_drift_rate=0.2, status_loglevel=0, performance_ema=PerformanceEMA(alpha=0.1),
        prefix="ours", lag=lag, _local_public_key=b"me",
    )  # fmt: skip
    return tracker


def test_a_newcomer_counts_itself_before_its_record_is_there() -> None:
    """Else it takes the only other peer for itself, and makes its first step alone."""
    tracker = bare_tracker()
    record = LocalTrainingProgress(
        peer_id=b"me", epoch=4, samples_accumulated=8, samples_per_second=1.0, client_mode=False, time=get_dht_time()
    )
    tracker.local_progress = record
    entry = ValueWithExpiration(record.dict(), 0)
    assert tracker._parse_swarm_progress_data({b"other": entry}).num_peers == 2
    assert tracker._parse_swarm_progress_data({b"other": entry, b"me": entry}).num_peers == 2
    assert tracker._parse_swarm_progress_data({b"me": entry}).num_peers == 1
    tracker.local_progress = record.copy(update={"samples_accumulated": 0})  # an auxiliary peer is not one of them
    assert tracker._parse_swarm_progress_data({b"other": entry}).num_peers == 1


@pytest.fixture
def look() -> Callable[..., Tracker]:
    """A peer's tracker after it has seen the others' records: `{name: step}`, or `{name: (step, speed)}`."""

    def with_records(own: int, lag: int = 0, *, reports: bool = True, **others: Any) -> Tracker:
        tracker = bare_tracker(lag)

        def record(step: int, speed: float) -> LocalTrainingProgress:
            return LocalTrainingProgress(
                peer_id=b"x", epoch=step, samples_accumulated=8, samples_per_second=speed, client_mode=False,
                time=get_dht_time(),
            )  # fmt: skip

        tracker.local_progress = record(own, 1.0)
        told = {name.encode(): step if isinstance(step, tuple) else (step, 1.0) for name, step in others.items()}
        told |= {b"me": (own, 1.0)} if reports else {}
        entries = {name: ValueWithExpiration(record(*said).dict(), 0) for name, said in told.items()}
        tracker.global_progress = tracker._parse_swarm_progress_data(entries)
        return tracker

    return with_records


LIE = 10**9


@pytest.mark.parametrize(
    ("own", "others", "step"),
    [
        (5, {"a": 5, "liar": LIE}, 5),
        (5, {"a": 6, "b": 6, "liar": LIE}, 6),
        (5, {"a": 6, "b": 5}, 5),  # which most have not made
        (4, {"a": 5, "liar": LIE}, 5),
        (0, {"a": 900}, 900),  # a newcomer, or one that was left behind
        (7, {"a": 900, "assistant": (900, 0.0)}, 900),
        (7, {"a": 900, "left behind as well": 7, "assistant": (900, 0.0)}, 900),
        (7, {"a": 900, "b": 901, "left behind as well": 7}, 900),
    ],
)
def test_no_single_peer_can_say_how_far_the_others_are(look, own, others, step) -> None:
    """Stock hivemind believes the most advanced one: all others download states instead of training."""
    tracker = look(own, **others)
    assert tracker.global_epoch == step
    assert tracker.global_progress.num_peers == 1 + sum(not isinstance(said, tuple) for said in others.values())


def test_samples_of_who_says_to_be_ahead_make_no_step(look) -> None:
    assert look(5, a=5, liar=5).global_progress.samples_accumulated == 24
    assert look(5, a=5, liar=LIE).global_progress.samples_accumulated == 16


def test_with_delayed_averaging_the_first_to_count_a_step_has_the_others_begin(look) -> None:
    assert look(5, a=6, b=5).global_epoch == 5
    assert look(5, lag=1, a=6, b=5).global_epoch == 6 and look(5, lag=1, a=LIE, b=5).global_epoch == 6


@pytest.mark.parametrize(
    ("own", "trainers", "step"),
    [
        (3, (), -1),
        (3, (9,), 9),
        (9, (3,), 3),
        (5, (5, LIE), 5),
        (4, (5, LIE), 5),
        (5, (0, 5), 5),
        (5, (6, 5), 5),
        (6, (6, 5), 6),
        (0, (LIE, 7, 7), 7),
        (0, (0, 7, 7), 7),
        (9, (LIE, 2, 2), 2),
        (5, (6, 6, 5, 5, 5), 5),
        (5, (6, 6, 6, LIE), 6),
    ],
)
def test_an_auxiliary_peer_goes_by_the_step_of_most_trainers(look, own, trainers, step) -> None:
    said = {f"trainer {number}": made for number, made in enumerate(trainers)}
    assert look(own, reports=False, other=(LIE, 0.0), **said).trainers_step == step


def test_who_came_while_a_lone_peer_gathered_its_samples_is_met() -> None:
    averager = SimpleNamespace(step=Calls("the round"), schedule_step=Calls(), local_samples_accumulated=8)
    tracker = SimpleNamespace(global_progress=SimpleNamespace(num_peers=1, epoch=4))
    optimizer = bare(
        SwarmOptimizer, state_averager=SimpleNamespace(local_epoch=4), grad_averager=averager, tracker=tracker,
        averaging_timeout=15.0,
    )  # fmt: skip
    optimizer._look_who_is_there = lambda: setattr(tracker.global_progress, "num_peers", 2)
    optimizer.zero_grad = Calls()
    assert optimizer._begin_averaging_gradients(None) and averager.step.number == 1


@pytest.mark.parametrize(("cls", "looks"), [(hivemind.Optimizer, 1), (SwarmOptimizer, 0)])
def test_a_peer_that_is_alone_looks_for_nobody(cls, looks) -> None:
    averager = SimpleNamespace(schedule_step=Calls(), matchmaking_kwargs={"min_matchmaking_time": 1.0})
    optimizer = bare(
        cls,
        state_averager=SimpleNamespace(local_epoch=4),
        grad_averager=averager,
        tracker=SimpleNamespace(global_progress=SimpleNamespace(num_peers=1), estimated_next_update_time=0.0),
        matchmaking_time=1.0,
        averaging_timeout=9.0,
    )
    optimizer._maybe_schedule_gradient_averaging()
    assert averager.schedule_step.number == looks


@pytest.mark.parametrize(
    ("cls", "averager_cls", "attempts"),
    [(hivemind.Optimizer, TrainingStateAverager, 20), (SwarmOptimizer, StateAverager, 3)],
)
def test_taking_over_a_state_that_cannot_be_had_comes_to_an_end(monkeypatch, cls, averager_cls, attempts) -> None:
    """Stock hivemind tries for ever. It is interrupted here after 20 attempts."""
    monkeypatch.setattr(collab.optimizer, "LOAD_STATE_PAUSE", 0.0)
    tried = []

    def download(self: Any, **kwargs: Any) -> None:
        tried.append(kwargs)
        raise KeyboardInterrupt if len(tried) == 20 else TimeoutError("longer than load_state_timeout")

    monkeypatch.setattr(TrainingStateAverager, "load_state_from_peers", download)
    averager = averager_cls.__new__(averager_cls)
    averager.__dict__.update(_parent_pid=0, step=Calls(), local_epoch=4, optimizer=SimpleNamespace(state={}))
    averager._outer_pipe = SimpleNamespace(send=Calls())
    tracker = quiet_tracker(7)
    optimizer = bare(cls, state_averager=averager, tracker=tracker, load_state_timeout=1.0, states_loaded=0)
    optimizer.client_mode, optimizer._must_reload = True, True
    optimizer.grad_averager = SimpleNamespace(reset_accumulated_grads_=Calls())
    optimizer._look_who_is_there = Calls()
    with contextlib.suppress(KeyboardInterrupt):
        assert optimizer.load_state_from_peers() is False
        assert optimizer.states_loaded == 0 and optimizer.local_epoch == 4
    assert len(tried) == attempts


def test_who_gets_a_state_from_nobody_waits_longer_each_time(monkeypatch) -> None:
    download = Calls(False)
    pauses: list[float] = []
    state = SimpleNamespace(
        step=Calls(),
        load_state_from_peers=download,
        local_epoch=0,
        allow_state_sharing=False,
        state_sharing_priority=0,
        not_before=0,
    )
    state.optimizer = SimpleNamespace(state={})
    tracker = quiet_tracker(5)
    optimizer = bare(SwarmOptimizer, state_averager=state, tracker=tracker, load_state_timeout=1.0)
    optimizer._must_reload, optimizer._look_who_is_there = False, Calls()
    optimizer.grad_averager = SimpleNamespace(reset_accumulated_grads_=Calls())
    optimizer.pause = pauses.append
    monkeypatch.setattr(collab.optimizer.time, "sleep", lambda seconds: None)
    for _ in range(9):
        assert optimizer.load_state_from_peers() is False
    assert pauses == [2, 4, 8, 16, 32, 60, 60, 60]
    download.answer, state.local_epoch = True, 5
    optimizer.load_state_from_peers()
    pauses.clear()
    optimizer.load_state_from_peers()
    assert pauses == []


def test_weights_that_the_swarm_has_left_are_replaced_or_at_least_not_handed_out(monkeypatch) -> None:
    monkeypatch.setattr(collab.optimizer, "LOAD_STATE_PAUSE", 0.0)
    state = SimpleNamespace(
        step=Calls(), load_state_from_peers=Calls(False), local_epoch=5, allow_state_sharing=False, not_before=5,
        state_sharing_priority=0,
    )  # fmt: skip
    state.optimizer = SimpleNamespace(state={})
    tracker = quiet_tracker(5)
    tracker.is_alone = False
    optimizer = bare(SwarmOptimizer, state_averager=state, tracker=tracker, load_state_timeout=1.0)
    optimizer._look_who_is_there, optimizer.pause = Calls(), Calls()
    optimizer.grad_averager = SimpleNamespace(reset_accumulated_grads_=Calls())
    optimizer._must_reload = True
    for _ in range(MOST_FAILED_LOADS):
        assert not optimizer.load_state_from_peers()
        assert optimizer._must_reload and state.not_before == 5 and not state.allow_state_sharing
    optimizer.load_state_from_peers()  # nobody has the others' weights any more
    assert not optimizer._must_reload and state.allow_state_sharing


@pytest.mark.parametrize("has_state", [True, False])
def test_who_has_no_state_tries_again_at_step_0_and_shares_none_before_it_has_one(monkeypatch, has_state) -> None:
    monkeypatch.setattr(collab.optimizer, "LOAD_STATE_PAUSE", 0.0)
    download = Calls(False)
    state = SimpleNamespace(
        step=Calls(), load_state_from_peers=download, local_epoch=0, allow_state_sharing=False, not_before=0,
        state_sharing_priority=0,
    )  # fmt: skip
    state.optimizer = SimpleNamespace(state={})
    tracker = quiet_tracker(0)
    optimizer = bare(SwarmOptimizer, state_averager=state, tracker=tracker, load_state_timeout=1.0, has_state=has_state)
    optimizer._must_reload, optimizer._look_who_is_there = False, Calls()
    optimizer.grad_averager = SimpleNamespace(reset_accumulated_grads_=Calls())
    assert optimizer.load_state_from_peers() is False
    assert download.number == (1 if has_state else 3)
    assert state.allow_state_sharing is has_state is optimizer.has_state
    download.answer = True
    assert optimizer.load_state_from_peers() is True
    assert state.allow_state_sharing and optimizer.has_state


def test_a_peer_says_how_its_loss_is_now_although_the_round_before_still_goes_on() -> None:
    """It does not look for the next group yet, but that may be all the time that it has before it joins it."""
    averager = SimpleNamespace(schedule_step=Calls(), wish=None)
    unfinished = SimpleNamespace(done=lambda: False)
    tracker = SimpleNamespace(global_progress=SimpleNamespace(num_peers=2), call_seconds=0.5)
    optimizer = bare(SwarmOptimizer, grad_averager=averager, tracker=tracker, delay_grad_averaging=True)
    optimizer.state_averager = SimpleNamespace(local_epoch=23, pending_updates=[unfinished])
    optimizer._wish = lambda: 12
    optimizer._maybe_schedule_gradient_averaging()
    assert averager.wish == 12 and averager.schedule_step.number == 0


@pytest.mark.parametrize("loaded", [True, False])
def test_who_was_left_behind_does_not_go_back_once_more_from_the_state_of_those_who_have(monkeypatch, loaded) -> None:
    """With delayed averaging, what a round has agreed on is done when the next one begins."""
    monkeypatch.setattr(collab.optimizer, "LOAD_STATE_PAUSE", 0.0)
    state = SimpleNamespace(step=Calls(), load_state_from_peers=Calls(loaded), local_epoch=27, not_before=0)
    state.optimizer = SimpleNamespace(state={})
    tracker = quiet_tracker(27)
    optimizer = bare(SwarmOptimizer, state_averager=state, tracker=tracker, load_state_timeout=1.0, client_mode=True)
    optimizer.grad_averager, optimizer._look_who_is_there = SimpleNamespace(reset_accumulated_grads_=Calls()), Calls()
    optimizer._agreed_step, optimizer._must_reload, optimizer.has_state = 12, False, True
    optimizer.load_state_from_peers()
    assert optimizer._agreed_step == (None if loaded else 12)


def test_nobodys_gradients_are_downloaded_with_the_state() -> None:
    """A newcomer has no use for them. Stock hivemind fetches as many bytes again."""
    for cls, downloads in ((hivemind.Optimizer, 1), (SwarmOptimizer, 0)):
        state = SimpleNamespace(step=Calls(), load_state_from_peers=Calls(True), local_epoch=7)
        state.optimizer = SimpleNamespace(state={})
        gradients = SimpleNamespace(load_state_from_peers=Calls(), reset_accumulated_grads_=Calls())
        tracker = quiet_tracker(7)
        optimizer = bare(cls, state_averager=state, grad_averager=gradients, tracker=tracker, load_state_timeout=1.0)
        optimizer.client_mode, optimizer._look_who_is_there = True, Calls()
        optimizer.load_state_from_peers()
        assert state.load_state_from_peers.number == 1 and gradients.load_state_from_peers.number == downloads


@pytest.mark.parametrize("cls", [hivemind.Optimizer, SwarmOptimizer])
def test_leaving_waits_for_no_round_that_is_pending(cls) -> None:
    """Stock hivemind takes part in it first: 13 to 33 seconds."""
    pending = SimpleNamespace(stage=AveragingStage.AWAITING_TRIGGER, triggered=False, done=lambda: False)
    pending.result, pending.cancel, pending.allow_allreduce = Calls(), Calls(), Calls()
    averager = SimpleNamespace(step=Calls(), shutdown=Calls())
    optimizer = bare(cls, state_averager=averager, grad_averager=averager, tracker=SimpleNamespace(shutdown=Calls()))
    optimizer.scheduled_grads, optimizer.averaging_timeout, optimizer.shutdown_timeout = pending, 9.0, 1.0
    if cls is SwarmOptimizer:
        assert optimizer.leave()
    else:
        optimizer.shutdown()
    waited, cancelled = pending.result.number, pending.cancel.number
    assert (waited, cancelled) == ((0, 1) if cls is SwarmOptimizer else (1, 0))
    assert averager.shutdown.number == 2


def test_a_measured_bandwidth_reaches_both_averagers_unless_the_person_has_given_one() -> None:
    for given, used in ((None, 30.0), (5.0, 5.0), (0.0, 0.0)):
        averagers = [SimpleNamespace(bandwidth=given) for _ in range(2)]
        optimizer = bare(SwarmOptimizer, state_averager=averagers[0], grad_averager=averagers[1], link=Link(given))
        optimizer.use_measured_bandwidth(30.0)
        assert [averager.bandwidth for averager in averagers] == [used, used]


def test_options_of_averaging_reach_both_averagers(build):
    optimizer = build(one_group(1.0), min_vector_size=1000)
    assert optimizer.averager_opts["min_vector_size"] == 1000
    assert optimizer.grad_averager_factory.keywords["min_vector_size"] == 1000


@pytest.mark.parametrize(("goes_on", "others_at", "made"), [(True, 4, 0), (True, 5, 1), (False, 4, 1)])
def test_with_local_updates_a_global_step_takes_a_round_at_least(monkeypatch, goes_on, others_at, made) -> None:
    """Steps shorter than rounds had no verdict, and peers left each other's rounds behind; but nobody stays behind."""
    counted = Calls()
    monkeypatch.setattr(hivemind.Optimizer, "_update_global_epoch", counted)
    optimizer = bare(
        SwarmOptimizer,
        state_averager=SimpleNamespace(local_epoch=4),
        tracker=SimpleNamespace(global_epoch=others_at),
        grad_averager=None,
        average_state_every=1,
        _state_round=SimpleNamespace(done=lambda: not goes_on),
        _begin_averaging_state=Calls(),
    )
    optimizer._update_global_epoch(None)
    assert counted.number == optimizer._begin_averaging_state.number == made


@pytest.mark.parametrize(("others_at", "round_number"), [(4, 5), (5, 5), (6, 6)])
def test_with_local_updates_who_has_fallen_behind_begins_the_round_in_which_the_others_are(others_at, round_number):
    """In that of the step which it jumps over nobody is any more: two peers jumped over each other for ever."""
    began: list[Any] = []

    def schedule_step(gather: Any, timeout: float) -> Any:
        began.append(gather)
        return SimpleNamespace(add_done_callback=Calls())

    optimizer = bare(
        SwarmOptimizer,
        state_averager=SimpleNamespace(local_epoch=4, schedule_step=schedule_step),
        tracker=SimpleNamespace(
            global_epoch=others_at,
            global_progress=SimpleNamespace(num_peers=2),
            local_progress=SimpleNamespace(samples_accumulated=7),
        ),
        averaging_timeout=9.0,
        _round_step=4,
        _expected=2,
        _judge_state_round=Calls(),
    )
    optimizer._begin_averaging_state()
    assert began == [[round_number, 7]]
