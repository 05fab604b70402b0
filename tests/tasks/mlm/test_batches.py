"""The stream of batches: full of real tokens, deterministic, and to be taken up again anywhere."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from collab.errors import UserError
from tasks.mlm import batches as module
from tasks.mlm.batches import Batch, BatchStream, Shape
from tasks.mlm.encoder import Encoder, open_encoder
from tasks.mlm.sentences import split_sentences

SHAPE = Shape(positions=16 * 64, seq_length=64)


@pytest.fixture(scope="module")
def encoder(tokenizer_folder: Path) -> Encoder:
    return open_encoder(tokenizer_folder)


class Texts:
    """Documents, over and over, that count how many were read."""

    def __init__(self, documents: list[str], state: dict[str, Any] | None) -> None:
        self.documents, self.read = documents, state["read"] if state else 0

    def __iter__(self) -> "Texts":
        return self

    def __next__(self) -> str:
        if not self.documents:
            raise StopIteration
        self.read += 1
        return self.documents[(self.read - 1) % len(self.documents)]

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def close(self) -> None:
        self.documents = []


@pytest.fixture
def stream(encoder: Encoder, corpus: list[str]) -> Callable[..., BatchStream]:
    def stream(
        documents: list[str] = corpus,
        shape: Callable[[], Shape] = lambda: SHAPE,
        state: dict[str, Any] | None = None,
        seed: str = "ours",
        parted: bool = True,
    ) -> BatchStream:
        state = None if state is None else json.loads(json.dumps(state))
        return BatchStream(
            lambda state: Texts(documents, state),
            encoder,
            shape=shape,
            mask_probability=0.15,
            parted=parted,
            seed=seed,
            state=state,
        )

    return stream


def take(batches: BatchStream, number: int) -> list[Batch]:
    return list(itertools.islice(batches, number))


def same(one: list[Batch], two: list[Batch]) -> bool:
    return len(one) == len(two) and all(
        torch.equal(a[name], b[name]) for a, b in zip(one, two, strict=True) for name in a
    )


def tokens_of(batches: list[Batch], encoder: Encoder) -> Counter[int]:
    """How often each ordinary token is in the batches, before masking."""
    ids = [torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"]).flatten() for batch in batches]
    counts = Counter(torch.cat(ids).tolist())
    for special in (encoder.cls_id, encoder.sep_id, encoder.pad_id):
        del counts[special]
    return counts


@pytest.mark.parametrize("length", [200, 10**9])
def test_nearly_all_positions_are_real_tokens(stream, corpus, length):
    documents = [document[:length] for document in corpus]
    batches = take(stream(documents), 500)[150:]  # the first pools are small, so that somebody who waits has a batch
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    assert real / sum(batch["input_ids"].numel() for batch in batches) >= 0.97
    assert all(batch["input_ids"].numel() <= SHAPE.positions for batch in batches)


def test_all_tokens_of_the_documents_are_in_the_batches_once(stream, corpus, encoder):
    batches = stream(corpus[:160])
    taken = [next(batches)]
    while batches._plan:
        taken.append(next(batches))
    read = batches.state_dict()["documents"]
    sentences = [sentence for document in corpus[:read] for sentence in split_sentences(document)]
    assert read < 160 and tokens_of(taken, encoder) == Counter(encoder.encode(sentences)[0].tolist())


def test_the_same_seed_gives_the_same_batches_and_another_one_others(stream):
    assert same(take(stream(), 20), take(stream(), 20))
    assert not same(take(stream(), 5), take(stream(seed="another"), 5))


def test_a_pass_has_another_mask_than_the_one_before(stream, corpus):
    one, two = stream(corpus[:16], seed="ours"), stream(corpus[:16], seed="ours")
    first = take(one, 1)[0]
    while one.state_dict()["pools"] < 2:
        next(one)
    two = take(one, 200)
    assert not any(
        batch["labels"].shape == first["labels"].shape and torch.equal(batch["labels"], first["labels"])
        for batch in two
    )


@pytest.mark.parametrize("taken", [0, 1, 7, 60])
def test_who_comes_back_goes_on_as_if_nothing_had_happened(stream, taken):
    whole = take(stream(), 100)
    first = stream()
    before = take(first, taken)
    after = take(stream(state=first.state_dict()), 100 - taken)
    assert same(whole, before + after)


GOOD = {"texts": {"read": 7}, "documents": 5, "pools": 1, "batches": 3, "taken": [[1024, 64, 3]]}


@pytest.mark.parametrize(
    "change",
    [
        {"documents": 10**12}, {"documents": -1}, {"documents": "5"}, {"batches": None}, {"pools": 1.5}, {"pools": 0},
        {"texts": None}, {"taken": 3}, {"taken": [[1024, 64]]}, {"taken": [[0, 64, 3]]}, {"taken": [[1024, 8, 3]]},
        {"taken": ["abc"]}, {"taken": [[1024, 64, -3]]},
    ],
)  # fmt: skip
def test_a_state_that_is_none_is_a_new_start(stream, change, caplog):
    """A checkpoint from the Hub can hold anything."""
    assert same(take(stream(state=GOOD | change), 3), take(stream(), 3))
    assert "reading begins anew" in caplog.text
    caplog.clear()
    next(stream(state=GOOD))
    assert caplog.text == ""


def test_text_without_any_token_is_not_looked_through_for_ever(stream, monkeypatch):
    monkeypatch.setattr(module, "GIVE_UP", 3000)
    with pytest.raises(UserError, match="no token of"):
        next(stream([" "]))


def test_coming_back_reads_no_more_than_the_documents_under_way(stream):
    first = stream()
    take(first, 300)
    state = first.state_dict()
    resumed = stream(state=state)
    assert resumed._coming.texts.read == state["texts"]["read"] + state["documents"]
    assert state["texts"]["read"] > 10 * state["documents"] / module.MOST_BATCHES
    assert len(json.dumps(state)) < 2000


def changing(*shapes: Shape) -> Callable[[], Shape]:
    each = iter(shapes)
    return lambda: next(each, shapes[-1])


def test_a_change_of_shape_counts_from_the_next_batch_and_loses_nothing(stream, corpus, encoder):
    small, long = Shape(128, 32), Shape(1024, 64)
    batches = stream(corpus[:160], shape=changing(*[long] * 3, *[small] * 5, long))
    taken = take(batches, 3)
    few = take(batches, 5)
    assert all(batch["input_ids"].numel() <= 128 and batch["input_ids"].shape[1] <= 32 for batch in few)
    taken += [*few, next(batches)]
    while batches._plan:
        taken.append(next(batches))
    assert max(batch["input_ids"].shape[1] for batch in taken[8:]) > 56
    read = batches.state_dict()["documents"]
    sentences = [sentence for document in corpus[:read] for sentence in split_sentences(document)]
    assert tokens_of(taken, encoder) == Counter(encoder.encode(sentences)[0].tolist())


@pytest.mark.parametrize("parted", [True, False], ids=["pairs", "whole"])
@pytest.mark.parametrize("taken", [2, 3, 5, 9])
def test_who_comes_back_after_changes_goes_on_as_well(stream, taken, parted):
    shapes = [*[Shape(1024, 64)] * 3, *[Shape(256, 32)] * 4, *[Shape(512, 48)] * 50]
    whole = take(stream(shape=changing(*shapes), parted=parted), 40)
    first = stream(shape=changing(*shapes), parted=parted)
    before = take(first, taken)
    after = take(stream(shape=changing(*shapes[taken:]), state=first.state_dict(), parted=parted), 40 - taken)
    assert same(whole, before + after)


def test_without_pairs_a_batch_has_plain_text(stream, encoder):
    for batch in take(stream(parted=False), 20):
        assert (batch["sentence_order_label"] < 0).all() and not batch["token_type_ids"].any()
        ends = batch["attention_mask"].sum(1) - 1
        is_separator = (batch["input_ids"] == encoder.sep_id) & (batch["labels"] < 0)
        assert (is_separator.sum(1) == 1).all()
        assert (batch["input_ids"].gather(1, ends[:, None]) == encoder.sep_id).all()


def test_one_long_instance_is_a_batch_whatever_the_budget(stream):
    [batch] = take(stream(shape=lambda: Shape(8, 64)), 1)
    assert len(batch["input_ids"]) == 1


def test_batches_of_short_and_long_instances_come_mixed(stream):
    """Sorted by length, the gradient of a global step would come from texts of one kind."""
    widths = np.array([batch["input_ids"].shape[1] for batch in take(stream(), 400)[200:]])
    assert np.corrcoef(widths[:-1], widths[1:])[0, 1] < 0.3


def test_documents_are_cleaned_first(encoder, corpus):
    texts = Texts(corpus, None)
    batches = BatchStream(
        lambda state: texts, encoder, clean=lambda text: "The end.", shape=lambda: SHAPE, mask_probability=0.15, seed=""
    )
    labels = torch.cat([batch["labels"].flatten() for batch in take(batches, 5)])
    assert set(labels[labels >= 0].tolist()) <= set(encoder.encode(["The end."])[0].tolist())


def test_closing_ends_the_stream(stream):
    batches = stream()
    take(batches, 5)
    batches.close()
    assert len(take(batches, 10_000)) < 10_000
