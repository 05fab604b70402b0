"""What the benchmark of the training step reads and counts."""

from pathlib import Path

import pytest

from benchmarks import training_step
from benchmarks.training_step import Loop, rates_in


def test_rates_are_those_of_rounds_in_which_both_were_there(tmp_path: Path) -> None:
    log = tmp_path / "trainer.log"
    log.write_text(
        "step 1/9  loss 9.021  4,160 tokens/s  peers 1/1  429 samples given\n"
        "step 2/9  loss 8.968  12,445 tokens/s (31% of the peak)  peers 2/2 (100% of the parts, 1.2 MB, 0.1 s)\n"
        "step 3/9  loss 8.928  911 tokens/s  peers 2/2 (100% of the parts, 1.2 MB, 0.1 s)  waited 7% for peers\n"
        "step 4/9  loss 8.928  911 tokens/s  peers 1/2  NOT averaged: no group\n"
    )
    assert rates_in(log) == {2: 12445.0, 3: 911.0}


def test_a_loop_counts_tokens_for_as_long_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    at = [0.0]

    def turn() -> int:
        at[0] += 2.0
        return 100

    monkeypatch.setattr(training_step.time, "process_time", lambda: at[0])
    monkeypatch.setattr(training_step.time, "monotonic", lambda: 2 * at[0])
    assert Loop(turn).run(5.0) == (50.0, 25.0)
