"""From documents to training instances: ALBERT's pairs of consecutive segments, half of them swapped, or whole ones.

Instances are rows of a table that point into the tokens of some hundred documents, the pool. Nothing is copied before a
batch is made of them, and all of it is done for many instances at once: what costs a microsecond for each document or
instance costs more than its tokenization if most of them are short.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tasks.mlm.encoder import Encoder
from tasks.mlm.sentences import split_sentences

IN_ORDER, SWAPPED, NO_ORDER = 0, 1, -100  # AlbertForPreTraining's sentence_order_label; a loss leaves -100 out
SHORT = 0.1  # share of the instances that are shorter on purpose (BERT, Devlin et al. 2019, appendix A.2)
LONGEST_WORD = 8  # tokens; a longer one (an URL, a base64 line) counts as several, or it would be masked as a whole
SPECIAL = 3  # [CLS] A [SEP] B [SEP]
SHORTEST = 16  # tokens; less is no room for two segments of more than a word


@dataclass(frozen=True)
class Pool:
    """The tokens of some documents, one after the other, and where words, sentences and documents end in them.

    :param ids: int32 [tokens]
    :param word_of: int64 [tokens], the number of the word that a token belongs to, counted through the pool; -1 for
        unknown tokens, which nothing can be learnt from. Punctuation belongs to the word that it is glued to, as the
        tokenizer has no mark between them
    :param word_starts: int64 [words], the first token of each word
    :param sentence_ends: int64 [sentences], increasing
    :param document_ends: int64 [documents], increasing; each of them is a sentence's end too
    """

    ids: np.ndarray
    word_of: np.ndarray
    word_starts: np.ndarray
    sentence_ends: np.ndarray
    document_ends: np.ndarray

    @classmethod
    def of(cls, documents: Iterable[str], encoder: Encoder) -> "Pool":
        """Tokenize `documents`, each once. Line breaks end sentences."""
        sentences: list[str] = []
        sentences_until: list[int] = []
        for document in documents:
            sentences += split_sentences(document)
            sentences_until.append(len(sentences))
        ids, lengths = encoder.encode(sentences)
        ends = np.append(0, np.cumsum(lengths))
        sentence_ends = ends[1:][lengths > 0]  # normalisers may leave nothing of a sentence
        document_ends = ends[sentences_until]
        document_ends = document_ends[np.diff(document_ends, prepend=0) > 0]
        begins = encoder.begins_word[ids]
        begins[0:1] = True
        begins[sentence_ends[:-1]] = True
        begins = cut_long_words(begins)
        word_of = np.cumsum(begins) - 1
        word_of[ids == encoder.unk_id] = -1
        return cls(ids, word_of, np.flatnonzero(begins), sentence_ends, document_ends)

    def ranges(self) -> list[tuple[int, int]]:
        """The first token of each document, and the one after its last."""
        ends = self.document_ends.tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True)) if ends else []


@dataclass(frozen=True)
class Instances:
    """Training examples before masking: int64 [instances] each, positions in the tokens of a pool.

    An instance is [CLS] A [SEP] B [SEP], with A from `start` to `middle` and B from there to `stop`, or the other way
    round where `order` is SWAPPED; or [CLS] A [SEP] for a text of one word or where nothing is parted: `middle` is
    `stop` then, and `order` is NO_ORDER.
    """

    start: np.ndarray
    middle: np.ndarray
    stop: np.ndarray
    order: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: np.ndarray) -> "Instances":
        return Instances(self.start[rows], self.middle[rows], self.stop[rows], self.order[rows])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each, the special ones included."""
        return self.stop - self.start + np.where(self.order == NO_ORDER, SPECIAL - 1, SPECIAL)


