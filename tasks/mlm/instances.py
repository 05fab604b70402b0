"""From documents to training instances: ALBERT's pairs of consecutive segments, half of them swapped."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from collab.errors import UserError
from tasks.mlm.sentences import split_sentences

IN_ORDER, SWAPPED, NO_ORDER = (
    0,
    1,
    -100,
)  # as AlbertForPreTraining reads sentence_order_label; -100 is left out of a loss
SHORT = 0.1  # share of the instances that are shorter on purpose (BERT, Devlin et al. 2019, appendix A.2)
LONGEST_WORD = 8  # tokens; a longer one (an URL, a base64 line) counts as several, or it would be masked as a whole

# These scripts put no spaces between words, so that what follows a space is a sentence: each of their tokens is a word.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass
class Instance:
    """One training example before masking; the three arrays are int64 [length], with length <= seq_length.

    :param input_ids: [CLS] A [SEP] B [SEP], or [CLS] A [SEP] for a text of one word
    :param token_type_ids: 0 up to and with the first [SEP], then 1
    :param word_ids: the number of the word that a token belongs to, counted through the instance; -1 for [CLS] and
        [SEP], and for unknown tokens, which nothing can be learnt from. Punctuation belongs to the word that it is
        glued to, as the tokenizer has no mark between them
    :param order_label: 0 when A comes before B in the document, 1 when they are swapped, -100 when there is no B
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    word_ids: np.ndarray
    order_label: int


def instances(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, seq_length: int, rng: np.random.Generator
) -> Iterator[Instance]:
    """Pack the sentences of each document into pairs of segments (ALBERT, Lan et al. 2019, section 3.1).

    Whole sentences are taken until the next one does not fit; then they are parted between two sentences drawn at
    random, and the two segments are swapped in half of the cases. All the text of a document ends up in one instance
    or another, also of one that is a single sentence (parted between two words) and of a sentence longer than an
    instance (cut between two words). Documents are not mixed.

    :param documents: texts; line breaks end sentences
    :param tokenizer: a fast tokenizer with [CLS] and [SEP]
    :param seq_length: tokens in the longest instance, special ones included; at least 16
    :param rng: decides about lengths, parting points and swaps
    :raises UserError: when the tokenizer does not show where words begin
    """
    if seq_length < 16:
        raise ValueError(f"seq_length is {seq_length}; two segments of more than a word need at least 16")
    begins_word = word_beginnings(tokenizer)
    special = np.zeros(len(tokenizer), dtype=bool)
    special[tokenizer.all_special_ids] = True
    for document in documents:
        sentences = split_sentences(document)
        encoded = tokenizer(sentences, add_special_tokens=False, verbose=False)["input_ids"] if sentences else []
        if not any(encoded):
            continue  # normalisers may leave nothing of a text
        ends = np.cumsum([len(sentence) for sentence in encoded])
        ids = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int64, count=ends[-1])
        ids[special[ids]] = tokenizer.unk_token_id  # a text that speaks of "[MASK]" holds no mask
        begins = begins_word[ids]
        begins[np.append(0, ends[ends < len(ids)])] = True
        begins = cut_long_words(begins)
        for boundaries in packed(np.unique(ends[ends > 0]), begins, seq_length - 3, rng):
            yield parted(ids, begins, boundaries, tokenizer, rng)


def packed(ends: np.ndarray, begins: np.ndarray, most: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Group the sentences of a document into instances of at most `most` tokens.

    :param ends: where the sentences end in the document's tokens, increasing
    :param begins: bool [tokens], where words begin; no word is longer than `most`
    :returns: for each instance, its first token and the ends of its sentences
    """
    boundaries = [0]
    target = target_length(most, rng)
    for end in ends.tolist():
        while end - boundaries[0] > most:
            if len(boundaries) == 1:  # a sentence longer than the instance
                boundaries.append(boundaries[0] + 1 + np.flatnonzero(begins[boundaries[0] + 1 :][:most])[-1].item())
            yield boundaries
            boundaries = boundaries[-1:]
            target = target_length(most, rng)
        boundaries.append(end)
        if end - boundaries[0] >= target:
            yield boundaries
            boundaries = boundaries[-1:]
            target = target_length(most, rng)
    if len(boundaries) > 1:
        yield boundaries


def target_length(most: int, rng: np.random.Generator) -> int:
    return int(rng.integers(2, most + 1)) if rng.random() < SHORT else most


def parted(
    ids: np.ndarray,
    begins: np.ndarray,
    boundaries: list[int],
    tokenizer: PreTrainedTokenizerBase,
    rng: np.random.Generator,
) -> Instance:
    """Make one instance of the tokens between the first and the last of `boundaries`."""
    start, *inner, stop = boundaries
    if not inner:  # one sentence: part it between two of its words
        inner = (start + 1 + np.flatnonzero(begins[start + 1 : stop])).tolist()
    words = np.cumsum(begins[start:stop])
    words[ids[start:stop] == tokenizer.unk_token_id] = -1
    if inner:
        middle = inner[int(rng.integers(len(inner)))]
        order_label = SWAPPED if rng.random() < 0.5 else IN_ORDER
        segments = [slice(start, middle), slice(middle, stop)]
        if order_label == SWAPPED:
            segments.reverse()
    else:
        order_label = NO_ORDER
        segments = [slice(start, stop)]
    length = 1 + stop - start + len(segments)
    instance = Instance(
        input_ids=np.full(length, tokenizer.sep_token_id, dtype=np.int64),
        token_type_ids=np.zeros(length, dtype=np.int64),
        word_ids=np.full(length, -1, dtype=np.int64),
        order_label=order_label,
    )
    instance.input_ids[0] = tokenizer.cls_token_id
    at = 1
    for number, segment in enumerate(segments):
        after = at + segment.stop - segment.start
        instance.input_ids[at:after] = ids[segment]
        instance.word_ids[at:after] = words[segment.start - start : segment.stop - start]
        instance.token_type_ids[at : after + 1] = number
        at = after + 1
    return instance


def word_beginnings(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tell for each id of the vocabulary whether it begins a word: bool [vocabulary].

    WordPiece marks what continues a word (##), SentencePiece (▁) and byte-level BPE (Ġ) what begins one.
    """
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    if sum(token.startswith("##") for token in tokens) > 1:
        return np.array([not token.startswith("##") for token in tokens])
    for mark in "▁Ġ":
        if sum(token.startswith(mark) for token in tokens) > 1:
            return np.array([token.startswith(mark) or bool(UNSPACED.match(token)) for token in tokens])
    raise UserError(
        "This tokenizer marks neither the beginning (▁, Ġ) nor the continuation (##) of words, so that whole words "
        "cannot be masked. Train one with `python -m tokenizer.train`, or take another."
    )


def cut_long_words(begins: np.ndarray) -> np.ndarray:
    """Let a word of more than LONGEST_WORD tokens begin again after each so many."""
    position = np.arange(len(begins))
    begin = np.maximum.accumulate(np.where(begins, position, 0))
    return (position - begin) % LONGEST_WORD == 0
