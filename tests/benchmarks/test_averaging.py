"""What the benchmark of averaging computes from its peers' logs; no peers here."""

import math
from typing import Any

import pytest
import torch

from benchmarks.averaging import (
    PeerRun,
    add_codec_rows,
    add_cost_rows,
    add_wire_rows,
    largest_difference,
    payload_formula,
    relative_error,
    rounds_met,
    sets_of_tensors,
    weighted_mean,
)
from benchmarks.report import Report
from collab.codecs import INT8_FROM_VALUES

SIZE = 4 * INT8_FROM_VALUES
"""Bytes of one set of the tensors below."""


def round_report(step: int = 1, **changes: Any) -> dict[str, Any]:
    report = dict(step=step, met=2, applied=True, parts=1.0, bytes_sent=SIZE, bytes_received=SIZE)
    return report | {"matchmaking_seconds": 0.1, "allreduce_seconds": 0.2, "reason": ""} | changes


def peer(reports: list[dict[str, Any]], value: float = 1.0, role: str = "trainer", samples: int = 16) -> PeerRun:
    tensors = {"weight": torch.full((SIZE // 4,), value)}
    sketches = {str(r["step"]): [value] * 16 for r in reports}
    log = {"reports": reports, "sketches": sketches, "by_step": {str(r["step"] - 1): [[0, samples]] for r in reports}}
    return PeerRun(role, log, weights=tensors, own=tensors, averaged=tensors)


@pytest.mark.parametrize("trainers", [2, 3, 4, 16])
def test_among_trainers_the_formula_is_the_one_of_a_ring(trainers: int) -> None:
    assert payload_formula("trainer", ["trainer"] * trainers, SIZE) == pytest.approx(
        2 * SIZE * (trainers - 1) / trainers
    )


def test_a_client_sends_one_set_whoever_else_is_there() -> None:
    for senders, reducers in [(2, 1), (3, 3), (9, 4)]:
        assert sets_of_tensors("client", senders, reducers) == 1


@pytest.mark.parametrize("trainers, clients, auxiliaries", [(2, 1, 1), (1, 1, 0), (0, 2, 1), (4, 0, 3)])
def test_what_the_swarm_sends_is_what_everybody_needs(trainers: int, clients: int, auxiliaries: int) -> None:
    """Every value goes from each sender to its reducer and back, unless the two are one peer."""
    roles = ["trainer"] * trainers + ["client"] * clients + ["auxiliary"] * auxiliaries
    senders, reducers = trainers + clients, trainers + auxiliaries
    one_way = senders - trainers / reducers
    assert sum(payload_formula(role, roles, 1) for role in roles) == pytest.approx(2 * one_way)


def test_a_round_counts_only_if_every_peer_applied_all_of_it() -> None:
    whole = [round_report(step) for step in (1, 2, 3, 4)]
    flawed = [round_report(1, applied=False), round_report(2, met=1), round_report(3, parts=0.5), round_report(4)]
    assert rounds_met([whole, flawed], 4) == {4}
    assert rounds_met([whole, whole[1:]], 4) == {2, 3, 4}  # a peer that took over a state missed a round


def test_the_mean_is_over_samples() -> None:
    mean = weighted_mean([{"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([4.0, 3.0])}], [10, 20])
    torch.testing.assert_close(mean["a"], torch.tensor([3.0, 2.0], dtype=torch.float64))
    assert mean["a"].dtype == torch.float64


def test_relative_error_is_of_all_tensors_together() -> None:
    true = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    assert relative_error({"a": torch.tensor([3.0]), "b": torch.tensor([4.5])}, true) == pytest.approx(0.1)


def test_largest_difference_looks_at_every_peer() -> None:
    peers = [{"a": torch.tensor([0.0, value])} for value in (0.0, 0.0, -0.25)]
    assert largest_difference(peers) == 0.25


def test_rows_of_a_good_swarm_are_all_ok() -> None:
    report = Report()
    add_wire_rows(report, [peer([round_report(1), round_report(2)])] * 2, rounds=2)
    assert all(row.ok for row in report.rows), report.table()
    assert "2 trainers: rounds met by all" in report.table()


def test_rows_of_a_bad_swarm_say_what_is_wrong() -> None:
    report = Report()
    heavy = peer([round_report(1, bytes_sent=SIZE * 1.2), round_report(2, met=1, applied=False)])
    add_wire_rows(report, [heavy, peer([round_report(1)], value=1.1)], rounds=2)
    missed = {row.name: row.value for row in report.rows if not row.ok}
    assert missed == {
        "2 trainers: rounds met by all": 0.5,
        "2 trainers: bytes off the formula, trainer": pytest.approx(0.1),
        "2 trainers: models apart, largest of 1 steps": pytest.approx(0.05, rel=0.1),
        "2 trainers: parameters differ at the end by": pytest.approx(0.1),
    }


def test_a_swarm_that_never_met_is_still_a_table() -> None:
    report = Report()
    add_wire_rows(report, [peer([])] * 2, rounds=2)
    assert not report.rows[0].ok


def test_rows_of_a_codec() -> None:
    report = Report()
    add_codec_rows(report, "float16", [peer([round_report(bytes_sent=SIZE // 2)], samples=n) for n in (16, 48)])
    error, size = report.rows
    assert error.ok and error.bar == 1e-3
    assert size.value == 2.0


def test_a_codec_is_not_judged_by_a_round_in_which_peers_were_apart() -> None:
    report = Report()
    add_codec_rows(report, "none", [peer([round_report()]), peer([round_report(met=1)])])
    assert math.isinf(report.rows[0].value) and not report.rows[0].ok


def test_cost_is_of_all_processes_for_the_same_micro_batches() -> None:
    report = Report()
    log = {
        "turns": 100, "cpu_seconds": 6.0, "cpu_by_process": {"trainer": 5.0, "p2pd": 1.0, "samiti-watcher": 0.0},
        "wall_seconds": 6.0, "reports": [{}, {}],
        "plain": [{"turns": 50, "cpu_seconds": 2.0}, {"turns": 50, "cpu_seconds": 3.0}],
    }  # fmt: skip
    add_cost_rows(report, "one", [log, log], bar=1.1)
    values = {row.name.removeprefix("one: "): row.value for row in report.rows}
    assert values["CPU to the plain loop"] == pytest.approx(1.2) and not report.rows[0].ok
    assert values["of this, p2pd"] == pytest.approx(0.2)
    assert "of this, samiti-watcher" not in values
    assert values["plain loops, slowest to fastest"] == pytest.approx(1.5)
    assert values["global step, mean"] == pytest.approx(3.0)
    assert values["micro-batches of a peer in a step"] == 50