def make_instances(
    pool: Pool, ranges: Sequence[tuple[int, int]], seq_length: int, rng: np.random.Generator, *, parted: bool = True
) -> Instances:
    """Pack sentences into pairs of segments (ALBERT, Lan et al. 2019, section 3.1).

    Whole sentences are taken until the next one does not fit; then they are parted between two sentences drawn at
    random, and the two segments are swapped in half of the cases. All the text ends up in one instance or another, also
    a range that is a single sentence (parted between two words) and a sentence longer than an instance (cut between two
    words). Documents are not mixed.

    :param ranges: of the pool's tokens, each within one document; whole documents are `pool.ranges()`
    :param seq_length: tokens in the longest instance, special ones included; at least SHORTEST
    :param rng: decides about lengths, parting points and swaps
    :param parted: False for models that judge no order (RoBERTa, Liu et al. 2019, section 4.2): [CLS] A [SEP] each
    """
    if seq_length < SHORTEST:
        raise ValueError(f"seq_length is {seq_length}; two segments of more than a word need at least {SHORTEST}")
    special = SPECIAL if parted else SPECIAL - 1
    cuts = np.array(_pack(pool, ranges, seq_length - special, rng), dtype=np.int64).reshape(-1, 2)
    start, stop = cuts[:, 0], cuts[:, 1]
    if not parted:
        return Instances(start, stop, stop, np.full(len(cuts), NO_ORDER))
    # Where to part: after a sentence inside; if there is none, before a word inside; if there is none, nowhere.
    draw = rng.random(len(cuts))
    sentence, word = (_choose_between(points, start, stop, draw) for points in (pool.sentence_ends, pool.word_starts))
    middle = np.where(sentence >= 0, sentence, word)
    swapped = np.where(rng.random(len(cuts)) < 0.5, SWAPPED, IN_ORDER)
    return Instances(start, np.where(middle >= 0, middle, stop), stop, np.where(middle >= 0, swapped, NO_ORDER))


def _pack(pool: Pool, ranges: Sequence[tuple[int, int]], most: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Group the sentences of each range into instances of at most `most` tokens."""
    sentence_ends = pool.sentence_ends.tolist()
    first = np.searchsorted(pool.sentence_ends, [start for start, _ in ranges], side="right").tolist()
    targets = _targets(most, rng)
    target = next(targets)
    cuts: list[tuple[int, int]] = []
    for (start, stop), sentence in zip(ranges, first, strict=True):
        taken = start
        while taken < stop:
            end = min(sentence_ends[sentence], stop)
            sentence += 1
            while end - start > most:  # this sentence does not fit any more, or into no instance
                if taken == start:
                    taken = _last_word_start(pool, start, start + most)
                cuts.append((start, taken))
                start, target = taken, next(targets)
            taken = end
            if taken - start >= target or taken == stop:
                cuts.append((start, taken))
                start, target = taken, next(targets)
    return cuts


def _targets(most: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from np.where(rng.random(256) < SHORT, rng.integers(2, most + 1, 256), most).tolist()


def _last_word_start(pool: Pool, start: int, before: int) -> int:
    """The last word that starts after `start` and not after `before`; no word is longer than LONGEST_WORD."""
    return int(pool.word_starts[np.searchsorted(pool.word_starts, before, side="right") - 1])


def _choose_between(points: np.ndarray, start: np.ndarray, stop: np.ndarray, draw: np.ndarray) -> np.ndarray:
    """For each range one of the `points` strictly inside it, by a `draw` in [0, 1); -1 where there is none."""
    first, last = np.searchsorted(points, start, side="right"), np.searchsorted(points, stop, side="left")
    chosen = np.minimum(first + (draw * (last - first)).astype(np.int64), len(points) - 1)
    return np.where(first < last, points[chosen], -1)


def cut_long_words(begins: np.ndarray) -> np.ndarray:
    """Let a word of more than LONGEST_WORD tokens begin again after each so many.

    :param begins: bool [tokens], where words begin
    """
    position = np.arange(len(begins))
    begin = np.maximum.accumulate(np.where(begins, position, 0))
    return (position - begin) % LONGEST_WORD == 0
