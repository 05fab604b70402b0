"""Whole-word masking: from instances to the batch that the model sees, with a new mask each time."""

import numpy as np
import torch

from tasks.mlm.encoder import Encoder
from tasks.mlm.instances import NO_ORDER, SWAPPED, Instances, Pool

MASKED, RANDOM = 0.8, 0.1  # of the chosen tokens; the rest stays as it is (BERT, Devlin et al. 2019, section 3.1)
IGNORED = -100  # label of a token that is not to be predicted: what torch's cross-entropy leaves out
LONG, MULTIPLE, MULTIPLE_IF_SHORT = 256, 8, 2  # tokens


def width_of(length: int) -> int:
    """The width of a batch whose longest instance has `length` tokens: rounded up to 8, which suits tensor cores.

    Below 256 tokens, where 8 would be 3 % of padding and more, and attention a small part of the work, to 2.
    """
    multiple = MULTIPLE if length >= LONG else MULTIPLE_IF_SHORT
    return -(-length // multiple) * multiple


def collate(
    pool: Pool,
    instances: Instances,
    encoder: Encoder,
    *,
    mask_probability: float = 0.15,
    rng: np.random.Generator,
) -> dict[str, torch.Tensor]:
    """Mask and pad instances to one batch; call it again for another mask.

    :param pool: holds the tokens that `instances` point to
    :param mask_probability: share of the real tokens to predict (neither special nor padding). 0.15 is BERT's; more
        gives more to learn from each text and less to learn it by
    :param rng: the mask is the same for the same instances and the same state of it
    :returns: int64 tensors: input_ids, attention_mask, token_type_ids and labels (-100 where nothing is to be
        predicted) of [batch, width], sentence_order_label of [batch]
    """
    swapped = instances.order == SWAPPED
    begin_a = np.where(swapped, instances.middle, instances.start)[:, None]
    begin_b = np.where(swapped, instances.start, instances.middle)[:, None]
    size = instances.stop - instances.start
    size_a = np.where(swapped, instances.stop - instances.middle, instances.middle - instances.start)[:, None]
    lengths = instances.lengths[:, None]

    column = np.arange(width_of(int(lengths.max())))
    is_real = column < lengths
    is_a = (column > 0) & (column <= size_a)
    is_b = (column > size_a + 1) & (column < lengths - 1)
    is_text = is_a | is_b
    source = np.where(is_a, begin_a + column - 1, begin_b + column - size_a - 2)[is_text]

    input_ids = np.where(is_real, encoder.sep_id, encoder.pad_id)
    input_ids[:, 0] = encoder.cls_id
    input_ids[is_text] = pool.ids[source]
    words = pool.word_of[source]
    row = np.repeat(np.arange(len(size)), size)
    words = np.where(words < 0, -1, words - np.repeat(_first_word(pool, instances), size))
    chosen = np.zeros(input_ids.shape, dtype=bool)
    chosen[is_text] = choose_words(row, words, len(size), mask_probability, rng)
    batch = {
        "labels": np.where(chosen, input_ids, IGNORED),
        "input_ids": hide(input_ids, chosen, encoder, rng),
        "attention_mask": is_real.astype(np.int64),
        "token_type_ids": ((column > size_a + 1) & is_real).astype(np.int64),
        "sentence_order_label": np.where(instances.order == NO_ORDER, IGNORED, instances.order),
    }
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _first_word(pool: Pool, instances: Instances) -> np.ndarray:
    return np.searchsorted(pool.word_starts, instances.start, side="right") - 1


def choose_words(
    row: np.ndarray, words: np.ndarray, rows: int, mask_probability: float, rng: np.random.Generator
) -> np.ndarray:
    """Choose whole words at random until they hold the wanted share of the tokens of each row.

    The words of a row are taken in a random order, and the one that crosses the budget with the probability that makes
    the expected number of tokens the budget. (Passing over words that do not fit any more would mask long words less
    often than short ones.) A row has thus less than one word of LONGEST_WORD tokens too many, and, as in BERT, at least
    one word.

    :param row: int64 [tokens], the row of a batch of so many `rows` that a token is in, increasing
    :param words: int64 [tokens], the number of its word within the row, from 0 on; -1 for what must not be chosen
    :returns: bool [tokens]
    """
    width = int(words.max(initial=-1)) + 1
    is_word = words >= 0
    flat = row[is_word] * width + words[is_word]
    sizes = np.bincount(flat, minlength=rows * width)
    present = np.flatnonzero(sizes)
    # One sort for all rows: by row, and by a random number within it.
    order = present[np.argsort(present // max(width, 1) + rng.random(len(present)))]
    ordered, of_row = sizes[order], order // max(width, 1)
    total = np.bincount(of_row, weights=ordered, minlength=rows)
    until = np.cumsum(ordered)
    before = until - ordered - (np.cumsum(total) - total)[of_row]
    share = (mask_probability * total[of_row] - before) / ordered  # of this word that the budget still holds
    taken = np.zeros(rows * width, dtype=bool)
    taken[order] = (rng.random(len(order)) < share) | (before == 0)
    chosen = np.zeros(len(words), dtype=bool)
    chosen[is_word] = taken[flat]
    return chosen


def hide(input_ids: np.ndarray, chosen: np.ndarray, encoder: Encoder, rng: np.random.Generator) -> np.ndarray:
    """Replace 80 % of the chosen tokens by [MASK], 10 % by any ordinary token, and leave 10 %.

    It is drawn for each token, as in BERT's whole-word masking, not for each word.
    """
    hidden = input_ids.copy()
    shown = input_ids[chosen]
    draw = rng.random(len(shown))
    shown[draw < MASKED] = encoder.mask_id
    is_random = (draw >= MASKED) & (draw < MASKED + RANDOM)
    shown[is_random] = rng.choice(encoder.ordinary_ids, int(is_random.sum()))
    hidden[chosen] = shown
    return hidden
