"""Whatever way the encoder takes, the ids are those of the fast tokenizer."""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from collab.errors import UserError
from tasks.mlm import encoder as module
from tasks.mlm.encoder import Encoder, PieceEncoder, WordEncoder, open_encoder
from tests.conftest import ARABIC, BENGALI
from tokenizer.normalizers import NORMALIZERS
from tokenizer.train import train_tokenizer

SPECIAL = {
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "mask_token": "[MASK]",
}
SCRIPTS = [
    "The rivers of Straße İstanbul, ΟΔΟΣ naïve ﬁne Ｃafé ½ №",
    *BENGALI,
    *ARABIC,
    "धर्मक्षेत्रे कुरुक्षेत्रे",
    "今天天气很好。「日本語の文章」，！？ｶﾞ",
    "ภาษาไทยไม่มีช่องว่าง",
    "🎉👩‍👩‍👧 ❤️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
]
ODD = [
    "▁",
    "<pad>",
    "<unk>",
    "[MASK]",
    "[CLS]",
    "<0x41>",
    "<0x0",
    "ﷺ",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\u200b",
    "\u200c",
]
ODD += ["\x00", "\x1c", "\x1d", "\x1f", "\x85", "\u180e", "\ufeff", "\u0301", "\u0323", "\U0010ffff"]
RUNS = ["]]]", "***", "----", "....", "=-=-", "aaaa", "ииии", "দদদ", "☃☃☃", "!!!!!"]
WORDS = sorted({word for text in SCRIPTS for word in text.split()}) + ODD + RUNS
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.text(st.sampled_from("".join(WORDS) + "   "), max_size=60),
    st.builds(lambda run, times: run * times, st.sampled_from([*RUNS, "日本", "x"]), st.integers(1, 2000)),
)


