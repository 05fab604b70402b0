"""The ways to train that are compared see the same text, and do what they are said to do."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.convergence import LENGTH, WAYS, add_rows, rows_of, settings_of, train
from benchmarks.report import Report
from tasks.mlm.masking import IGNORED
from tasks.mlm.task import MaskedLM


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, shared_cache: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("run")
    for name, content in MaskedLM.prepare(settings_of(0, folder), shared_cache).items():
        (folder / name).write_bytes(content)
    return folder, shared_cache


@pytest.fixture
def task(folders: tuple[Path, Path]) -> MaskedLM:
    return MaskedLM(settings_of(0, folders[0]), *folders)


def test_the_plain_way_has_the_same_samples_in_another_order_and_padded(task: MaskedLM) -> None:
    ours = list(itertools.islice(task.batches(lambda: 16, "here", step=lambda: 0), 12))
    plain = list(itertools.islice(rows_of(iter(ours * 6), np.random.default_rng(0)), 3))

    def texts(batches) -> set[tuple[int, ...]]:
        return {
            tuple(ids[mask.bool()].tolist())
            for batch in batches
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        }

    assert texts(plain) <= texts(ours)
    for batch in plain:
        assert batch["input_ids"].shape[1] == LENGTH
        assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
        assert len(set(batch["attention_mask"].sum(1).tolist())) > 1, "lengths come mixed"


@pytest.mark.parametrize("name", list(WAYS))
def test_every_way_learns(task: MaskedLM, name: str) -> None:
    before = task.evaluate(1)["held_out_loss"]
    train(task, WAYS[name], 12_000)  # two steps of 256 samples
    assert task.evaluate(1)["held_out_loss"] < before


def test_a_delayed_step_is_made_with_the_gradient_of_the_one_before(task: MaskedLM) -> None:
    """So that a budget of one step changes nothing."""
    before = [param.clone() for param in task.model.parameters()]
    train(task, WAYS["delayed"], 100)
    assert all(map(torch.equal, before, task.model.parameters()))
    train(task, WAYS["ours"], 100)
    assert not all(map(torch.equal, before, task.model.parameters()))


def test_the_bar_is_on_the_mean_of_all_seeds() -> None:
    report = Report()
    add_rows(report, {"ours": [5.0, 5.2], "plain": [5.0, 5.0], "LAMB, 2048": [6.0, 6.0], "delayed": [5.0, 5.2]})
    [missed] = [row for row in report.rows if not row.ok]
    assert missed.name == "ours to plain" and missed.value == pytest.approx(1.02)
    assert report.rows[report.rows.index(missed) + 1].value == pytest.approx(0.02)
