from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AlbertForPreTraining, AutoTokenizer, PreTrainedTokenizerBase

from tasks.mlm.encoder import Encoder, open_encoder
from tasks.mlm.instances import LONGEST_WORD, NO_ORDER, SWAPPED, Instances, Pool, make_instances
from tasks.mlm.masking import choose_words, collate, width_of

Made = tuple[Pool, Instances]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def encoder(tokenizer_folder: Path) -> Encoder:
    return open_encoder(tokenizer_folder)


@pytest.fixture(scope="module")
def some(encoder: Encoder, corpus: list[str]) -> Made:
    pool = Pool.of([*corpus[:150], "the"], encoder)
    return pool, make_instances(pool, pool.ranges(), 128, np.random.default_rng(0))


def originals(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.where(batch["labels"] >= 0, batch["labels"], batch["input_ids"])


def words_in(pool: Pool, instances: Instances, width: int) -> np.ndarray:
    """The word of the pool that stands at each position of a batch: -1 for none."""
    words = np.full((len(instances), width), -1)
    for row in range(len(instances)):
        start, middle, stop = instances.start[row], instances.middle[row], instances.stop[row]
        one, two = pool.word_of[start:middle], pool.word_of[middle:stop]
        if instances.order[row] == SWAPPED:
            one, two = two, one
        words[row, 1 : 1 + len(one)] = one
        words[row, 2 + len(one) : 2 + len(one) + len(two)] = two
    return words


def test_a_batch_is_what_the_instances_say(some, encoder):
    pool, instances = some
    rows = instances[np.r_[0:6, len(instances) - 1]]  # the last one is a single word
    batch = collate(pool, rows, encoder, rng=np.random.default_rng(0))
    width = width_of(int(rows.lengths.max()))
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "token_type_ids", "labels", "sentence_order_label"], torch.int64
    )
    assert batch["sentence_order_label"].tolist() == rows.order.tolist() and rows.order[-1] == NO_ORDER
    for row in range(7):
        start, middle, stop, order = (vars(rows)[name][row] for name in ("start", "middle", "stop", "order"))
        one, two = pool.ids[start:middle].tolist(), pool.ids[middle:stop].tolist()
        if order == SWAPPED:
            one, two = two, one
        second = [] if order == NO_ORDER else [*two, encoder.sep_id]
        expected = [encoder.cls_id, *one, encoder.sep_id, *second]
        rest = width - len(expected)
        assert originals(batch)[row].tolist() == expected + rest * [encoder.pad_id]
        assert batch["attention_mask"][row].tolist() == len(expected) * [1] + rest * [0]
        assert batch["token_type_ids"][row].tolist() == (2 + len(one)) * [0] + len(second) * [1] + rest * [0]


@pytest.mark.parametrize(("length", "width"), [(3, 4), (16, 16), (17, 18), (255, 256), (257, 264), (512, 512)])
def test_widths_suit_the_hardware_where_it_is_cheap(length, width):
    assert width_of(length) == width


def test_rates_and_that_special_tokens_are_never_touched(some, encoder, tokenizer):
    pool, instances = some
    rng = np.random.default_rng(1)
    counts = dict.fromkeys(["real", "chosen", "masked", "kept", "random"], 0)
    for start in range(0, 20 * len(instances), 32):
        rows = instances[np.arange(start, start + 32) % len(instances)]
        batch = {name: tensor.numpy() for name, tensor in collate(pool, rows, encoder, rng=rng).items()}
        chosen = batch["labels"] >= 0
        words = words_in(pool, rows, chosen.shape[1])
        assert not chosen[words < 0].any()
        assert not np.isin(batch["labels"][chosen], tokenizer.all_special_ids).any()
        shown, label = batch["input_ids"][chosen], batch["labels"][chosen]
        assert set(np.unique(shown[shown != label])) & set(tokenizer.all_special_ids) <= {encoder.mask_id}
        counts["real"] += (words >= 0).sum()
        counts["chosen"] += chosen.sum()
        counts["masked"] += (shown == encoder.mask_id).sum()
        counts["kept"] += (shown == label).sum()
        counts["random"] += ((shown != encoder.mask_id) & (shown != label)).sum()
    assert counts["chosen"] / counts["real"] == pytest.approx(0.15, abs=0.002)
    assert counts["masked"] / counts["chosen"] == pytest.approx(0.8, abs=0.01)
    assert counts["kept"] / counts["chosen"] == pytest.approx(0.1, abs=0.01)
    assert counts["random"] / counts["chosen"] == pytest.approx(0.1, abs=0.01)


def test_words_are_masked_whole_and_a_row_overshoots_by_less_than_a_word(some, encoder):
    pool, instances = some
    chosen = collate(pool, instances, encoder, rng=np.random.default_rng(2))["labels"].numpy() >= 0
    words = words_in(pool, instances, chosen.shape[1])
    for row in range(len(instances)):
        assert not set(words[row][chosen[row]]) & set(words[row][~chosen[row]])
        assert 1 <= chosen[row].sum() < 0.15 * (words[row] >= 0).sum() + LONGEST_WORD


def test_long_words_are_chosen_as_often_as_short_ones():
    words = np.array([*range(90), *np.repeat(np.arange(90, 96), 6)])
    row, rng = np.zeros(len(words), dtype=np.int64), np.random.default_rng(0)
    share = np.mean([choose_words(row, words, 1, 0.15, rng) for _ in range(4000)], axis=0)
    assert share[:90].mean() == pytest.approx(0.15, abs=0.02)
    assert share[90:].mean() == pytest.approx(0.15, abs=0.02)


def test_what_is_unknown_is_never_chosen_and_a_row_may_have_nothing_to_predict():
    rng = np.random.default_rng(0)
    row, words = np.array([0, 0, 1, 1, 3]), np.array([-1, -1, -1, 0, 0])
    assert choose_words(row, words, 4, 0.15, rng).tolist() == [False, False, False, True, True]
    assert not choose_words(row, np.full(5, -1), 4, 0.15, rng).any()


def test_a_new_mask_each_time_and_the_same_for_the_same_rng(some, encoder):
    pool, instances = some
    rng = np.random.default_rng(3)
    first, second = (collate(pool, instances, encoder, rng=rng)["labels"] for _ in range(2))
    again = collate(pool, instances, encoder, rng=np.random.default_rng(3))["labels"]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_mask_probability_is_heeded(some, encoder):
    pool, instances = some
    batch = collate(pool, instances, encoder, mask_probability=0.5, rng=np.random.default_rng(0))
    real = int((words_in(pool, instances, batch["labels"].shape[1]) >= 0).sum())
    assert int((batch["labels"] >= 0).sum()) / real == pytest.approx(0.5, abs=0.03)


def test_albert_takes_the_batch_as_it_is(some, encoder, tokenizer):
    pool, instances = some
    config = AlbertConfig(
        vocab_size=len(tokenizer), embedding_size=16, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        num_hidden_layers=1,
    )  # fmt: skip
    output = AlbertForPreTraining(config)(**collate(pool, instances, encoder, rng=np.random.default_rng(0)))
    assert torch.isfinite(output.loss)