def reference(folder: Path, sentences: list[str]) -> list[list[int]]:
    """What the `tokenizers` library says, without special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    special = set(tokenizer.all_special_ids)
    encoded = backend.encode_batch(sentences, add_special_tokens=False)
    return [[tokenizer.unk_token_id if i in special else i for i in one.ids] for one in encoded]


def encoded(encoder: Encoder, sentences: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(sentences)
    assert ids.dtype == np.int32 and lengths.dtype == np.int64
    assert len(lengths) == len(sentences) and lengths.sum() == len(ids)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if sentences else []


@pytest.fixture(scope="module", params=NORMALIZERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    """A tokenizer of each normaliser that knows words of many scripts, and runs of marks that tie."""
    folder = tmp_path_factory.mktemp("tokenizer") / request.param
    texts = corpus[:150] + 20 * SCRIPTS + 20 * [" ".join(RUNS)] + ["] ]] ]]] * ** *** - -- ---"] * 30
    train_tokenizer(texts, folder, vocab_size=1500, normalizer=request.param)
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return open_encoder(folder)


def test_our_own_tokenizers_are_read_by_sentencepiece(encoder, folder, tmp_path):
    assert isinstance(encoder, PieceEncoder)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # what the manifest carries
        shutil.copy(folder / name, tmp_path)
    assert isinstance(open_encoder(tmp_path), PieceEncoder)


@given(st.lists(TEXTS, max_size=8))
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_ids_are_those_of_the_fast_tokenizer(encoder, folder, sentences):
    assert encoded(encoder, sentences) == reference(folder, sentences)


def test_every_character_of_unicode(encoder, folder):
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")]
    lines = [
        " ".join(f"{c} a{c}b A{c}" for c in characters[start : start + 400]) for start in range(0, len(characters), 400)
    ]
    assert encoded(encoder, lines) == reference(folder, lines)


def test_running_text(encoder, folder, corpus):
    lines = [line for document in corpus[150:] for line in document.splitlines()]
    expected = reference(folder, lines)
    assert encoded(encoder, lines) == expected
    assert encoded(encoder, lines) == expected  # now that all words are known


def test_words_around_the_length_that_float32_can_add_up(encoder, folder):
    longest = encoder._longest
    words = [
        mark * length for mark in ("]", "☃", "]*") for length in (longest // 2 - 1, longest // 2, longest, longest + 1)
    ]
    assert encoded(encoder, words) == reference(folder, words)


def test_names_of_special_tokens_in_a_text_are_no_special_tokens(encoder, folder):
    ids = encoder.encode(["[MASK] [CLS] [SEP] <pad> <unk> <s>"])[0]
    assert not {encoder.cls_id, encoder.sep_id, encoder.pad_id, encoder.mask_id} & set(ids.tolist())


def test_nothing_in_nothing_out(encoder):
    assert encoded(encoder, []) == []
    assert encoded(encoder, ["", " \n\u2028", "\x1f "])[:2] == [[], []]


def test_words_are_forgotten_when_there_are_too_many(folder, corpus, monkeypatch):
    monkeypatch.setattr(module, "REMEMBERED", 500)
    encoder = open_encoder(folder)
    assert isinstance(encoder, WordEncoder)
    lines = corpus[0].splitlines() + corpus[1].splitlines()
    expected = reference(folder, lines)
    known = []
    for line, ids in zip(lines, expected, strict=True):
        assert encoded(encoder, [line]) == [ids]
        known.append(len(encoder._words))
    assert max(known) < 700 and known != sorted(known)


@pytest.mark.parametrize("half", ["\ud800", "\udfff"])
def test_a_call_that_failed_leaves_nothing_behind(folder, half):
    encoder = open_encoder(folder)
    with pytest.raises((ValueError, TypeError)):
        encoder.encode([f"the first {half} of all"])
    assert encoded(encoder, ["the first of all"]) == reference(folder, ["the first of all"])


def test_the_mark_between_sentences_may_stand_in_a_text(folder):
    sentences = ["first", f"a {module.END} b", module.END, "", f"{module.END}c last"]
    assert encoded(open_encoder(folder), sentences) == reference(folder, sentences)


def test_texts_too_long_to_encode_at_once(folder, corpus, monkeypatch):
    sentences = [corpus[0], "", *SCRIPTS, " ".join(WORDS)]
    expected = reference(folder, sentences)
    monkeypatch.setattr(module, "AT_ONCE", 300)
    assert encoded(open_encoder(folder), sentences) == expected
    endless = encoded(open_encoder(folder), ["x" * 1000])[0]
    assert str(AutoTokenizer.from_pretrained(folder).decode(endless)).replace(" ", "") == "x" * 1000


def word_piece(folder: Path, corpus: list[str]) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator(corpus[:50] + SCRIPTS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)


def byte_pairs(folder: Path, corpus: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus[:50], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)


def other_scores(folder: Path, corpus: list[str]) -> None:
    """Ours, but with scores that float32 cannot add up exactly, as those of its first version."""
    train_tokenizer(corpus[:50] + 5 * SCRIPTS, folder, vocab_size=900)
    rules = json.loads((folder / "tokenizer.json").read_text())
    for piece in rules["model"]["vocab"]:
        piece[1] *= 1.1
    (folder / "tokenizer.json").write_text(json.dumps(rules))


@pytest.mark.parametrize(
    ("make", "kind"), [(word_piece, WordEncoder), (byte_pairs, Encoder), (other_scores, WordEncoder)]
)
def test_tokenizers_of_others(make, kind, tmp_path, corpus):
    make(tmp_path, corpus)
    encoder = open_encoder(tmp_path)
    assert type(encoder) is kind
    sentences = corpus[60].splitlines() + SCRIPTS + WORDS + [" ".join(WORDS), "a\x1cb c\x1fd"]
    assert encoded(encoder, sentences) == reference(tmp_path, sentences)


def test_a_tokenizer_that_sentencepiece_reads_differently_is_left_to_the_library(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "other")
    rules = json.loads((folder / "tokenizer.json").read_text())
    rules["model"]["byte_fallback"] = False
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(rules))
    encoder = open_encoder(tmp_path / "other")
    assert type(encoder) is Encoder and "slower" in caplog.text
    assert encoded(encoder, SCRIPTS) == reference(tmp_path / "other", SCRIPTS)


def test_attributes_are_those_of_the_tokenizer(encoder, folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert encoder.vocab_size == len(tokenizer) == len(encoder.begins_word) == 1500
    assert [encoder.pad_id, encoder.unk_id, encoder.cls_id, encoder.sep_id, encoder.mask_id] == [0, 1, 2, 3, 4]
    ids = tokenizer.convert_tokens_to_ids(["▁the", "s"])
    assert encoder.begins_word[ids].tolist() == [True, False]


def test_what_cannot_be_trained_with_is_refused(tmp_path, corpus):
    with pytest.raises(UserError, match="cannot be opened"):
        open_encoder(tmp_path / "nowhere")
    byte_pairs(tmp_path / "bare", corpus)
    bare = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text())
    del bare["mask_token"]
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(bare))
    with pytest.raises(UserError, match="has no mask token"):
        open_encoder(tmp_path / "bare")
