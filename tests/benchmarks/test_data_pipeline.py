"""The ways that are compared do what they are said to do."""

import pytest

from benchmarks import data_pipeline
from benchmarks.data_pipeline import SEQ_LENGTH, ours, ours_loaded, raw, reference, reference_core
from tasks.mlm import batches


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data_pipeline, "POOLS_BEFORE", 2)
    monkeypatch.setattr(batches, "FIRST_BATCHES", 8)
    monkeypatch.setattr(batches, "MOST_BATCHES", 8)  # as much is read as is given out
    monkeypatch.setattr(data_pipeline, "REFERENCE_BYTES", 20_000)


def test_ours_and_that_of_2021_give_batches_of_the_same_kind(small, tokenizer_folder, corpus):
    for way in (ours, ours_loaded, reference_core, reference):
        cost = way(corpus, tokenizer_folder)
        assert 0.12 < cost.masked / cost.words < 0.16
        assert cost.words < cost.tokens <= cost.positions
        assert cost.seconds > 0 and cost.megabytes > 0
        if way in (reference, reference_core):
            assert cost.positions % SEQ_LENGTH == 0


def test_the_same_text_has_as_many_tokens_in_each_way(small, tokenizer_folder, corpus):
    rates = [way(corpus, tokenizer_folder) for way in (raw, ours, ours_loaded, reference)]
    per_megabyte = [(cost.words or cost.tokens) / cost.megabytes for cost in rates]
    assert max(per_megabyte) < 1.5 * min(per_megabyte)
