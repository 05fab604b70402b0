"""Stub until the real one is merged."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import itertools
import re

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from collab.errors import UserError

UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


class Encoder(Protocol):
    vocab_size: int
    unk_id: int
    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    begins_word: np.ndarray
    ordinary_ids: np.ndarray

    def encode(self, sentences: Sequence[str]) -> tuple[np.ndarray, np.ndarray]: ...


class FastEncoder:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.unk_id, self.cls_id, self.sep_id = tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id
        self.pad_id, self.mask_id = tokenizer.pad_token_id, tokenizer.mask_token_id
        self.begins_word = word_beginnings(tokenizer)
        self.special = np.zeros(len(tokenizer), dtype=bool)
        self.special[tokenizer.all_special_ids] = True
        self.ordinary_ids = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)

    def encode(self, sentences):
        encoded = (
            self.tokenizer(list(sentences), add_special_tokens=False, verbose=False)["input_ids"] if sentences else []
        )
        lengths = np.array([len(s) for s in encoded], dtype=np.int64)
        ids = np.fromiter(itertools.chain.from_iterable(encoded), dtype=np.int32, count=int(lengths.sum()))
        ids[self.special[ids]] = self.unk_id
        return ids, lengths


def open_encoder(folder: Path) -> Encoder:
    return FastEncoder(AutoTokenizer.from_pretrained(folder))


def word_beginnings(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]
    if sum(token.startswith("##") for token in tokens) > 1:
        return np.array([not token.startswith("##") for token in tokens])
    for mark in "▁Ġ":
        if sum(token.startswith(mark) for token in tokens) > 1:
            return np.array([token.startswith(mark) or bool(UNSPACED.match(token)) for token in tokens])
    raise UserError("neither the beginning")
