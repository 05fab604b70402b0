"""Who has an expert that two claim, and what a fresh one is."""

import random

import pytest
import torch
from hivemind.utils import get_dht_time

from collab.experts.plan import ExpertPlan, holders
from collab.metrics import HostedExpert, ServerRecord


def record(peer_id: str, *claims: tuple[int, float], age: float = 0.0, left: bool = False) -> ServerRecord:
    experts = [HostedExpert(index=i, since=since, steps=0, rows_per_second=0.0) for i, since in claims]
    reported = get_dht_time() - age
    return ServerRecord(name=peer_id, peer_id=peer_id, version="0", experts=experts, reported=reported, left=left)


def test_of_two_claims_the_earlier_one_counts_for_everybody() -> None:
    records = [record("a", (0, 20.0), (1, 10.0)), record("b", (0, 10.0), (2, 5.0)), record("c", (1, 10.0), (3, 1.0))]
    records += [record("gone", (0, 1.0), left=True), record("dead", (0, 1.0), age=100.0)]
    for _ in range(5):
        random.shuffle(records)
        found = {index: holder.peer_id for index, holder in holders(records, lifetime=15.0).items()}
        assert found == {0: "b", 1: "a", 2: "b", 3: "c"}


def test_a_fresh_expert_is_the_same_everywhere_like_no_other_and_adds_nothing(plan) -> None:
    before = torch.get_rng_state()
    one, again, other = plan.make(1), plan.make(1), plan.make(2)
    assert torch.equal(torch.get_rng_state(), before), "the trainer's own random numbers go on as they were"
    assert torch.equal(one.up.weight, again.up.weight) and not torch.equal(one.up.weight, other.up.weight)
    assert not one(torch.randn(3, 8)).any()


@pytest.mark.parametrize("layers", [1, 3])
def test_names_tell_runs_and_experts_apart(layers) -> None:
    plans = [ExpertPlan(swarm, layers, 4, 8, 16) for swarm in ("run_a", "run_b")]
    names = {plan.uid(index) for plan in plans for index in range(plan.total)}
    assert len(names) == 8 * layers
