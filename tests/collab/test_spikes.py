"""When the loss has jumped: what a peer thinks of it, what a group decides, and the weights that are kept for it.

Whole swarms that go back are in tests/swarm/test_rollback.py.
"""

import contextlib
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from collab.lamb import Lamb
from collab.optimizer import StepGuard, SwarmOptimizer
from collab.spikes import GIVE_UP, LEAST, NAN_IN_A_ROW, NOWHERE, WELL, Snapshots, SpikeGuard, step_to_go_back_to

PATIENCE = 3


class Run:
    """A peer's losses, one for each global step."""

    def __init__(self, patience: int = PATIENCE) -> None:
        self.guard, self.step = SpikeGuard(patience), 0

    def see(self, *losses: float) -> "Run":
        for loss in losses:
            self.step += 1
            self.guard.add(loss, 16)
            self.guard.close(self.step)
        return self


def noisy(level: float, steps: int, noise: float = 0.05, seed: int = 0) -> list[float]:
    drawn = random.Random(seed)
    return [drawn.gauss(level, noise * level) for _ in range(steps)]


# ---- what one peer thinks ----------------------------------------------------------------------------------------


def test_a_jump_that_stays_is_a_reason_to_go_back_and_one_that_passes_is_not() -> None:
    run = Run().see(*noisy(3.0, 30), 6.0, 7.0)
    assert not run.guard.wants_back and not run.guard.is_well
    run.see(3.1)
    assert run.guard.is_well
    run.see(6.0, 7.0, 7.0)
    assert run.guard.wants_back


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_a_jump(bad: float) -> None:
    run = Run().see(*noisy(3.0, 20), *[bad] * PATIENCE)
    assert run.guard.wants_back
    run.guard.went_back()
    assert run.see(3.0).guard.is_well, "it left no trace in what is usual"


def test_the_noisy_start_of_a_run_is_no_jump() -> None:
    """From 10 down to 4 in 60 steps, as a fresh model does it, with much noise in the small samples of one peer."""
    falling = [4 + 6 * math.exp(-step / 20) for step in range(200)]
    for seed in range(20):
        run = Run()
        for level, loss in zip(falling, noisy(1.0, 200, noise=0.1, seed=seed), strict=True):
            assert not run.see(level * loss).guard.wants_back


def test_a_jump_is_noticed_while_the_loss_falls_fast() -> None:
    assert Run().see(*[10 - 0.2 * step for step in range(25)], 11.0, 11.0, 11.0).guard.wants_back


def test_a_slow_rise_is_no_jump() -> None:
    """Longer sequences or a harder source: the level moves, and what is usual with it."""
    run = Run()
    for level, loss in zip([3 + step / 50 for step in range(150)], noisy(1.0, 150, noise=0.02), strict=True):
        assert not run.see(level * loss).guard.wants_back


def test_a_newcomer_does_not_judge_what_it_cannot_compare() -> None:
    run = Run().see(*noisy(3.0, LEAST - 1))
    assert not run.guard.is_settled
    run.see(*[9.0] * PATIENCE)
    assert not run.guard.wants_back


def test_who_joined_after_the_jump_forgets_it_when_the_swarm_goes_back() -> None:
    run = Run().see(*noisy(9.0, 5))
    run.guard.went_back()
    run.see(*noisy(3.0, LEAST), *noisy(9.0, PATIENCE))
    assert run.guard.wants_back, "9 is not what it takes for usual"


def test_a_level_that_going_back_does_not_mend_is_accepted() -> None:
    """Else a swarm whose text has changed would go back for ever."""
    run = Run().see(*noisy(3.0, 20), *noisy(6.0, PATIENCE))
    assert run.guard.wants_back
    run.guard.went_back()
    run.see(*noisy(6.0, 50))
    assert run.guard.is_well


def test_who_alone_has_another_level_gives_in() -> None:
    run = Run().see(*noisy(3.0, 20), *noisy(6.0, GIVE_UP * PATIENCE + LEAST))
    assert run.guard.is_well


def test_a_second_jump_after_going_back_is_one_too() -> None:
    run = Run().see(*noisy(3.0, 20), *noisy(6.0, PATIENCE))
    run.guard.went_back()
    assert run.see(3.0, 6.0, 6.0, 6.0).guard.wants_back


def test_the_loss_of_a_step_is_the_mean_over_its_samples() -> None:
    run = Run().see(*[3.0] * 20)
    for _ in range(PATIENCE):
        run.guard.add(50.0, 1)
        run.guard.add(3.0, 999)
        run.guard.close(21)
    assert run.guard.is_well
    run.guard.close(22)
    assert run.guard.is_well and run.guard.healthy_until == 21, "a step without samples says nothing"


def test_zero_patience_never_goes_back() -> None:
    run = Run(patience=0).see(*noisy(3.0, 30), *noisy(30.0, 100))
    assert not run.guard.wants_back and not run.guard.is_settled
    assert not any(run.guard.drop() for _ in range(3 * NAN_IN_A_ROW))


