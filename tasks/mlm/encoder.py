"""Text in, token ids out: the run's tokenizer, at several times its own speed where its rules allow that."""

import itertools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]  # protobuf makes it at import
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from collab.errors import UserError
from tasks.mlm.sentences import cut_at_spaces
from tokenizer.normalizers import NORMALIZERS, make_normalizer

SPACE = "▁"  # SentencePiece's mark for the space before a word
END = "\x00"  # a word of no tokens, after each sentence
WIDE_SPACE = re.compile("[\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")
GRAIN = 256  # scores are multiples of 1/256, so that sums up to 2**24 / 256 are exact in SentencePiece's float32
AT_ONCE = 2**18  # characters; the `tokenizers` library takes a hundred bytes of memory for each
REMEMBERED = 2**19  # tokens of the words that are kept: about 200,000 words and 40 MB

# Tokenizers that cut each word by itself, whatever stands around it: these pre-tokenizers, after these normalisers.
BY_WORDS: list[dict[str, Any]] = [
    {"type": "BertPreTokenizer"},
    {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "WhitespaceSplit"},
            {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True},
        ],
    },
]
OF_WORDS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer"}
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}  # pieces for characters that have none of their own
OUR_NORMALIZERS = [
    json.loads(make_normalizer(name, lowercase).__getstate__())
    for name, lowercase in itertools.product(NORMALIZERS, (False, True))
]

WITHIN_LINE = re.compile(r"[^\S\n]")  # white space but the line feed

# These scripts put no spaces between words, so that what follows a space is a sentence: each of their tokens is a word.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
SAMPLES = [
    "The quick (brown) fox... costs €3.50]]] ***** -----",
    "ﬁne Ｃafé ½ ΟΔΟΣ İstanbul",
    "ক্ষুদ্র ঋণ র‍্যাব বড়",
    "هَلْ قَرَأْتَ ـــ می‌خوانم",
    "日本語の文章です。 ภาษาไทย 🎉👩‍👩‍👧",
    "<pad> [MASK] <0x41> a▁b ▁ \x00 \x1c \x85 \u2028 ﷺ",
]

logger = logging.getLogger(__name__)


