"""Whole-word masking: from instances to the batch that the model sees, with a new mask each time."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from collab.errors import UserError
from tasks.mlm.instances import Instance

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stays as it is (BERT, Devlin et al. 2019, section 3.1)
IGNORED = -100  # label of a token that is not to be predicted: what torch's cross-entropy leaves out


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of a tokenizer.

    :param ordinary_ids: int64 [ids], those that may stand in the place of a token: all but the special ones
    """

    pad_id: int
    mask_id: int
    ordinary_ids: np.ndarray

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Vocabulary":
        """:raises UserError: when the tokenizer has no mask or padding token"""
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path} has no mask or padding token, so that no masked language "
                f"model can be trained with it. Train one with `python -m tokenizer.train`, or take another."
            )
        ordinary_ids = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
        return cls(int(tokenizer.pad_token_id), int(tokenizer.mask_token_id), ordinary_ids)


def collate(
    instances: Sequence[Instance],
    vocabulary: Vocabulary,
    *,
    mask_probability: float = 0.15,
    rng: np.random.Generator,
    pad_to_multiple_of: int = 8,
) -> dict[str, torch.Tensor]:
    """Mask and pad instances to one batch; call it again for another mask.

    :param mask_probability: share of the real tokens to predict (neither special nor padding). 0.15 is BERT's; more
        gives more to learn from each text and less to learn it by
    :param rng: the mask is the same for the same instances and the same state of it
    :param pad_to_multiple_of: the length is that of the longest instance, rounded up; 8 suits tensor cores. Where the
        model has no positions beyond `seq_length`, that has to be a multiple of it
    :returns: int64 tensors: input_ids, attention_mask, token_type_ids and labels (-100 where nothing is to be
        predicted) of [batch, length], sentence_order_label of [batch]
    """
    lengths = np.array([len(instance.input_ids) for instance in instances])
    length = -(-int(lengths.max()) // pad_to_multiple_of) * pad_to_multiple_of
    real = np.arange(length) < lengths[:, None]

    def padded(arrays: list[np.ndarray], padding: int) -> np.ndarray:
        batch = np.full(real.shape, padding, dtype=np.int64)
        batch[real] = np.concatenate(arrays)
        return batch

    input_ids = padded([instance.input_ids for instance in instances], vocabulary.pad_id)
    chosen = choose_words(padded([instance.word_ids for instance in instances], -1), mask_probability, rng)
    labels = np.where(chosen, input_ids, IGNORED)
    batch = {
        "input_ids": hide(input_ids, chosen, vocabulary, rng),
        "attention_mask": real.astype(np.int64),
        "token_type_ids": padded([instance.token_type_ids for instance in instances], 0),
        "labels": labels,
        "sentence_order_label": np.array([instance.order_label for instance in instances], dtype=np.int64),
    }
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def choose_words(word_ids: np.ndarray, mask_probability: float, rng: np.random.Generator) -> np.ndarray:
    """Choose whole words at random until they hold the wanted share of the tokens.

    The words of a row are taken in a random order, and the one that crosses the budget with the probability that makes
    the expected number of tokens the budget. (Passing over words that do not fit any more would mask long words less
    often than short ones.) A row has thus less than one word of LONGEST_WORD tokens too many, and, as in BERT, at least
    one word.

    :param word_ids: int64 [batch, length], -1 for what must not be chosen
    :returns: bool [batch, length]
    """
    rows, columns = np.nonzero(word_ids >= 0)
    width = int(word_ids.max(initial=0)) + 1
    sizes = np.zeros((len(word_ids), width), dtype=np.int64)
    np.add.at(sizes, (rows, word_ids[rows, columns]), 1)
    order = np.argsort(np.where(sizes > 0, rng.random(sizes.shape), 2.0), axis=1)  # words that a row lacks come last
    ordered = np.take_along_axis(sizes, order, axis=1)
    before = np.cumsum(ordered, axis=1) - ordered
    budget = mask_probability * sizes.sum(axis=1, keepdims=True)
    share = (budget - before) / np.maximum(ordered, 1)  # of this word that the budget still holds
    taken = (ordered > 0) & ((rng.random(sizes.shape) < share) | (before == 0))
    words = np.zeros_like(taken)
    np.put_along_axis(words, order, taken, axis=1)
    chosen = np.zeros(word_ids.shape, dtype=bool)
    chosen[rows, columns] = words[rows, word_ids[rows, columns]]
    return chosen


def hide(input_ids: np.ndarray, chosen: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator) -> np.ndarray:
    """Replace 80 % of the chosen tokens by [MASK], 10 % by any ordinary token, and leave 10 %.

    It is drawn for each token, as in BERT's whole-word masking, not for each word.
    """
    draw = rng.random(input_ids.shape)
    substitutes = rng.choice(vocabulary.ordinary_ids, input_ids.shape)
    hidden = np.where(chosen & (draw < MASKED), vocabulary.mask_id, input_ids)
    return np.where(chosen & (draw >= MASKED) & (draw < MASKED + RANDOM), substitutes, hidden)