def test_a_resumed_peer_judges_as_the_one_that_left() -> None:
    left = Run().see(*noisy(3.0, 25), 6.0)
    back = Run()
    back.guard.load_state_dict(left.guard.state_dict())
    assert back.see(6.0, 6.0).guard.wants_back
    for nonsense in (None, 3, {"healthy": "x", "in_a_row": 1}, {"healthy": [math.nan], "in_a_row": 1}):
        back = Run()
        back.guard.load_state_dict(nonsense)
        assert back.guard.state_dict() == Run().guard.state_dict()


# ---- what a group decides ----------------------------------------------------------------------------------------


def test_most_of_those_who_can_judge_decide() -> None:
    assert step_to_go_back_to([50, 50, WELL], before=70) == 50
    assert step_to_go_back_to([50, WELL], before=70) is None, "one liar of two"
    assert step_to_go_back_to([50, 50, WELL, WELL], before=70) is None
    assert step_to_go_back_to([50, None, None], before=70) == 50, "newcomers follow"
    assert step_to_go_back_to([50, NOWHERE, WELL], before=70) == 50
    assert step_to_go_back_to([NOWHERE, NOWHERE], before=70) is None
    assert step_to_go_back_to([50, 50, 25], before=70) == 50
    assert step_to_go_back_to([50, 25], before=70) == step_to_go_back_to([25, 50], before=70) == 25
    assert step_to_go_back_to([], before=70) is None


@given(st.lists(st.none() | st.integers() | st.booleans() | st.floats() | st.text() | st.lists(st.integers())))
def test_what_strangers_say_neither_breaks_nor_decides_anything(lies: list[Any]) -> None:
    honest = [WELL] * (len(lies) + 1)
    assert step_to_go_back_to([*lies, *honest], before=70) is None
    assert step_to_go_back_to([*lies, *[50] * len(honest)], before=70) is not None
    assert step_to_go_back_to([lie for lie in lies if type(lie) is not int], before=70) is None


# ---- what is kept to go back to ----------------------------------------------------------------------------------


def trained(kind: Any, steps: int) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(size)) for size in ((4, 3), (5,), ())]
    inner: torch.optim.Optimizer = kind([{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:]}], lr=0.01)
    train(inner, steps)
    return inner


def train(inner: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        for group in inner.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        inner.step()


def contents(inner: torch.optim.Optimizer) -> list[torch.Tensor]:
    params = [param for group in inner.param_groups for param in group["params"]]
    return [t.clone() for param in params for t in (param.detach(), *inner.state[param].values())]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Lamb])
def test_weights_and_moments_come_back_in_place_and_the_learning_rate_stays(tmp_path: Path, kind: Any) -> None:
    inner, snapshots = trained(kind, 3), Snapshots(tmp_path, "me", every=10)
    kept = contents(inner)
    places = [p.data_ptr() for group in inner.param_groups for p in group["params"]]
    snapshots.save(10, inner)
    train(inner, 2)
    inner.param_groups[0]["lr"] = 0.005
    assert not any(map(torch.equal, contents(inner), kept))
    assert snapshots.restore(10, inner)
    assert all(map(torch.equal, contents(inner), kept))
    assert [p.data_ptr() for group in inner.param_groups for p in group["params"]] == places
    assert inner.param_groups[0]["lr"] == 0.005


def test_two_are_kept_and_those_of_left_weights_are_not(tmp_path: Path) -> None:
    inner, snapshots = trained(Lamb, 1), Snapshots(tmp_path, "me", every=10)
    for step in (10, 20, 30):
        snapshots.save(step, inner)
    assert snapshots.steps == [20, 30] and len(list(tmp_path.glob("*/*.safetensors"))) == 2
    snapshots.forget(after=20)
    assert snapshots.steps == [20] and not snapshots.restore(30, inner) and not snapshots.restore(10, inner)
    snapshots.close()
    assert not list(tmp_path.iterdir())


def test_a_damaged_or_foreign_snapshot_changes_nothing(tmp_path: Path) -> None:
    inner, snapshots = trained(Lamb, 1), Snapshots(tmp_path, "me", every=10)
    snapshots.save(10, trained(torch.optim.SGD, 1))
    snapshots.save(20, inner)
    [file] = tmp_path.glob("*/step-0000020.safetensors")
    file.write_bytes(file.read_bytes()[:-10])
    train(inner, 1)
    before = contents(inner)
    assert not snapshots.restore(10, inner) and not snapshots.restore(20, inner)
    assert all(map(torch.equal, contents(inner), before))


def test_a_disk_that_cannot_be_written_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    snapshots = Snapshots(tmp_path / "file", "me", every=10)
    for step in (10, 20):
        snapshots.save(step, trained(Lamb, 1))
    assert snapshots.steps == [] and caplog.text.count("No snapshot is kept") == 1