def open_encoder(folder: Path) -> "Encoder":
    """Open the tokenizer in `folder` in the form that encodes fastest; which one that is changes no id.

    :param folder: what `AutoTokenizer.from_pretrained` reads. A spiece.model is not needed: all that SentencePiece has
        to know is in the tokenizer.json that tokenizer/train.py writes
    :raises UserError: when the tokenizer cannot be opened, is not a fast one, lacks a special token or does not show
        where words begin
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what comes from Rust has no type of its own
        raise UserError(
            f"The tokenizer in {folder} cannot be opened: {str(error).splitlines()[0]} Give a folder that holds a "
            f"tokenizer.json, or train one with `python -m tokenizer.train`."
        ) from error
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer in {folder} is written in Python, which is too slow to train with. Take one that has a "
            f"tokenizer.json, or train one with `python -m tokenizer.train`."
        )
    plain = Encoder(tokenizer)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    if not cuts_by_words(rules):
        return plain
    try:
        encoder = PieceEncoder(tokenizer, rules) if is_ours(rules) else WordEncoder(tokenizer)
    except RuntimeError as error:  # SentencePiece's
        raise UserError(
            f"The tokenizer in {folder} is damaged: {error} Give another copy of it, or train one with "
            f"`python -m tokenizer.train`."
        ) from error
    for sample in SAMPLES:
        if not np.array_equal(encoder.encode([sample])[0], plain.encode([sample])[0]):
            logger.warning("%s reads %r in an unknown way: encoding will be several times slower", folder, sample)
            return plain
    return encoder


def cuts_by_words(rules: dict[str, Any]) -> bool:
    """Tell whether the tokens of a text are those of its words.

    :param rules: a tokenizer.json
    """
    normalizer = rules["normalizer"] or {"type": "Sequence", "normalizers": []}
    parts = normalizer.get("normalizers", [normalizer])
    return (
        rules["pre_tokenizer"] in BY_WORDS
        and (normalizer in OUR_NORMALIZERS or all(part["type"] in OF_WORDS for part in parts))
        and all(token["special"] for token in rules["added_tokens"])
    )


def is_ours(rules: dict[str, Any]) -> bool:
    """Tell whether SentencePiece can compute the same scores as the `tokenizers` library does in float64.

    True for what tokenizer/train.py writes; its older tokenizers had other scores.
    """
    if rules["model"]["type"] != "Unigram" or rules["normalizer"] not in OUR_NORMALIZERS:
        return False
    vocabulary = rules["model"]["vocab"]
    pieces = {piece for piece, _ in vocabulary}
    return (
        {SPACE} | BYTES <= pieces
        and not any(SPACE in piece[1:] for piece in pieces)
        and all((score * GRAIN).is_integer() for _, score in vocabulary)
    )


class Encoder:
    """The fast tokenizer as it is.

    :ivar vocab_size: ids, those of added tokens included
    :ivar unk_id: stands for what the vocabulary cannot spell, and for text that spells a special token ("<pad>"), so
        that `encode` gives no other special id; -1 for tokenizers without one
    :ivar ordinary_ids: int64 [ids], what may stand in the place of a token: all ids but the special ones
    :ivar begins_word: bool [vocab_size], see `word_beginnings`
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.vocab_size = len(tokenizer)
        self.unk_id = -1 if tokenizer.unk_token_id is None else int(tokenizer.unk_token_id)
        self.cls_id, self.sep_id, self.pad_id, self.mask_id = (
            special_id(tokenizer, name) for name in ("cls", "sep", "pad", "mask")
        )
        self.ordinary_ids = np.setdiff1d(np.arange(self.vocab_size), tokenizer.all_special_ids)
        self.begins_word = word_beginnings(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        self._backend.encode_special_tokens = True  # "[MASK]" in a text is text
        self._backend.no_truncation()
        self._backend.no_padding()
        self._ordinary = np.arange(self.vocab_size, dtype=np.int32)
        if self.unk_id >= 0:
            self._ordinary[tokenizer.all_special_ids] = self.unk_id

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode cleaned text, normalised as the tokenizer says and without [CLS] and [SEP].

        :param sentences: of one document or of many; a few hundred at once keep the cost of a call small. A word of
            more than AT_ONCE characters is cut
        :returns: ids int32 [tokens] of all sentences one after the other, and lengths int64 [sentences], 0 possible
        """
        if sum(map(len, sentences)) <= AT_ONCE:
            return self._encode(sentences)
        parts = [list(cut_at_spaces(sentence, AT_ONCE)) for sentence in sentences]
        flat = list(itertools.chain.from_iterable(parts))
        encoded = [self._encode(flat[start:end]) for start, end in groups(flat, AT_ONCE)]
        ids, lengths = (np.concatenate(arrays) for arrays in zip(*encoded, strict=True))
        return ids, np.diff(from_zero(lengths)[from_zero(np.array([len(part) for part in parts]))])

    def _encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [encoding.ids for encoding in self._backend.encode_batch_fast(sentences, add_special_tokens=False)]
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
        ids = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
        return self._ordinary[ids], lengths


class WordEncoder(Encoder):
    """For tokenizers that cut each word by itself: words that came before are looked up.

    Nine of ten words of running text did, so that encoding costs little more than `str.split`. Not for several threads
    at once: each opens its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        self._forget()

    def _forget(self) -> None:
        self._words = Numbered({END: 0, "": 1})
        self._ids = np.empty(0, dtype=np.int32)  # of the words that are kept, one after the other, and room for more
        self._ends = np.zeros(3, dtype=np.int64)  # word n is _ids[_ends[n] : _ends[n + 1]]; room here too

    def _encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if self._words.new or self._ends[len(self._words)] > REMEMBERED:  # the last call failed, or all is full
            self._forget()
        everything = f" {END} ".join([*sentences, ""])
        if not everything.isascii():
            everything = WIDE_SPACE.sub(" ", everything)
        words = compute.ascii_split_whitespace(pa.array([everything])).values.dictionary_encode()
        distinct = words.dictionary.to_pylist()
        found = np.fromiter(map(self._words.__getitem__, distinct), dtype=np.int64, count=len(distinct))
        numbers = found[words.indices.to_numpy()]
        if self._words.new:
            self._keep(*self._encode_new(self._words.new))
            self._words.new = []
        starts = self._ends[numbers]
        sizes = self._ends[numbers + 1] - starts
        bounds = from_zero(sizes)
        ids = self._ids[np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], sizes)]
        ends = bounds[:-1][numbers == 0]
        if len(ends) != len(sentences):
            return Encoder._encode(self, sentences)  # END is in the text
        return ids, np.diff(ends, prepend=0)

    def _keep(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        known = len(self._words) - len(lengths)
        start = int(self._ends[known])
        ends = start + np.cumsum(lengths)
        self._ids = with_room(self._ids, start + len(ids))
        self._ids[start : start + len(ids)] = ids
        self._ends = with_room(self._ends, known + 1 + len(ends))
        self._ends[known + 1 : known + 1 + len(ends)] = ends

    def _encode_new(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return super()._encode(words)


class PieceEncoder(WordEncoder):
    """For the tokenizers of tokenizer/train.py: SentencePiece's own encoder cuts the words that are new.

    It is many times as fast as the `tokenizers` library, which matters where a sentence is one word (Chinese, Thai).
    The normaliser stays the library's. Both encoders take the first of equally good ways to cut a word, and agree on
    which ones are equal because all scores, and all sums of them up to `_longest` characters, are exact. What is out
    of the ordinary goes to the library: long words, and text that spells the name of a piece ("<0x41>").

    :param rules: the tokenizer.json
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: dict[str, Any]) -> None:
        super().__init__(tokenizer)
        vocabulary = rules["model"]["vocab"]
        specials = {token["content"] for token in rules["added_tokens"]}
        self._pieces = SentencePieceProcessor(model_proto=sentencepiece_model(vocabulary, specials, self.unk_id))
        self._starts = np.array([piece.startswith(SPACE) for piece, _ in vocabulary])
        dearest = 10 - min(score for _, score in vocabulary)  # both libraries charge this for an unknown character
        self._longest = int(2**24 / GRAIN / dearest)
        self._names = re.compile("|".join(map(re.escape, sorted(specials | BYTES)))).search
        self._lowercase = {"type": "Lowercase"} in rules["normalizer"]["normalizers"]

    def _encode_new(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        text = "\n".join(words)
        if not text.isascii():
            text = self._backend.normalizer.normalize_str(text)
        elif self._lowercase:
            text = text.lower()  # no normaliser of ours changes anything else in ASCII
        normal = text.split("\n")
        if not self._is_odd(text) and min(map(len, normal)) > 0 and max(map(len, normal)) < self._longest // 2:
            return self._cut(normal)
        odd = [
            index for index, word in enumerate(normal) if not 0 < len(word) < self._longest // 2 or self._is_odd(word)
        ]
        rest = sorted(set(range(len(words))) - set(odd))
        parts: list[np.ndarray] = [np.empty(0)] * len(words)
        for indices, (ids, lengths) in (
            (odd, super()._encode_new([words[index] for index in odd])),
            (rest, self._cut([normal[index] for index in rest])),
        ):
            for index, part in zip(indices, np.split(ids, np.cumsum(lengths)[:-1]), strict=bool(indices)):
                parts[index] = part
        return np.concatenate(parts), np.array([len(part) for part in parts])

    def _is_odd(self, text: str) -> bool:
        """Tell whether there is white space or its mark within a word, or the name of a piece."""
        return SPACE in text or bool(WITHIN_LINE.search(text) or self._names(text))

    def _cut(self, words: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode many words as one text, but no more than `_longest` characters at once."""
        if not words:
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
        ids = np.concatenate(
            [
                self._pieces.encode(SPACE + SPACE.join(words[start:end]), return_type="numpy")
                for start, end in groups(words, self._longest // 2)
            ]
        )
        return ids, np.diff(np.append(np.flatnonzero(self._starts[ids]), len(ids)))


class Numbered(dict[str, int]):
    """Numbers words in the order in which they are first asked for."""

    def __init__(self, known: dict[str, int]) -> None:
        super().__init__(known)
        self.new: list[str] = []

    def __missing__(self, word: str) -> int:
        self[word] = number = len(self)
        self.new.append(word)
        return number


def from_zero(lengths: np.ndarray) -> np.ndarray:
    """Where pieces of these lengths begin, and where the last one ends: int64 [lengths + 1]."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def groups(texts: Sequence[str], size: int) -> list[tuple[int, int]]:
    """Where to part `texts` so that each group has `size` characters or a few more, less than the longest of them."""
    group = np.cumsum([len(text) + 1 for text in texts]) // size
    return list(itertools.pairwise([0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(texts)]))


def with_room(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a longer one that begins with it and holds at least `size` values."""
    if size <= len(array):
        return array
    longer = np.empty(max(size, 2 * len(array)), dtype=array.dtype)
    longer[: len(array)] = array
    return longer


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    index = getattr(tokenizer, f"{name}_token_id")
    if index is None:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path} has no {name} token, so that no masked language model can be "
            f"trained with it. Train one with `python -m tokenizer.train`, or take another."
        )
    return int(index)


def sentencepiece_model(vocabulary: list[tuple[str, float]], specials: set[str], unk_id: int) -> bytes:
    """The model of a tokenizer.json for SentencePiece, with a normaliser that does nothing.

    :param vocabulary: pieces and their scores
    :param specials: those that no text holds
    """
    model = ModelProto()
    for index, (piece, score) in enumerate(vocabulary):
        kind = (
            "UNKNOWN" if index == unk_id else "CONTROL" if piece in specials else "BYTE" if piece in BYTES else "NORMAL"
        )
        model.pieces.add(piece=piece, score=score, type=model.SentencePiece.Type.Value(kind))
    model.trainer_spec.model_type = model.trainer_spec.UNIGRAM
    model.trainer_spec.unk_id = unk_id
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return model.SerializeToString()


def word_beginnings(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Tell for each id of the vocabulary whether it begins a word: bool [vocabulary].

    WordPiece marks what continues a word (##), SentencePiece (▁) and byte-level BPE (Ġ) what begins one.

    :raises UserError: when nothing is marked
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
