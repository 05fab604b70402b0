from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from collab.errors import UserError
from tasks.mlm.instances import LONGEST_WORD, Instance, instances
from tasks.mlm.masking import Vocabulary, choose_words, collate


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture(scope="module")
def vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    return Vocabulary.of(tokenizer)


@pytest.fixture(scope="module")
def some(tokenizer: PreTrainedTokenizerBase, corpus: list[str]) -> list[Instance]:
    return list(instances(iter(corpus[:150]), tokenizer, 128, np.random.default_rng(0)))


def word_ids_of(batch: list[Instance], length: int) -> np.ndarray:
    return np.stack(
        [np.pad(instance.word_ids, (0, length - len(instance.word_ids)), constant_values=-1) for instance in batch]
    )


def test_shapes_types_and_padding(some, vocabulary):
    batch = collate(some[:7], vocabulary, rng=np.random.default_rng(0))
    longest = max(len(instance.input_ids) for instance in some[:7])
    length = batch["input_ids"].shape[1]
    assert longest <= length < longest + 8 and length % 8 == 0
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ["input_ids", "attention_mask", "token_type_ids", "labels", "sentence_order_label"], torch.int64
    )
    assert batch["sentence_order_label"].tolist() == [instance.order_label for instance in some[:7]]
    for row, instance in enumerate(some[:7]):
        size = len(instance.input_ids)
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (length - size)
        assert batch["input_ids"][row, size:].eq(vocabulary.pad_id).all()
        assert batch["token_type_ids"][row].tolist() == instance.token_type_ids.tolist() + [0] * (length - size)
        original = torch.where(batch["labels"][row] >= 0, batch["labels"][row], batch["input_ids"][row])
        assert original[:size].tolist() == instance.input_ids.tolist()


def test_rates_and_that_special_tokens_are_never_touched(some, vocabulary, tokenizer):
    rng = np.random.default_rng(1)
    counts = dict.fromkeys(["real", "chosen", "masked", "kept", "random"], 0)
    for start in range(0, 20 * len(some), 32):
        rows = [some[(start + offset) % len(some)] for offset in range(32)]
        batch = {name: tensor.numpy() for name, tensor in collate(rows, vocabulary, rng=rng).items()}
        chosen = batch["labels"] >= 0
        words = word_ids_of(rows, chosen.shape[1])
        assert not chosen[words < 0].any()
        assert not np.isin(batch["labels"][chosen], tokenizer.all_special_ids).any()
        shown, label = batch["input_ids"][chosen], batch["labels"][chosen]
        assert set(np.unique(shown[shown != label])) & set(tokenizer.all_special_ids) <= {vocabulary.mask_id}
        counts["real"] += (words >= 0).sum()
        counts["chosen"] += chosen.sum()
        counts["masked"] += (shown == vocabulary.mask_id).sum()
        counts["kept"] += (shown == label).sum()
        counts["random"] += ((shown != vocabulary.mask_id) & (shown != label)).sum()
    assert counts["chosen"] / counts["real"] == pytest.approx(0.15, abs=0.002)
    assert counts["masked"] / counts["chosen"] == pytest.approx(0.8, abs=0.01)
    assert counts["kept"] / counts["chosen"] == pytest.approx(0.1, abs=0.01)
    assert counts["random"] / counts["chosen"] == pytest.approx(0.1, abs=0.01)


def test_words_are_masked_whole_and_a_row_overshoots_by_less_than_a_word(some, vocabulary):
    rng = np.random.default_rng(2)
    for start in range(0, len(some) - 32, 32):
        rows = some[start : start + 32]
        chosen = collate(rows, vocabulary, rng=rng)["labels"].numpy() >= 0
        words = word_ids_of(rows, chosen.shape[1])
        for row in range(32):
            assert not set(words[row][chosen[row]]) & set(words[row][~chosen[row]])
            budget = 0.15 * (words[row] >= 0).sum()
            assert 1 <= chosen[row].sum() < budget + LONGEST_WORD


def test_long_words_are_chosen_as_often_as_short_ones():
    word_ids = np.array([[-1, *range(90), *np.repeat(np.arange(90, 96), 6), -1]])
    rng = np.random.default_rng(0)
    share = np.mean([choose_words(word_ids, 0.15, rng)[0] for _ in range(4000)], axis=0)
    assert share[0] == share[-1] == 0
    assert share[1:91].mean() == pytest.approx(0.15, abs=0.02)
    assert share[91:-1].mean() == pytest.approx(0.15, abs=0.02)


def test_a_row_without_words_has_nothing_to_predict():
    assert not choose_words(np.array([[-1, -1], [-1, 0]]), 0.15, np.random.default_rng(0))[0].any()
    assert not choose_words(np.full((2, 3), -1), 0.15, np.random.default_rng(0)).any()


def test_a_new_mask_each_time_and_the_same_for_the_same_rng(some, vocabulary):
    rng = np.random.default_rng(3)
    first, second = (collate(some[:4], vocabulary, rng=rng)["labels"] for _ in range(2))
    again = collate(some[:4], vocabulary, rng=np.random.default_rng(3))["labels"]
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_mask_probability_and_padding_multiple_are_heeded(some, vocabulary):
    batch = collate(some[:50], vocabulary, mask_probability=0.5, rng=np.random.default_rng(0), pad_to_multiple_of=50)
    assert batch["input_ids"].shape[1] % 50 == 0
    real = sum(int((instance.word_ids >= 0).sum()) for instance in some[:50])
    assert int((batch["labels"] >= 0).sum()) / real == pytest.approx(0.5, abs=0.03)


def test_albert_takes_the_batch_as_it_is(some, vocabulary, tokenizer):
    config = AlbertConfig(
        vocab_size=len(tokenizer), embedding_size=16, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        num_hidden_layers=1,
    )  # fmt: skip
    output = AlbertForPreTraining(config)(**collate(some[:4], vocabulary, rng=np.random.default_rng(0)))
    assert torch.isfinite(output.loss)


def test_a_tokenizer_without_mask_is_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(UserError, match="no mask or padding token"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