def test_what_a_killed_trainer_left_is_removed_and_what_a_running_one_keeps_is_not(tmp_path: Path) -> None:
    running = Snapshots(tmp_path, "running", every=10)
    running.save(10, trained(Lamb, 1))
    script = (
        "import sys, time; from pathlib import Path; from tests.collab.test_spikes import *\n"
        "mine = Snapshots(Path(sys.argv[1]), 'killed', 10); mine.save(10, trained(Lamb, 1))\n"
        "print('kept', flush=True); time.sleep(60)"
    )
    root = str(Path(__file__).resolve().parents[2])
    killed = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE, cwd=root, env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip
    assert killed.stdout is not None and killed.stdout.readline() == b"kept\n"
    assert {path.name for path in tmp_path.iterdir()} == {"running", "killed"}
    Snapshots(tmp_path, "new", every=10)
    assert {path.name for path in tmp_path.iterdir()} == {"running", "killed"}
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    killed.stdout.close()
    Snapshots(tmp_path, "new", every=10)
    assert {path.name for path in tmp_path.iterdir()} == {"running"}
    assert running.restore(10, trained(Lamb, 2))


# ---- going back --------------------------------------------------------------------------------------------------


def swarm_optimizer(tmp_path: Path, **attributes: Any) -> Any:
    """One without its processes, that has been healthy until global step 20, with snapshots of 10 and 20."""
    optimizer = SwarmOptimizer.__new__(SwarmOptimizer)
    inner, run = trained(torch.optim.AdamW, 1), Run().see(*noisy(3.0, 20))
    snapshots = Snapshots(tmp_path, "me", every=10)
    for step in (10, 20):
        snapshots.save(step, inner)
        train(inner, 1)
    averager = SimpleNamespace(
        local_epoch=20, optimizer=inner, went_back_at=0, not_before=0, held_step=None, allow_state_sharing=True,
        step=lambda **_: None, get_tensors=contextlib.nullcontext,
    )  # fmt: skip
    optimizer.__dict__.update(
        _parent_pid=0, auxiliary=False, client_mode=False, delay_optimizer_step=False, delay_grad_averaging=False,
        offload_optimizer=False, guard=StepGuard(0.0), spikes=run.guard, snapshots=snapshots, state_averager=averager,
        _round_step=30, _must_reload=False, average_state_every=5, _agreed_step=None,
    )  # fmt: skip
    optimizer.__dict__.update(attributes)
    return optimizer


def test_only_weights_after_which_the_loss_stayed_healthy_are_gone_back_to(tmp_path: Path) -> None:
    """The update that ruins a model can be the one before the snapshot: the loss shows it a step later."""
    optimizer = swarm_optimizer(tmp_path)
    assert optimizer._wish() == WELL
    for step in range(21, 21 + PATIENCE):
        optimizer.spikes.add(9.0, 16)
        optimizer.spikes.close(step)
    assert optimizer._wish() == 10


def test_a_peer_that_keeps_no_such_weights_takes_over_those_of_who_has_gone_back(tmp_path: Path) -> None:
    optimizer = swarm_optimizer(tmp_path)
    optimizer._follow_wishes([15, 15, None])
    assert optimizer._must_reload and optimizer.guard.hold_next
    averager = optimizer.state_averager
    assert not averager.allow_state_sharing, "nobody is to have the weights that the swarm has left"
    assert averager.not_before == 30, "nor does this peer take them from anybody else"


def test_an_auxiliary_peer_offers_no_state_that_the_swarm_has_left(tmp_path: Path) -> None:
    for held, offers in ((10, True), (25, False)):
        optimizer = swarm_optimizer(tmp_path / str(held), auxiliary=True)
        optimizer.state_averager.held_step = held
        optimizer._follow_wishes([20, 20])
        assert optimizer.state_averager.allow_state_sharing is offers
        assert optimizer.went_back_to == 20


def test_a_peer_whose_every_gradient_is_nan_goes_back_by_itself(tmp_path: Path) -> None:
    """No global step is made any more in which peers could agree on it."""
    optimizer = swarm_optimizer(tmp_path)
    assert optimizer.snapshots.restore(10, optimizer.opt)
    good = contents(optimizer.opt)
    optimizer.tracker = SimpleNamespace(global_epoch=20, report_local_progress=lambda *_, **__: None)
    optimizer.grad_averager = SimpleNamespace(reset_accumulated_grads_=lambda: None)
    optimizer._should_check_synchronization_on_update = False
    for param in optimizer.opt.param_groups[0]["params"]:
        param.data.fill_(math.nan)
    for _ in range(NAN_IN_A_ROW - 1):
        optimizer.drop()
    assert not contents(optimizer.opt)[0].isfinite().all()
    optimizer.drop()
    assert all(map(torch.equal, contents(optimizer.opt), good))
